"""Detectors as registered models of MLflow: packed for serving, promoted if better, fetched by alias."""

import base64
import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

import dskd
from dskd.checkpoint import DetectorRecord
from tune.settings.search import Promote
from tune.storage.shown import printable
from tune.storage.temporary import temporary_folder
from tune.tracking.client import first_line
from tune.tracking.runs import TEACHER, UNTRAINED

MODEL_FOLDER = "model"
"""Artifact folder of a packed detector."""
CHAMPION, CANDIDATE, ORACLE = "champion", "candidate", "oracle"
EVALUATION = "dskd.evaluation_sha256"
SINCE, UNTIL, REASON = "dskd.champion_since", "dskd.champion_until", "dskd.champion_reason"
"""Tags of a version: when and why it became champion, and until when it was. MLflow keeps no history of an alias."""
_DETECTOR = "detector"
_PREFIX = "dskd-"
SERVING = (
    "filelock",
    "huggingface-hub",
    "jaxtyping",
    "msgspec",
    "numpy",
    "pillow",
    "platformdirs",
    "safetensors",
    "scipy",
    "tifffile",
    "timm",
    "torch",
    "torchvision",
    "tqdm",
)
"""Packages that `dskd.detector` needs for serving."""


class Registration(NamedTuple):
    """A champion's registered model in MLflow."""

    run_id: str
    model: str
    version: str
    alias: str
    """The alias that now points to it; empty if it was not promoted."""
    reason: str = ""
    """Why it is not the champion; empty if it is."""

    @property
    def is_champion(self) -> bool:
        return self.alias == CHAMPION


class RegisteredDetector(NamedTuple):
    """A version of a registered model, and the location of the detector's files in its run."""

    category: str
    version: str
    trial_id: str
    """Empty for old versions, which did not record it."""
    run_id: str
    folder: str
    """Path below the run's artifacts."""
    files: Mapping[str, int]
    """Sizes in bytes of the files directly in `folder`."""


def check_category(category: str) -> None:
    """Raise ValueError if MLflow cannot use this category's name."""
    is_taken = set(category) & set("/:") or {"'", '"'} <= set(category) or category.startswith("-")
    if is_taken or printable(category) != category or "\t" in category:
        raise ValueError(
            f"category {category!r} cannot be named in MLflow and in commands: no slash, colon or control character, "
            "no hyphen in front, and not both kinds of quotes; rename its folder."
        )


def model_name(category: str) -> str:
    """Name of a category's registered model."""
    return f"{_PREFIX}{category}"


def quoted(text: str) -> str:
    """A string literal of MLflow's filter language, which has two kinds of quotes and no escapes."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def pack(detector: Path, folder: Path) -> None:
    """Write an MLflow model to `folder`: `served_model.py`, the detector's files and the code of dskd."""
    # Slow imports; the trials' processes only send events and do not need them.
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, Object, ParamSchema, ParamSpec, Property, Schema

    from dskd.checkpoint import read_record

    sides = [Property(side, "long") for side in ("left", "top", "right", "bottom")]
    region = Object([*sides, Property("peak", "double"), Property("contour", Array(Array("long")))])
    parts = []
    if read_record(detector).part_thresholds:
        kinds = {"part": "string", "part_verdict": "string", "part_score": "double", "part_threshold": "double"}
        parts = [ColSpec(kind, name, required=False) for name, kind in kinds.items()]
    with temporary_folder() as temporary:
        # MLflow keeps the folder's own name, and refuses a link.
        named = shutil.copytree(detector, temporary / _DETECTOR)
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={_DETECTOR: str(named)},
            code_paths=[str(Path(dskd.__file__).parent)],
            signature=ModelSignature(
                inputs=Schema([ColSpec("string", "image"), ColSpec("string", "name", required=False)]),
                outputs=Schema(
                    [
                        ColSpec("string", "image"),
                        ColSpec("string", "verdict"),
                        ColSpec("double", "score"),
                        ColSpec("double", "threshold"),
                        ColSpec("double", "relative_score", required=False),
                        ColSpec("double", "p_value", required=False),
                        ColSpec("boolean", "is_anomalous"),
                        ColSpec(Array(region), "regions"),
                        ColSpec("long", "width"),
                        ColSpec("long", "height"),
                        ColSpec("string", "overlay", required=False),
                        ColSpec("long", "num_clipped", required=False),
                        ColSpec("string", "category"),
                        ColSpec("string", "detector_version"),
                        ColSpec("string", "teacher"),
                        ColSpec("string", "error", required=False),
                        *parts,
                    ]
                ),
                params=ParamSchema([ParamSpec("false_alarm_rate", "double", 0.01)]),
            ),
            input_example=pd.DataFrame({"image": [_grey_square()]}),
            # pip finds no release with a local suffix such as +cpu.
            pip_requirements=[f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in SERVING],
        )


