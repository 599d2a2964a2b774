"""Only one running search per name: its driver holds a lease in the storage and renews it.

Two drivers would write to the same study and the same runs. Clocks are not compared: a process that finds a lease
watches whether it is renewed.

A driver that was stopped or cut off may find its lease taken by another. It knows so at its next renewal, within 5 s
of going on, and ends. Before each write to MLflow it looks whether its last renewal began less than 20 s ago, as
nobody takes a lease that was renewed within 30 s; before each change of the study the lease itself is read. What is
left is a process that is stopped between this look and its write, for longer than it takes another to take over: it
finishes that one write to the study or to MLflow. Files are out of its reach: checkpoints and champions lie in folders
of the lease's generation, and the lease and the champions' records are replaced by `Storage.replace_json`, which writes
only over what was looked at.
"""

import os
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
_RENEW_SECONDS = float(os.environ.get("DSKD_LEASE_SECONDS", "5"))
"""Seconds between two renewals; the same in all processes that use a storage."""
_MAX_MISSED_RENEWALS = 6
"""Number of missed renewals after which the owner counts as dead."""
_SURE_SECONDS = 4 * _RENEW_SECONDS
"""Seconds after the beginning of a renewal in which nobody can have taken the lease."""
_SETTLE_SECONDS = 1.0
"""Seconds to wait after taking the lease; of several processes that took it at once, the last one then holds it."""


_LOSS_SECONDS = 60.0
"""Seconds in which the renewing thread finds that the lease is lost, and ends the process."""


class LeaseLostError(RuntimeError):
    """Another search has taken the lease, so this one must not write any more."""


class Lease:
    """The right of one process to search under a name, once `take` has returned."""

    def __init__(self, storage: Storage, name: str, on_loss: Callable[[str], None]) -> None:
        """`on_loss` is called from a thread, with the reason, if another takes the lease."""
        self._storage, self._name, self._on_loss = storage, name, on_loss
        self.owner = secrets.token_hex(8)
        self.generation = 0
        """How often the lease of this name was taken, this time included; 0 before."""
        self._renewals = 0
        self._renewed = -_SURE_SECONDS
        self._has_ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        """Take the lease and renew it from now on.

        That of a dead process of this machine is taken at once, that of another machine or container after half a
        minute without renewal. Raises ValueError if another search holds it.
        """
        known = self._storage.read_json(_FILE) or {}
        if known.get("owner"):
            _wait_for_owner_death(self._storage, known, self._name)

        def taken(now: dict[str, Any] | None) -> dict[str, Any]:
            now = now or {}
            if now.get("owner") not in (None, "", self.owner) and now != known:
                raise ValueError(_refusal(self._name, now))  # of several that waited, another was first
            if now.get("owner") != self.owner:
                self.generation = int(now.get("generation", 0)) + 1
            return self._document()

        began = _clock()
        self._storage.replace_json(_FILE, taken)
        time.sleep(_SETTLE_SECONDS)  # where the storage cannot write conditionally
        now = _current_lease(self._storage)
        if now is None or now["owner"] != self.owner:
            raise ValueError(_refusal(self._name, now or self._document()))
        self._renewed = began
        self._renewing.start()

    def is_sure(self) -> bool:
        """Whether nobody can have taken the lease, as it was renewed a moment ago."""
        return not self._has_ended.is_set() and _clock() - self._renewed < _SURE_SECONDS

    def check(self) -> None:
        """Read the lease; if another has it, wait until `on_loss` has ended this process.

        Raises LeaseLostError if it does not.
        """
        if not is_held_by(self._storage, self.owner):
            wait_for_the_end()
            raise LeaseLostError(f"another search has taken {self._name!r} over; this one ends")

    def give_back(self) -> None:
        """Let others take the lease at once; nothing happens if another has it."""
        self._has_ended.set()
        if self._renewing.is_alive():
            self._renewing.join()
        self._replace_own(self._storage, self._document() | {"owner": ""})

    def _renew(self) -> None:
        storage = self._storage.tried_once()  # the next renewal is the next try
        while not self._has_ended.wait(_RENEW_SECONDS):
            began = _clock()
            self._renewals += 1
            try:
                is_own = self._replace_own(storage, self._document())
            except StorageError:
                continue
            if not is_own:
                self._has_ended.set()
                self._on_loss(f"another search has taken {self._name!r} over; this one ends")
                return
            self._renewed = began

    def _replace_own(self, storage: Storage, document: dict[str, Any]) -> bool:
        """Replace the lease if it is this process's; returns whether it is."""
        is_own = False

        def replaced(now: dict[str, Any] | None) -> dict[str, Any] | None:
            nonlocal is_own
            is_own = now is not None and now.get("owner") == self.owner
            return document if is_own else None

        storage.replace_json(_FILE, replaced)
        return is_own

    def _document(self) -> dict[str, Any]:
        return {
            "owner": self.owner,
            "generation": self.generation,
            "machine": _machine(),
            "namespace": _namespace(),
            "process": _process("self"),
            "renewals": self._renewals,
        }


def wait_for_the_end() -> None:
    """Wait, in a search that has lost its lease, until its renewing thread has found it too and ended the process."""
    threading.Event().wait(_LOSS_SECONDS)


@contextmanager
def only_search(storage: Storage, name: str, on_loss: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lease of the search in this storage as long as the block runs; errors as `Lease.take`."""
    lease = Lease(storage, name, on_loss)
    lease.take()
    try:
        yield lease
    finally:
        lease.give_back()


def lease_generation(storage: Storage) -> int:
    """Number of the lease that was taken last, as read now; 0 if none was."""
    return int((storage.read_json(_FILE) or {}).get("generation", 0))


def is_held_by(storage: Storage, owner: str) -> bool:
    """Whether the lease is that owner's, as read now."""
    now = _current_lease(storage)
    return now is not None and now["owner"] == owner


def _current_lease(storage: Storage) -> dict[str, Any] | None:
    """The current lease; None if nobody holds it."""
    lease = storage.read_json(_FILE)
    return lease if lease and lease.get("owner") else None


def _wait_for_owner_death(storage: Storage, other: dict[str, Any], name: str) -> None:
    """Wait until the lease's owner is known to be dead.

    Process ids say something only in the namespace that they are from: containers have their own, with the same host
    name and boot id. Raises ValueError if it is alive.
    """
    if other["machine"] == _machine() and other.get("namespace") == _namespace() != "":
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


def _namespace() -> str:
    """The namespace of this process's id, such as pid:[4026531836]; empty if unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _clock() -> float:
    """Seconds, which go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _process(pid: str) -> str:
    """Id and start time of a process, which identify it uniquely; empty if it is not running."""
    try:
        number, _, rest = Path(f"/proc/{pid}/stat").read_text().partition(" (")
        state, *fields = rest.rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else f"{number} {fields[18]}"
