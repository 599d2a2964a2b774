"""One search of a name at a time: a lease in its storage, which its owner renews.

Two drivers would write over each other's snapshots of Tune. No clocks are compared: whoever finds a lease
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
_RENEWAL = 5.0
"""Seconds between two renewals."""
_UNRENEWED = 6
"""After so many times that span without a renewal the owner counts as dead."""
_SETTLING = 1.0
"""Seconds after which the last of several who took a lease at once is known."""


@contextmanager
def only_search(storage: Storage, name: str, on_loss: Callable[[str], None]) -> Iterator[None]:
    """Hold the lease of the search whose storage this is; given back at the end.

    A lease whose owner is known to be dead on this machine is taken over at once, that of another machine
    once it has not been renewed for half a minute. Raises ValueError where another search holds it.
    `on_loss` is called, from a thread, with the reason why this search must end: another took the lease
    over while this process was stopped or cut off.
    """
    if other := _present(storage):
        _outlive(storage, other, name)
    mine = {"owner": secrets.token_hex(8), "machine": _machine(), "process": _process("self"), "renewals": 0}
    storage.write_json(_FILE, mine)
    time.sleep(_SETTLING)
    if (now := _present(storage)) is None or now["owner"] != mine["owner"]:
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
        if (now := _present(storage)) and now["owner"] == mine["owner"]:
            storage.write_json(_FILE, mine | {"owner": ""})


def _present(storage: Storage) -> dict[str, Any] | None:
    """The lease that somebody holds."""
    lease = storage.read_json(_FILE)
    return lease if lease and lease.get("owner") else None


def _outlive(storage: Storage, other: dict[str, Any], name: str) -> None:
    """Return once the owner of a lease is dead.

    Raises ValueError where it lives.
    """
    if other["machine"] == _machine():
        if _process(other["process"].split()[0]) != other["process"]:
            return
        raise ValueError(_refusal(name, other))
    unrenewed = 0
    while unrenewed < _UNRENEWED:
        time.sleep(_RENEWAL)
        asked = time.monotonic()
        now = _present(storage)
        if now is None:
            return
        if now != other:
            raise ValueError(_refusal(name, other))
        # While the storage is away nobody can renew.
        unrenewed = unrenewed + 1 if time.monotonic() - asked < _RENEWAL else 0


def _renew(
    storage: Storage, mine: dict[str, Any], name: str, has_ended: threading.Event, on_loss: Callable[[str], None]
) -> None:
    while not has_ended.wait(_RENEWAL):
        try:
            now = _present(storage)
            if now is None or now["owner"] != mine["owner"]:
                on_loss(f"another search has taken {name!r} over; this one ends")
                return
            mine["renewals"] += 1
            storage.write_json(_FILE, mine)
        except StorageError:  # nobody else can take it either
            continue


def _refusal(name: str, lease: dict[str, Any]) -> str:
    machine, process = lease["machine"].split()[0], lease["process"].split()[0]
    return (
        f"a search {name!r} runs already, as process {process} on {machine}; "
        "wait for it, end it, or give this one another --name."
    )


def _machine() -> str:
    """Host name and boot of this machine: a name alone may be reused, a boot is shared by containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()} {boot}"


def _process(pid: str) -> str:
    """A process's id and start, which name it for good; empty where it does not run."""
    try:
        number, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(" (")
        state, *fields = rest.rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else f"{number} {fields[18]}"
