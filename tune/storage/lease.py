"""Only one running search per name: its driver holds a lease in the storage and renews it.

Two drivers would overwrite each other's Tune snapshots. Clocks are not compared: a process that finds a lease
watches whether it is renewed.
"""

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tune.storage.files import Storage, StorageError

_FILE = "lease.json"
_RENEW_SECONDS = 5.0
"""Seconds between two renewals."""
_MAX_MISSED_RENEWALS = 6
"""Number of missed renewals after which the owner counts as dead."""
_SETTLE_SECONDS = 1.0
"""Seconds to wait after taking the lease; of several processes that took it at once, the last one then holds it."""


@contextmanager
def only_search(storage: Storage, name: str, on_loss: Callable[[str], None]) -> Iterator[None]:
    """Hold the lease of the search in this storage; released at the end.

    The lease of a dead process of this machine is taken over at once, that of another machine after half a minute
    without renewal. Raises ValueError if another search holds it. `on_loss` is called from a thread, with the
    reason, if this search must end because another took the lease while this process was stopped or cut off.
    """
    if other := _current_lease(storage):
        _wait_for_owner_death(storage, other, name)
    mine = {"owner": secrets.token_hex(8), "machine": _machine(), "process": _process("self"), "renewals": 0}
    storage.write_json(_FILE, mine)
    time.sleep(_SETTLE_SECONDS)
    if (now := _current_lease(storage)) is None or now["owner"] != mine["owner"]:
        raise ValueError(_refusal(name, now or mine))
    has_ended = threading.Event()
    renewing = threading.Thread(
        target=_renew, args=(storage, mine, name, has_ended, on_loss), name="lease", daemon=True
    )
    renewing.start()
    try:
        yield
    finally:
        has_ended.set()
        renewing.join()
        if (now := _current_lease(storage)) and now["owner"] == mine["owner"]:
            storage.write_json(_FILE, mine | {"owner": ""})


def _current_lease(storage: Storage) -> dict[str, Any] | None:
    """The current lease; None if nobody holds it."""
    lease = storage.read_json(_FILE)
    return lease if lease and lease.get("owner") else None


def _wait_for_owner_death(storage: Storage, other: dict[str, Any], name: str) -> None:
    """Wait until the lease's owner is known to be dead.

    Raises ValueError if it is alive.
    """
    if other["machine"] == _machine():
        if _process(other["process"].split()[0]) != other["process"]:
            return
        raise ValueError(_refusal(name, other))
    missed = 0
    while missed < _MAX_MISSED_RENEWALS:
        time.sleep(_RENEW_SECONDS)
        read_started = time.monotonic()
        now = _current_lease(storage)
        if now is None:
            return
        if now != other:
            raise ValueError(_refusal(name, other))
        # While the storage does not answer, nobody can renew.
        missed = missed + 1 if time.monotonic() - read_started < _RENEW_SECONDS else 0


def _renew(
    storage: Storage, mine: dict[str, Any], name: str, has_ended: threading.Event, on_loss: Callable[[str], None]
) -> None:
    while not has_ended.wait(_RENEW_SECONDS):
        try:
            now = _current_lease(storage)
            if now is None or now["owner"] != mine["owner"]:
                on_loss(f"another search has taken {name!r} over; this one ends")
                return
            mine["renewals"] += 1
            storage.write_json(_FILE, mine)
        except StorageError:  # nobody else can take the lease either
            continue


def _refusal(name: str, lease: dict[str, Any]) -> str:
    machine, process = lease["machine"].split()[0], lease["process"].split()[0]
    return (
        f"a search {name!r} runs already, as process {process} on {machine}; "
        "wait for it, end it, or give this one another --name."
    )


def _machine() -> str:
    """Host name and boot id of this machine: host names are reused, and containers share a boot id."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()} {boot}"


def _process(pid: str) -> str:
    """Id and start time of a process, which identify it uniquely; empty if it is not running."""
    try:
        number, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(" (")
        state, *fields = rest.rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else f"{number} {fields[18]}"