def _grey_square() -> str:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def evaluation_key(record: DetectorRecord) -> str:
    """Digest of what a validation objective depends on beside the detector: objectives compare where it is equal."""
    seen = [record.data_sha256, record.validation_files, record.selection, record.textures_sha256, record.num_textures]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def register(
    client: MlflowClient, category: str, run_id: str, tags: Mapping[str, str], *, promote: Promote = "auto"
) -> Registration:
    """Register the run's artifacts in `MODEL_FOLDER` as a version of `dskd-<category>`, only once per run.

    The alias (`oracle` if `dskd.selection` is oracle, else `champion`) moves to it by `_alias_of`.
    """
    model = model_name(category)
    held = _aliases(client, model)
    versions = client.search_model_versions(f"name = {quoted(model)}")
    mine = [version for version in versions if version.run_id == run_id]
    if mine:
        version = mine[0]
    else:
        source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"
        version = client.create_model_version(
            model,
            source,
            run_id,
            tags=dict(tags),
            description=_about(category, run_id, tags),
            await_creation_for=0,  # it is ready at once, and waiting says so in a line of MLflow's own
        )
    alias = ORACLE if tags.get("dskd.selection") == ORACLE else CHAMPION
    holder = next((other for other in versions if str(other.version) == held.get(alias)), None)
    given, reason = _alias_of(tags, alias, holder, promote)
    if given:
        client.set_registered_model_alias(model, given, version.version)
        if given == CHAMPION and (holder is None or holder.version != version.version):
            before = "" if holder is None else str(holder.version)
            note_champion(client, category, str(version.version), before, _why(holder, tags, promote))
    return Registration(run_id, model, str(version.version), given, reason)


def _about(category: str, run_id: str, tags: Mapping[str, str]) -> str:
    """Markdown on a version: what it is, where it comes from, how to serve it."""
    untrained = "> **The teacher is untrained: not for inspection.**\n\n" if tags.get(TEACHER) == UNTRAINED else ""
    return (
        f"{untrained}Detector of *{category}*, version `{tags.get('dskd.detector_version', '')}`, from the run "
        f"`{run_id}` of the search *{tags.get('dskd.search', '')}*; validation objective "
        f"{float(tags['dskd.objective']):.4f}.\n\n{_how_to_serve(category)}"
    )


_HOW_TO_SERVE = """Takes a table of images (column `image`: base64 text of the file; `name` is optional) and the
parameter `false_alarm_rate`; answers a verdict, score, threshold, p-value and regions for each.

    mlflow models serve -m models:/{model}@champion

    python tune/pull.py {category} --alias champion --out detectors
"""


def _how_to_serve(category: str) -> str:
    return _HOW_TO_SERVE.format(model=model_name(category), category=shlex.quote(category))


def _alias_of(tags: Mapping[str, str], alias: str, holder: ModelVersion | None, promote: Promote) -> tuple[str, str]:
    """The alias that a version with these tags gets, and why it is not `alias`; `holder` is the version that has it.

    `alias` moves only to what is at least as good on the same evaluation data; what was evaluated on other data is a
    candidate, which a person compares.
    """
    if tags.get(TEACHER) == UNTRAINED:
        return "", "its teacher is untrained"
    if promote == "never":
        return "", "by --promote never"
    if promote == "always" or holder is None or holder.tags.get(TEACHER) == UNTRAINED:
        return alias, ""
    if not _are_comparable(tags, holder.tags):
        given = CANDIDATE if alias == CHAMPION else ""
        return (
            given,
            f"version {holder.version}, the {alias}, was evaluated on other data; --promote always replaces it",
        )
    if float(holder.tags.get("dskd.objective", "0")) <= float(tags["dskd.objective"]):
        return alias, ""
    return "", f"version {holder.version}, the {alias}, is better on the same data"


