"""What a search reads, by fingerprint: its trials are compared with each other only as long as that is the same.

At its beginning the search records names, sizes, times and contents of all files. Later names, sizes and times are
looked at, and the contents of those whose time alone has changed, as it does in a copy. The contents at an address are
not read here: each trial says what it was trained on, and that is compared too.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dskd.config import LayoutName, TeacherSource
from dskd.data.datasets import fingerprint, read_category
from dskd.data.exclusions import without_excluded
from tune.storage.files import Storage
from tune.storage.staging import files_of
from tune.storage.uris import is_address

_FOLDER = "inputs"
_MAX_THREADS = 8
_MAX_NAMED = 3


class InputsChangedError(ValueError):
    """What a search reads is not what it was begun with; a line for each kind of input."""


class Inputs(NamedTuple):
    """Where a search reads from."""

    data: str
    """Absolute folder, or an address."""
    layout: LayoutName
    exclude: tuple[str, ...]
    teacher: TeacherSource
    textures: str
    """Absolute folder; empty: none."""


class Mark(NamedTuple):
    """What is known of a file."""

    num_bytes: int
    modified_ns: int
    sha256: str = ""
    """Empty: its content was not read."""


Marks = Mapping[str, Mapping[str, Mark]]
"""By kind of input (images, teacher, textures) and name."""


class CategoryInputs:
    """The recorded inputs of one category of a search."""

    def __init__(self, storage: Storage, name: str, category: str, inputs: Inputs) -> None:
        """`name`: of the search, for its messages."""
        self._storage, self._name, self._category, self._inputs = storage, name, category, inputs
        self._file = f"{_FOLDER}/{category}/files.json"

    def check(self) -> Marks:
        """Compare what is there now with what was recorded; returns what to record.

        Raises InputsChangedError if it differs; ValueError or OSError if it cannot be read.
        """
        known = _from_document(self._storage.read_json(self._file))
        paths = self._paths()
        now = self._listed(paths)
        if known is None:
            return {kind: _read(marks, paths.get(kind, {}), marks) for kind, marks in now.items()}
        found: dict[str, Mapping[str, Mark]] = {}
        lines = []
        for kind in sorted({*now, *known}):
            before, after = known.get(kind, {}), now.get(kind, {})
            touched = [
                name
                for name, mark in after.items()
                if name in before
                and before[name].num_bytes == mark.num_bytes
                and before[name].modified_ns != mark.modified_ns
            ]
            seen = _read(after, paths.get(kind, {}), touched)
            if said := _difference(before, seen):
                lines.append(
                    f"search {self._name!r} of {self._category} was begun with other {kind}: {said}; restore what was "
                    f"there, or begin a new search: --name {self._name}-2."
                )
            found[kind] = {
                name: mark._replace(sha256=mark.sha256 or before.get(name, mark).sha256) for name, mark in seen.items()
            }
        if lines:
            raise InputsChangedError("\n".join(lines))
        return found

    def verify(self) -> None:
        """`check` once more, before something else is compared; nothing happens if nothing was recorded."""
        if self._storage.read_json(self._file) is not None:
            self.check()

    def record(self, marks: Marks) -> None:
        """Write down what `check` has returned."""
        document = {kind: {name: list(mark) for name, mark in files.items()} for kind, files in marks.items()}
        self._storage.write_json(self._file, {"schema": 1, "files": document})

    def _paths(self) -> dict[str, dict[str, Path]]:
        """Path of each local file by kind and name."""
        inputs = self._inputs
        found: dict[str, dict[str, Path]] = {}
        if not is_address(inputs.data):
            root = Path(inputs.data)
            category = without_excluded(read_category(root, self._category, inputs.layout), inputs.exclude)
            samples = (*category.train, *category.validation, *category.test)
            files = [path for sample in samples for path in (sample.path, sample.mask) if path is not None]
            found["images"] = {_below(path, root): path for path in files}
        sources = inputs.teacher.by_backbone.values() or [inputs.teacher]
        if weights := {Path(each.weights).name: Path(each.weights) for each in sources if each.is_file}:
            found["teacher"] = weights
        if inputs.textures:
            from dskd.data.defects import choose_textures  # slow, and few searches have any

            folder = Path(inputs.textures)
            found["textures"] = {_below(path, folder): path for path in choose_textures(folder)}
        return found

    def _listed(self, paths: Mapping[str, Mapping[str, Path]]) -> dict[str, dict[str, Mark]]:
        found = {}
        for kind, files in paths.items():
            stats = {name: path.stat() for name, path in files.items()}
            found[kind] = {name: Mark(stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
        if is_address(self._inputs.data):
            stored = files_of(self._inputs.data, self._category, self._inputs.layout)
            found["images"] = {file.name: Mark(file.num_bytes, file.modified_ns) for file in stored}
        return found


class TrainedOn:
    """Fingerprints that the trials of a category report of what they have read, by kind; the first one counts."""

    def __init__(self, storage: Storage, category: str) -> None:
        self._storage, self._category = storage, category
        self._file = f"{_FOLDER}/{category}/trained.json"
        self._known: dict[str, str] = dict(storage.read_json(self._file) or {})

    def check(self, told: Mapping[str, str]) -> None:
        """Compare a trial's fingerprints with those of the trials before; those of a new kind are recorded.

        Raises InputsChangedError if one differs.
        """
        changed = [kind for kind, value in told.items() if self._known.get(kind, value) != value]
        if changed:
            raise InputsChangedError(
                f"{self._category}: what trials read has changed since the search began: {', '.join(changed)}; restore "
                "what was there, or begin a new search with another --name."
            )
        if new := {kind: value for kind, value in told.items() if kind not in self._known}:
            self._known |= new
            self._storage.write_json(self._file, self._known)


def _read(marks: Mapping[str, Mark], paths: Mapping[str, Path], names: Iterable[str]) -> dict[str, Mark]:
    """The marks with the contents of the named files that are local."""
    wanted = [name for name in names if name in paths]
    with ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="fingerprints") as pool:
        digests = dict(zip(wanted, pool.map(lambda name: _digest(paths[name], *marks[name][:2]), wanted), strict=True))
    return {name: mark._replace(sha256=digests.get(name, "")) for name, mark in marks.items()}


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, num_bytes: int, modified_ns: int) -> str:
    """Fingerprint of a file of that size and time; all categories have the same teacher, which may be large."""
    return fingerprint([path])


def _difference(before: Mapping[str, Mark], now: Mapping[str, Mark]) -> str:
    """What has changed, in a few words; empty if nothing is known to have."""
    parts = {
        "changed": [name for name in before.keys() & now.keys() if _differ(before[name], now[name])],
        "added": list(now.keys() - before.keys()),
        "removed": list(before.keys() - now.keys()),
    }
    return ", ".join(f"{len(names)} {what} ({_few(names)})" for what, names in parts.items() if names)


def _differ(before: Mark, now: Mark) -> bool:
    if before.num_bytes != now.num_bytes:
        return True
    return bool(before.sha256 and now.sha256) and before.sha256 != now.sha256


def _few(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:_MAX_NAMED]) + (", …" if len(names) > _MAX_NAMED else "")


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _from_document(document: Mapping[str, Any] | None) -> dict[str, dict[str, Mark]] | None:
    if document is None:
        return None
    return {kind: {name: Mark(*mark) for name, mark in files.items()} for kind, files in document["files"].items()}
