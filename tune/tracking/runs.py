"""Reads a run back from MLflow, with everything that is needed to repeat it."""

import ast
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dskd.config import RunConfig, Selection, TeacherSource
from tune.storage.uris import LOCAL_RESULTS

TEACHER = "dskd.teacher"
"""Tag that says whether the teacher was trained."""
UNTRAINED = "random (untrained)"


class TrackedRun(NamedTuple):
    """A run as recorded in MLflow."""

    run_id: str
    config: RunConfig
    unknown_fields: tuple[str, ...]
    """Configuration fields newer than the run; they have their defaults."""
    category: str
    teacher_weights: str
    """hub, random or the name of a file."""
    textures: str
    """Name of the folder of texture images for the synthetic defects, or drawn."""
    selection: Selection
    data_sha256: str
    """Fingerprint of the training and validation images; empty if not recorded."""
    revision: str
    """Git commit of the code; empty if not recorded."""


def run_tags(entry: str, name: str, selection: Selection, teacher: TeacherSource, revision: str) -> dict[str, str]:
    """Tags of every run that the entry (such as tune/search.py) writes under an experiment's name."""
    return {
        "dskd.search": name,
        "dskd.selection": selection,
        TEACHER: UNTRAINED if teacher.is_untrained else "pretrained",
        "dskd.optuna": importlib.metadata.version("optuna"),
        "mlflow.source.name": entry,
        "mlflow.source.git.commit": revision,
    }


def tracked_run(uri: str, run_id: str) -> TrackedRun:
    """Read a trial of a search, or a training, from the tracking server at `uri`.

    Raises ValueError if there is no such run or if it is another kind of run.
    """
    from tune.tracking.client import params_and_tags

    params, tags = params_and_tags(uri, run_id)
    if not params or "dskd.category" not in tags:
        raise ValueError(
            f"run {run_id} is no training: it has no parameters or no category; name a trial of a search "
            "(its champion is in the parent's tag dskd.champion_run) or a run of tune/train.py."
        )
    config = config_of(params)
    return TrackedRun(
        run_id=run_id,
        config=config,
        unknown_fields=tuple(name for name, value in config.flat().items() if name not in params and value is not None),
        category=tags["dskd.category"],
        teacher_weights=params.get("teacher_weights", ""),
        textures=params.get("textures", "drawn"),
        selection="oracle" if tags.get("dskd.selection") == "oracle" else "val",
        data_sha256=tags.get("dskd.data_sha256", ""),
        revision=tags.get("mlflow.source.git.commit", ""),
    )


def config_of(params: Mapping[str, str]) -> RunConfig:
    """The configuration logged as texts; other parameters are ignored.

    Raises ValueError naming a field whose text is not a valid value.
    """
    fields = RunConfig().flat()
    values = {}
    for name in (name for name in fields if name in params):
        text = params[name]
        try:
            values[name] = text if isinstance(fields[name], str) else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"parameter {name} of the run is {text!r}, which is no value of that field.") from None
    return RunConfig().with_values(values)


def tracking_store(tracking_uri: str | None, storage: str | None) -> str:
    """The store to read runs from: as given, else $MLFLOW_TRACKING_URI, else the file in the local storage folder.

    Raises ValueError if there is none.
    """
    if found := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return found
    file = Path(storage or LOCAL_RESULTS).absolute() / "mlflow.db"
    if not file.is_file():
        raise ValueError(f"--from-run needs --tracking-uri, the MLflow store of that run: there is no {file}.")
    return f"sqlite:///{file}"


def code_revision() -> str:
    """Git commit of this checkout; empty without git, as in a Ray job's working_dir."""
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()