def _are_comparable(tags: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether two objectives were measured on the same evaluation data; older versions say only by which images."""
    known = EVALUATION if EVALUATION in tags and EVALUATION in others else "dskd.data_sha256"
    return tags.get(known) == others.get(known)


def _why(holder: ModelVersion | None, tags: Mapping[str, str], promote: Promote) -> str:
    """Why a version with these tags takes the alias from `holder`."""
    if holder is None:
        return "the first of its category"
    if holder.tags.get(TEACHER) == UNTRAINED:
        return f"the teacher of version {holder.version} is untrained"
    if not _are_comparable(tags, holder.tags):
        return f"by --promote {promote}: version {holder.version} was evaluated on other data"
    return (
        f"validation {float(tags['dskd.objective']):.4f}, version {holder.version} had "
        f"{float(holder.tags.get('dskd.objective', '0')):.4f} on the same data"
    )


def note_champion(client: MlflowClient, category: str, version: str, before: str, reason: str) -> None:
    """Tag a version that became champion with time and reason, and the one `before`, if any, with its end."""
    name, now = model_name(category), time_text(datetime.datetime.now(datetime.UTC))
    client.set_model_version_tag(name, version, SINCE, now)
    client.set_model_version_tag(name, version, REASON, reason)
    client.set_model_version_tag(name, version, UNTIL, "")
    if before and before != version:
        client.set_model_version_tag(name, before, UNTIL, now)


def time_text(time: datetime.datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _aliases(client: MlflowClient, model: str) -> dict[str, str]:
    """Version by alias; creates the model if it does not exist."""
    try:
        found = client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = client.create_registered_model(
            model,
            description=f"Detector of anomalies. {_how_to_serve(model.removeprefix(_PREFIX))}",
        )
    # Versions returned by a search have no aliases; the model has them.
    return {name: str(version) for name, version in found.aliases.items()}


def registered_categories(client: MlflowClient, alias: str) -> tuple[str, ...]:
    """Categories whose registered model has `alias`, in alphabetical order."""
    found: list[str] = []
    token: str | None = ""
    while token is not None:
        page = client.search_registered_models(f"name LIKE '{_PREFIX}%'", page_token=token or None)
        found.extend(model.name.removeprefix(_PREFIX) for model in page if alias in model.aliases)
        token = page.token or None
    return tuple(sorted(found))


def find_registered(client: MlflowClient, category: str, alias: str) -> RegisteredDetector:
    """The version that `alias` points to.

    Raises ValueError if there is none or if it holds no detector.
    """
    try:
        version: ModelVersion = client.get_model_version_by_alias(f"{_PREFIX}{category}", alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = ", ".join(registered_categories(client, alias)) or "none"
        raise ValueError(
            f"no model {_PREFIX}{category} with the alias {alias!r}; with it there are: {known}."
        ) from None
    return _detector_of(client, category, version)


def find_version(client: MlflowClient, category: str, version: int) -> RegisteredDetector:
    """A version by its number; raises ValueError if there is none or if it holds no detector."""
    try:
        found: ModelVersion = client.get_model_version(f"{_PREFIX}{category}", str(version))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = client.search_model_versions(f"name = {quoted(model_name(category))}")
        numbers = ", ".join(sorted((str(each.version) for each in known), key=int)) or "none"
        raise ValueError(f"no version {version} of the model {_PREFIX}{category}; there are: {numbers}.") from None
    return _detector_of(client, category, found)


def _detector_of(client: MlflowClient, category: str, version: ModelVersion) -> RegisteredDetector:
    run_id = str(version.run_id)
    root = str(client.get_run(run_id).info.artifact_uri).rstrip("/")
    folder = str(version.source).removeprefix(f"{root}/")
    # Old versions, not packed for serving, are the detector folder itself.
    for place in (f"{folder}/artifacts/{_DETECTOR}", folder):
        files = {
            Path(file.path).name: int(file.file_size or 0)
            for file in client.list_artifacts(run_id, place)
            if not file.is_dir
        }
        if "detector.json" in files:
            trial_id = str(version.tags.get("dskd.trial", ""))
            return RegisteredDetector(category, str(version.version), trial_id, run_id, place, files)
    raise ValueError(f"{_PREFIX}{category} version {version.version} holds no detector in {version.source}.")


def fetch(client: MlflowClient, detector: RegisteredDetector, name: str, path: Path) -> None:
    """Download one file of a registered detector to `path`, unless it is there with its full size.

    Raises OSError if the download fails.
    """
    if path.exists() and path.stat().st_size == detector.files[name]:
        return
    with TemporaryDirectory(dir=path.parent, prefix=".fetch-") as temporary:
        try:
            local = client.download_artifacts(detector.run_id, f"{detector.folder}/{name}", temporary)
        except MlflowException as error:
            reason = first_line(error)
            raise OSError(f"{name} of {_PREFIX}{detector.category} could not be fetched: {reason}") from None
        os.replace(local, path)
