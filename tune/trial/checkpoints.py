"""A trial's last checkpoint in the storage, found by the trial's id alone.

Each checkpoint is a folder of its own; an index, written last, names the newest complete one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tune.storage.files import Storage
from tune.storage.uris import is_address

_INDEX = "checkpoint.json"


def keep_checkpoint(trials: str, trial_id: str, epoch: int, folder: Path) -> str:
    """Store a checkpoint of a trial below the address `trials`; returns its address. Removes the one before."""
    storage = Storage(trials)
    known = storage.read_json(f"{trial_id}/{_INDEX}")
    name = f"epoch-{epoch:06d}"
    storage.upload(folder, f"{trial_id}/{name}")
    storage.write_json(f"{trial_id}/{_INDEX}", {"epoch": epoch, "folder": name})
    if known is not None and known["folder"] != name:
        storage.remove(f"{trial_id}/{known['folder']}")
    return f"{storage.uri}/{trial_id}/{name}"


def newest_checkpoint(trials: str, trial_id: str) -> str:
    """Address of a trial's newest complete checkpoint; empty if it has none."""
    storage = Storage(trials)
    known = storage.read_json(f"{trial_id}/{_INDEX}")
    return f"{storage.uri}/{trial_id}/{known['folder']}" if known else ""


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
    with TemporaryDirectory(prefix="dskd-") as temporary:
        Storage(trial).download(name, Path(temporary))
        yield Path(temporary)
