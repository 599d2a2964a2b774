"""Images per second of a served detector against `Detector.predict`: `python benchmarks/serving.py DETECTOR IMAGES`.

`dskd page` runs as a process of its own, with a thread of torch as here; some clients send it requests of several
images, on loopback. `predict` reads the same files in this process, while the server waits. Both alternate.
"""

import os
import platform
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import httpx2
import torch
import tyro
from tyro.conf import Positional

from dskd.detector import Detector
from dskd.page.server import TOKEN
from dskd.predict import find_images


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    detector: Positional[Path]
    images: Positional[Path]
    per_request: int = 16
    clients: int = 4
    repeats: int = 5
    maps: Annotated[bool, tyro.conf.arg(help="Ask for the maps too, as the page does.")] = False


@contextmanager
def served(detector: Path) -> Iterator[httpx2.Client]:
    """A client of `dskd page` with this detector; the server ends with the block."""
    token = secrets.token_hex()
    command = [sys.executable, "-m", "dskd", "page", str(detector), "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, TOKEN: token})
    assert server.stderr is not None
    try:
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        bearer = {"Authorization": f"Bearer {token}"}
        with httpx2.Client(base_url=address, headers=bearer, timeout=600, trust_env=False) as client:
            yield client
    finally:
        server.terminate()
        server.wait()


def seconds_served(client: httpx2.Client, category: str, paths: tuple[Path, ...], options: Options) -> float:
    """Time until the last answer; files are read and requests built within it, as `predict` reads files too."""
    requests = [paths[start : start + options.per_request] for start in range(0, len(paths), options.per_request)]

    def ask(some: tuple[Path, ...]) -> None:
        files = [("images", (path.name, path.read_bytes())) for path in some]
        answer = client.post(f"/inspect/{category}", files=files, params={"maps": options.maps})
        answer.raise_for_status()
        assert len(answer.json()["predictions"]) == len(some)

    started = time.perf_counter()
    with ThreadPoolExecutor(options.clients) as pool:
        list(pool.map(ask, requests))
    return time.perf_counter() - started


def seconds_predicted(detector: Detector, paths: tuple[Path, ...]) -> float:
    started = time.perf_counter()
    assert len([seen.to_dict() for seen in detector.predict(paths)]) == len(paths)
    return time.perf_counter() - started


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    paths = find_images([options.images]).images
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    detector = Detector.load(options.detector)
    times: dict[str, list[float]] = {"predict": [], "served": []}
    with served(options.detector) as client:
        for round_ in range(options.repeats + 1):
            found = (
                seconds_predicted(detector, paths),
                seconds_served(client, detector.record.category, paths, options),
            )
            if round_ > 0:  # the first is a warm-up
                for known, seconds in zip(times.values(), found, strict=True):
                    known.append(seconds)
    predicted, answered = (len(paths) / median(known) for known in times.values())
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} CPUs; {len(paths)} images, requests of {options.per_request} by {options.clients} clients, "
        f"medians of {options.repeats} rounds\n"
    )
    print("| predict, images/s | served, images/s | served / predict |\n|---|---|---|")
    print(f"| {predicted:.1f} | {answered:.1f} | {answered / predicted:.2f} |")


if __name__ == "__main__":
    main()
