"""Joins a Ray cluster or starts one on this machine, and counts how many workers its nodes can hold."""

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

import ray
import ray.exceptions

from tune.runtime.stopping import same_handlers
from tune.settings.workers import Workers
from tune.storage.files import trust_one_authority
from tune.storage.shown import shown, shown_url

_CONNECT_SECONDS = 5.0


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine, with the dashboard that Ray Train's cleaner needs.

    Call it in the main thread: what Ray starts here ends with the thread that started it. Raises ConnectionError
    or ValueError, in one line, if it fails.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # It advises to switch authentication off, each time that Ray starts with it.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    trust_one_authority()  # the processes of a cluster that starts here inherit it
    if address is not None:
        _check_address(address)
    with _caught_stderr() as captured, same_handlers():
        try:
            ray.init(
                address=address or "local",
                include_dashboard=True if address is None else None,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except ValueError:
            raise
        except Exception as error:  # Ray has no exception class for a node that does not start
            refused = isinstance(error, ray.exceptions.AuthenticationError) or "InvalidAuthToken" in captured()
            if refused or str(address).startswith("ray://"):
                # Ray's client port gives no reason, and a refused token is the usual one.
                what = "refuses the token" if refused else "refuses the connection"
                raise ConnectionError(
                    f"the Ray cluster at {address} {what}; RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or the file "
                    "$RAY_AUTH_TOKEN_PATH, by default ~/.ray/auth_token) must be the cluster's."
                ) from None
            where = f"join the Ray cluster at {address}" if address else "start Ray on this machine"
            raise ConnectionError(f"cannot {where}: {shown((str(error).splitlines() or [repr(error)])[0])}") from None


@contextmanager
def _caught_stderr() -> Iterator[Callable[[], str]]:
    """Capture stderr of the process, including Ray's C++ code, which reports a refused token only there.

    The captured text is written to stderr if the block succeeds. Yields a function that returns the text so far.
    """
    with tempfile.TemporaryFile() as file:
        original = os.dup(2)
        os.dup2(file.fileno(), 2)

        def captured() -> str:
            return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")

        try:
            yield captured
        finally:
            os.dup2(original, 2)
            os.close(original)
        os.write(2, captured().encode())


def _check_address(address: str) -> None:
    """Raise ConnectionError if nothing listens at HOST:PORT or ray://HOST:PORT; Ray itself would try for two minutes.

    Raises ValueError on any other kind of address.
    """
    if address in ("auto", "local"):
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or not port or parts.scheme not in ("", "ray") or set("@?#") & set(address):
        raise ValueError(
            f"--address (or $RAY_ADDRESS) must be auto, HOST:PORT or ray://HOST:PORT, got {shown_url(address)}; an "
            "http:// address is that of `ray job submit`."
        )
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}); check --address, or leave it out to start Ray here."
        ) from None


Resources = Mapping[str, float]


def cluster_nodes() -> list[Resources]:
    """Resources of every live node of the cluster that this process has joined."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def resolve_gpus(asked: float | None, nodes: Sequence[Resources]) -> float:
    """GPUs of a worker: as given, else 1 if any node has a GPU, else 0."""
    if asked is not None:
        return asked
    return 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0


def count_workers(nodes: Sequence[Resources], workers: Workers) -> int:
    """How many such workers the nodes can hold, each on one node; `workers.number` is ignored."""
    asked = {name: need for name, need in workers.needs.items() if need > 0}
    return sum(min(int(node.get(name, 0) / need + 1e-9) for name, need in asked.items()) for node in nodes)


def count_trials(nodes: Sequence[Resources], workers: Workers) -> int:
    """How many trials of `workers` the nodes can hold at once; at least 1, as a cluster may grow when a trial waits."""
    return max(1, count_workers(nodes, workers) // workers.number) * workers.trials


def describe_shortage(nodes: Sequence[Resources], workers: Workers) -> list[str]:
    """Reasons why the nodes cannot hold all of `workers` at once, one clause each; empty if they can."""
    lines = []
    for name, need in workers.needs.items():
        have = sum(node.get(name, 0) for node in nodes)
        if need * workers.number > have:
            total = f"{need * workers.number:g} {name}s ({workers.number} workers)"
            lines.append(f"a trial asks for {total}, the cluster has {have:g}")
    found = count_workers(nodes, workers)
    if not lines and found < workers.number:
        asked = " and ".join(f"{need:g} {name}s" for name, need in workers.needs.items() if need > 0)
        largest = " and ".join(f"{max(node.get(name, 0) for node in nodes):g} {name}s" for name in workers.needs)
        lines.append(
            f"a worker asks for {asked} on one node, the largest has {largest}: {found} of a trial's {workers.number} "
            "workers fit"
        )
    return lines
