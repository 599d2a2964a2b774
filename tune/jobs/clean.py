"""What of a search's storage nobody needs any more: listed, and removed if asked for."""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from tune.settings.clean import CleanSettings
from tune.settings.entry import say
from tune.storage.champions import champion_categories, replaced_champions
from tune.storage.files import Storage, StorageError, open_search
from tune.storage.lease import only_search
from tune.study.records import TrialRecords
from tune.trial.checkpoints import is_checkpoint, newest_checkpoint

_OF_CHECKS = (".probe-", ".reach-")
"""Beginnings of the names of folders that a check removes at its end."""
_GROUPS = "groups"


class Leftover(NamedTuple):
    """A folder that nobody needs."""

    folder: str
    """Below the search's address."""
    why: str
    num_bytes: int


def clean(settings: CleanSettings) -> int:
    """List what nobody needs, and remove it with --delete; returns the exit code, 0.

    Raises ValueError or OSError, in one line, if there is no such search, or if it runs.
    """
    storage = open_search(settings.storage, settings.name)
    if not settings.delete:
        _tell(leftovers(storage), "would be removed; --delete does so")
        return 0
    with only_search(storage, settings.name, say):
        found = leftovers(storage)
        for each in found:
            storage.remove(each.folder)
        _tell(found, "removed")
    return 0


def leftovers(storage: Storage) -> list[Leftover]:
    """What of a search's storage nobody needs, while it does not run."""
    found: list[Leftover] = []
    for category in sorted(storage.names("workers")):
        found += _of_category(storage, category)
    for category in champion_categories(storage):
        found += _of_champions(storage, category)
    others = {name: "left by a check that was killed" for name in storage.names("") if name.startswith(_OF_CHECKS)}
    if _GROUPS in storage.names(""):
        others[_GROUPS] = "notes of worker groups that were killed"
    for name, why in others.items():
        found.append(Leftover(name, why, sum(file.num_bytes for file in storage.files(name))))
    return found


def _of_category(storage: Storage, category: str) -> Iterator[Leftover]:
    records = TrialRecords(storage, category)
    records.read()
    place = f"workers/{category}"
    sizes: dict[str, int] = {}
    for file in storage.files(place):
        for folder in PurePosixPath(file.name).parents:
            sizes[str(folder)] = sizes.get(str(folder), 0) + file.num_bytes
    for trial_id in sorted(storage.names(place)):
        if why := _why_not(records, trial_id):
            yield Leftover(f"{place}/{trial_id}", why, sizes.get(trial_id, 0))
            continue
        newest = newest_checkpoint(f"{storage.uri}/{place}", trial_id).removeprefix(f"{storage.uri}/{place}/")
        yield from _replaced(place, trial_id, newest, sizes)


def _of_champions(storage: Storage, category: str) -> Iterator[Leftover]:
    try:
        folders = replaced_champions(storage, category)
    except StorageError:  # a broken record: the search writes it anew
        return
    for folder in folders:
        yield Leftover(folder, "replaced by a newer champion", sum(file.num_bytes for file in storage.files(folder)))


def _why_not(records: TrialRecords, trial_id: str) -> str:
    """Why nothing of a trial is needed; empty if it is."""
    if trial_id in records:
        status = records[trial_id].status
        return {"pruned": "of a trial that was pruned", "failed": "of a trial that failed"}.get(status or "", "")
    is_fold = "-" in trial_id  # of a finalist; it has no record of its own
    return "of a trial that no record knows" if records.all and not is_fold else ""


def _replaced(place: str, trial_id: str, newest: str, sizes: Mapping[str, int]) -> Iterator[Leftover]:
    for folder, num_bytes in sorted(sizes.items()):
        if folder.startswith(f"{trial_id}/") and is_checkpoint(PurePosixPath(folder).name) and folder != newest:
            yield Leftover(f"{place}/{folder}", "replaced by a newer checkpoint", num_bytes)


def _tell(found: list[Leftover], done: str) -> None:
    for each in found:
        say(f"{each.folder}: {each.num_bytes / 1e6:.1f} MB, {each.why}")
    total = sum(each.num_bytes for each in found) / 1e6
    say(f"{len(found)} folders, {total:.1f} MB: {done if found else 'nothing to do'}")
