"""Detectors as registered models of MLflow: packed for serving, promoted if better, fetched by alias."""

import base64
import datetime
import importlib.metadata
import io
import os
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

MODEL_FOLDER = "model"
"""Artifact folder of a packed detector."""
CHAMPION, ORACLE = "champion", "oracle"
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
    if set(category) & set("/:") or {"'", '"'} <= set(category) or not category.isprintable():
        raise ValueError(
            f"category {category!r} cannot be named in MLflow: no slash, colon or control character, and not both "
            "kinds of quotes; rename its folder."
        )


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

    sides = [Property(side, "long") for side in ("left", "top", "right", "bottom")]
    region = Object([*sides, Property("peak", "double"), Property("contour", Array(Array("long")))])
    with TemporaryDirectory(prefix="dskd-") as temporary:
        # MLflow keeps the folder's own name, and refuses a link.
        named = shutil.copytree(detector, Path(temporary) / _DETECTOR)
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={_DETECTOR: str(named)},
            code_paths=[str(Path(dskd.__file__).parent)],
            signature=ModelSignature(
                inputs=Schema([ColSpec("string", "image")]),
                outputs=Schema(
                    [
                        ColSpec("string", "image"),
                        ColSpec("string", "verdict"),
                        ColSpec("double", "score"),
                        ColSpec("double", "threshold"),
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


def register(
    client: MlflowClient, category: str, run_id: str, tags: Mapping[str, str], *, promote: bool
) -> Registration:
    """Register the run's artifacts in `MODEL_FOLDER` as a version of `dskd-<category>`, only once per run.

    With `promote` the alias (`oracle` if `dskd.selection` is oracle, else `champion`) moves to it unless the version
    that has it was selected on the same images (`dskd.data_sha256`) and has a higher `dskd.objective`.
    """
    model = f"{_PREFIX}{category}"
    held = _aliases(client, model)
    versions = client.search_model_versions(f"name = {quoted(model)}")
    mine = [version for version in versions if version.run_id == run_id]
    if mine:
        version = mine[0]
    else:
        source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"
        version = client.create_model_version(model, source, run_id, tags=dict(tags))
    alias = ORACLE if tags.get("dskd.selection") == ORACLE else CHAMPION
    holder = next((other for other in versions if str(other.version) == held.get(alias)), None)
    promoted = promote and (
        holder is None
        or holder.tags.get("dskd.data_sha256") != tags["dskd.data_sha256"]
        or float(holder.tags.get("dskd.objective", "0")) <= float(tags["dskd.objective"])
    )
    if promoted:
        client.set_registered_model_alias(model, alias, version.version)
        if alias == CHAMPION and (holder is None or holder.version != version.version):
            before = "" if holder is None else str(holder.version)
            note_champion(client, category, str(version.version), before, _why(holder, tags))
    return Registration(run_id, model, str(version.version), alias if promoted else "")


def _why(holder: ModelVersion | None, tags: Mapping[str, str]) -> str:
    """Why a version with these tags takes the alias from `holder`."""
    if holder is None:
        return "the first of its category"
    if holder.tags.get("dskd.data_sha256") != tags["dskd.data_sha256"]:
        return f"trained on other images than version {holder.version}"
    return (
        f"validation {float(tags['dskd.objective']):.4f}, version {holder.version} had "
        f"{float(holder.tags.get('dskd.objective', '0')):.4f} on the same images"
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


def model_name(category: str) -> str:
    """Name of a category's registered model."""
    return f"{_PREFIX}{category}"


def _aliases(client: MlflowClient, model: str) -> dict[str, str]:
    """Version by alias; creates the model if it does not exist."""
    try:
        found = client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = client.create_registered_model(
            model,
            description="Detector of anomalies; serve it with `mlflow models serve`, or pull it with tune/pull.py.",
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
            reason = str(error).splitlines()[0][:300]
            raise OSError(f"{name} of {_PREFIX}{detector.category} could not be fetched: {reason}") from None
        os.replace(local, path)
