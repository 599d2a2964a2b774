"""How an entry of `tune` joins a Ray cluster, or starts one on this machine."""

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

import ray
import ray.exceptions

from tune.settings.search import SearchSettings
from tune.trial.spec import TrialSpec

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


def worker_needs(cpus: float, gpus: float) -> dict[str, float]:
    """What a worker asks for, under Ray's names."""
    return {"CPU": cpus, "GPU": gpus}


def places(nodes: Sequence[Resources], needs: Resources) -> int:
    """Workers that the nodes hold."""
    asked = {name: need for name, need in needs.items() if need > 0}
    return sum(min(int(node.get(name, 0) / need + 1e-9) for name, need in asked.items()) for node in nodes)


def trials_at_once(nodes: Sequence[Resources], needs: Resources, num_workers: int) -> int:
    """Trials of so many workers that the nodes hold, at least 1: a cluster may grow once something waits."""
    return max(1, places(nodes, needs) // num_workers)


def concurrent_trials(spec: TrialSpec) -> int:
    """How many trials the cluster can hold at once as it is now, at least 1."""
    needs = worker_needs(spec.cpus_per_worker, spec.gpus_per_worker)
    return trials_at_once(cluster_nodes(), needs, spec.num_workers)


def gpus_per_worker(settings: SearchSettings, nodes: Sequence[Resources] | None = None) -> float:
    """As asked for; else one where the cluster has any."""
    if settings.gpus_per_worker is not None:
        return settings.gpus_per_worker
    return 1.0 if any(node.get("GPU", 0) >= 1 for node in (cluster_nodes() if nodes is None else nodes)) else 0.0


def trial_slots(settings: SearchSettings, nodes: Sequence[Resources]) -> int:
    """Trials that run at once: as many as are asked for, else as the nodes hold, at least 1."""
    needs = worker_needs(settings.cpus_per_worker, gpus_per_worker(settings, nodes))
    return settings.max_concurrent or trials_at_once(nodes, needs, settings.workers_per_trial)
