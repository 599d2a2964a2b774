"""The results file of a benchmark that trains: one finished run per line, which the same command continues."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Run = dict[str, Any]
"""Figures of a run, with the digest of everything that they depend on as `key` and the `command` that made it."""


def finished_runs(path: Path) -> dict[str, Run]:
    """The runs of a results file by key; an incomplete last line, of a kill, is removed from the file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        print(f"{path}: the last line was cut short, its run is repeated", file=sys.stderr)
        os.truncate(path, len(whole.encode()))
    return {run["key"]: run for run in map(json.loads, whole.splitlines())}


def add_run(path: Path, run: Run) -> None:
    """Append a finished run, on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(run, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def field_values(texts: Mapping[str, str]) -> dict[str, Any]:
    """Configuration fields of `--set`, each as JSON where it is JSON, else as plain text."""
    return {name: _value(text) for name, text in texts.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def print_commands(runs: Iterable[Run]) -> None:
    """Print the commands that made these runs, each once."""
    for command in dict.fromkeys(run["command"] for run in runs):
        print(f"    {command}")
