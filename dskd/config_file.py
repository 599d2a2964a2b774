"""Configurations as TOML files: a section per part of `RunConfig`, and optionally the preset that they change."""

import tomllib
from pathlib import Path

import tomli_w

from dskd.config import RunConfig
from dskd.presets import PRESETS

_PRESET = "preset"


def read_config(path: Path, preset: str | None = None) -> RunConfig:
    """The configuration in a TOML file; what it leaves out is the preset's.

    `preset` stands above the file's own, which stands above "dskd".
    Raises ValueError naming the file, and the section and field where one is unknown, of the wrong type or out
    of range.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}.") from None
    own = document.pop(_PRESET, "dskd")
    if not isinstance(own, str) or own not in PRESETS:
        raise ValueError(f"{path}: preset must be one of {', '.join(PRESETS)}, got {own!r}.")
    sections = PRESETS[preset or own].to_dict()
    if unknown := sorted(set(document) - set(sections)):
        raise ValueError(f"{path}: unknown section {unknown[0]!r}; known: {', '.join([_PRESET, *sections])}.")
    for name, fields in document.items():
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: [{name}] must be a section of fields, got {name} = {fields!r}.")
        if unknown := sorted(set(fields) - set(sections[name])):
            raise ValueError(
                f"{path}: unknown field {unknown[0]!r} in [{name}]; known: {', '.join(sorted(sections[name]))}."
            )
        sections[name] |= fields
    try:
        return RunConfig.from_dict(sections)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_toml(config: RunConfig) -> str:
    """Every field of `config`; `read_config` makes the same of it, whatever the preset."""
    return tomli_w.dumps(config.to_dict())
