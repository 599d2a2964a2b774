"""A trial's last checkpoint in the storage, found by the trial's id alone.

Each checkpoint is a folder of its own; an index, written last, names the newest complete one. Those of one lease lie
in a folder of its generation, with an index of their own: a driver that has lost its lease cannot touch what its
successor writes. The highest generation that has an index counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tune.storage.files import Storage
from tune.storage.temporary import temporary_folder
from tune.storage.uris import is_address

_INDEX = "checkpoint.json"
_EPOCH = "epoch-"
_LEASE = "lease-"


def keep_checkpoint(trials: str, trial_id: str, epoch: int, folder: Path, generation: int = 0) -> str:
    """Store a checkpoint of a trial below the address `trials`; returns its address. Removes the one before.

    `generation`: of the lease under which the trial runs; 0 without one.
    """
    storage = Storage(trials)
    place, name = _place(trial_id, generation), f"{_EPOCH}{epoch:06d}"
    earlier = [each for each in _generations(storage, trial_id) if each < generation]
    known = storage.read_json(f"{place}/{_INDEX}")
    storage.upload(folder, f"{place}/{name}")
    storage.write_json(f"{place}/{_INDEX}", {"epoch": epoch, "folder": name})
    if known is not None and known["folder"] != name:
        storage.remove(f"{place}/{known['folder']}")
    for each in earlier:
        _remove(storage, trial_id, each)
    return f"{storage.uri}/{place}/{name}"


def newest_checkpoint(trials: str, trial_id: str) -> str:
    """Address of a trial's newest complete checkpoint; empty if it has none."""
    storage = Storage(trials)
    for generation in sorted(_generations(storage, trial_id), reverse=True):
        place = _place(trial_id, generation)
        known: dict[str, Any] | None = storage.read_json(f"{place}/{_INDEX}")
        if known is not None:
            return f"{storage.uri}/{place}/{known['folder']}"
    return ""


def is_checkpoint(name: str) -> bool:
    """Whether a folder of this name is one checkpoint of a trial."""
    return name.startswith(_EPOCH)


def _place(trial_id: str, generation: int) -> str:
    return f"{trial_id}/{_LEASE}{generation:06d}" if generation else trial_id


def _generations(storage: Storage, trial_id: str) -> list[int]:
    """The generations with which something was stored; 0 is of searches before there were any."""
    names = storage.names(trial_id)
    found = [int(name.removeprefix(_LEASE)) for name in names if name.startswith(_LEASE)]
    return found + [0] * (_INDEX in names)


def _remove(storage: Storage, trial_id: str, generation: int) -> None:
    """Remove the checkpoints of one generation."""
    if generation:
        storage.remove(_place(trial_id, generation))
        return
    for name in storage.names(trial_id):
        if name.startswith(_EPOCH):
            storage.remove(f"{trial_id}/{name}")
    storage.remove_file(f"{trial_id}/{_INDEX}")


@contextmanager
def opened(checkpoint: str) -> Iterator[Path | None]:
    """A local folder with the files of a checkpoint, as long as the block runs; None for the empty address."""
    if not checkpoint:
        yield None
        return
    if not is_address(checkpoint):
        yield Path(checkpoint)
        return
    trial, _, name = checkpoint.rpartition("/")
    with temporary_folder() as temporary:
        Storage(trial).download(name, temporary)
        yield temporary
