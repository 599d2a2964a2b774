"""Search spaces as TOML files: changes to the default space, for all categories or for single ones."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dskd.config import RunConfig
from tune.settings.space import Choice, Dimension, Range, Space, build_space, field_kind, usual_teacher

_SECTIONS = ("preset", "category")


class SpaceFile(NamedTuple):
    """Entries of a file; those of a preset override the general ones, those of a category override both."""

    path: Path
    general: Mapping[str, Dimension]
    by_preset: Mapping[str, Mapping[str, Dimension]]
    by_category: Mapping[str, Mapping[str, Dimension]]

    def check_names(self, presets: Sequence[str], categories: Sequence[str]) -> None:
        """Raise ValueError on a section for an unknown preset or category."""
        for section, named, known in (
            ("preset", self.by_preset, presets),
            ("category", self.by_category, categories),
        ):
            if unknown := [name for name in named if name not in known]:
                raise ValueError(
                    f"{self.path}: [{section}.{unknown[0]}] names no {section} of this search; known: "
                    f"{', '.join(known)}."
                )

    def space(
        self,
        bases: Mapping[str, RunConfig],
        category: str,
        with_teacher: Callable[[RunConfig, str, str], RunConfig] = usual_teacher,
    ) -> Space:
        """The space of one category; categories without a section share one. `with_teacher` as in `build_space`.

        Raises ValueError with file and entry if a value is out of its field's range or has no effect.
        """
        mine = self.by_category.get(category, {})
        entries = {preset: {**self.general, **self.by_preset.get(preset, {}), **mine} for preset in bases}
        try:
            return build_space(bases, entries, with_teacher)
        except ValueError as error:
            where = f"[category.{category}]: " if mine else ""
            raise ValueError(f"{self.path}: {where}{error}") from None


def read_space(path: Path) -> SpaceFile:
    """Read a TOML file; each entry is a field name with a value, a list of values or {low, high, log}.

    Raises ValueError with file and entry if the entry is unknown, has the wrong type or is an empty range.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--space {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}.") from None
    sections = {section: document.pop(section, {}) for section in _SECTIONS}
    for section, tables in sections.items():
        if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
            raise ValueError(f"{path}: {section} must be sections such as [{section}.NAME], got {tables!r}.")
    return SpaceFile(
        path,
        _entries(document, str(path)),
        *(
            {name: _entries(table, f"{path}: [{section}.{name}]") for name, table in tables.items()}
            for section, tables in sections.items()
        ),
    )


def _entries(table: Mapping[str, Any], where: str) -> dict[str, Dimension]:
    return {name: _dimension(name, value, f"{where}: {name}") for name, value in table.items()}


def _dimension(name: str, value: Any, where: str) -> Dimension:
    try:
        kind = field_kind(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if isinstance(value, dict):
        return _range(value, kind, where)
    options = value if isinstance(value, list) else [value]
    if not options:
        raise ValueError(f"{where}: an empty list leaves nothing to choose from.")
    read = tuple(_scalar(option, kind, where) for option in options)
    if len(set(read)) < len(read):
        raise ValueError(f"{where}: a value is repeated in {value!r}.")
    return Choice(read)


def _range(table: Mapping[str, Any], kind: type, where: str) -> Range:
    if kind not in (int, float):
        raise ValueError(f"{where}: values of type {kind.__name__} have no range; give a list of them.")
    if unknown := sorted(table.keys() - {"low", "high", "log"}):
        raise ValueError(f"{where}: a range has low, high and log, got {unknown[0]!r}.")
    if missing := sorted({"low", "high"} - table.keys()):
        raise ValueError(f"{where}: a range needs low and high, {missing[0]} is missing.")
    low, high = (_scalar(table[end], kind, where) for end in ("low", "high"))
    log = table.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"{where}: log must be true or false, got {log!r}.")
    if not low < high:
        raise ValueError(f"{where}: the range is empty: low {low} must be below high {high}.")
    if log and low <= 0:
        raise ValueError(f"{where}: a logarithmic range needs a positive low, got {low}.")
    return Range(low, high, log)


def _scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or value in (float("inf"), float("-inf")) or value != value:
        raise ValueError(f"{where}: expected values of type {kind.__name__}, got {value!r}.")
    return value
