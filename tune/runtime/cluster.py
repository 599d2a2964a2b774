"""Joining a Ray cluster or starting one on this machine, and how many workers its nodes hold."""

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

import ray
import ray.exceptions

from tune.settings.workers import Workers

_CONNECT_SECONDS = 5.0


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine, dashboard included for Ray Train's cleaner.

    For the main thread: what Ray starts here ends with the thread that started it. Raises ConnectionError or
    ValueError, in one line, where that is impossible.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is not None:
        _check_address(address)
    with _caught_stderr() as said:
        try:
            ray.init(
                address=address or "local",
                include_dashboard=True if address is None else None,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except ValueError:
            raise
        except Exception as error:  # a node that does not start raises no class of its own
            refused = isinstance(error, ray.exceptions.AuthenticationError) or "InvalidAuthToken" in said()
            if refused or str(address).startswith("ray://"):
                # Ray's client port gives no reason, and a refused token is the usual one.
                what = "refuses the token" if refused else "does not let us in"
                raise ConnectionError(
                    f"the Ray cluster at {address} {what}; RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or the file "
                    "$RAY_AUTH_TOKEN_PATH, by default ~/.ray/auth_token) must be the cluster's."
                ) from None
            where = f"join the Ray cluster at {address}" if address else "start Ray on this machine"
            raise ConnectionError(f"cannot {where}: {(str(error).splitlines() or [repr(error)])[0]}") from None


@contextmanager
def _caught_stderr() -> Iterator[Callable[[], str]]:
    """Hold back what the process writes to stderr, Ray's C++ side included, which says a token's refusal there alone.

    Where the block ends well, it is written after all.
    """
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def said() -> str:
            return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        os.write(2, said().encode())


def _check_address(address: str) -> None:
    """Raise ConnectionError where nothing listens at HOST:PORT or ray://HOST:PORT: Ray itself tries for two minutes.

    Raises ValueError on another kind of address.
    """
    if address in ("auto", "local"):
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme not in ("", "ray") or not host or not port:
        raise ValueError(
            f"--address (or $RAY_ADDRESS) must be auto, HOST:PORT or ray://HOST:PORT, got {address}; an http:// "
            "address is that of `ray job submit`."
        )
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}); check --address, or leave it out to start Ray here."
        ) from None


Resources = Mapping[str, float]


def cluster_nodes() -> list[Resources]:
    """Resources of every living node of the cluster that this process has joined."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def resolve_gpus(asked: float | None, nodes: Sequence[Resources]) -> float:
    """GPUs of a worker: as asked for; else one where any node has one."""
    if asked is not None:
        return asked
    return 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0


def count_workers(nodes: Sequence[Resources], workers: Workers) -> int:
    """Workers of this kind that the nodes hold, each whole on one node; their `number` does not matter."""
    asked = {name: need for name, need in workers.needs.items() if need > 0}
    return sum(min(int(node.get(name, 0) / need + 1e-9) for name, need in asked.items()) for node in nodes)


def count_trials(nodes: Sequence[Resources], workers: Workers) -> int:
    """Trials of `workers` that the nodes hold at once, at least 1: a cluster may grow once something waits."""
    return max(1, count_workers(nodes, workers) // workers.number)


def describe_shortage(nodes: Sequence[Resources], workers: Workers) -> list[str]:
    """Why the nodes cannot hold all of `workers` at once, a clause each; empty where they can."""
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
            "workers find a place"
        )
    return lines
