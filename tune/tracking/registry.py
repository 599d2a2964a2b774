"""Detectors as registered models of MLflow: packed to be served, promoted when better, fetched by alias."""

import base64
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
_DETECTOR = "detector"
_PREFIX = "dskd-"
_SERVING = (
    "huggingface-hub",
    "jaxtyping",
    "msgspec",
    "numpy",
    "pillow",
    "safetensors",
    "scipy",
    "tifffile",
    "timm",
    "torch",
    "torchvision",
    "tqdm",
)
"""What `dskd.detector` needs where it is served."""


class Registration(NamedTuple):
    """Where a champion stands in MLflow."""

    run_id: str
    model: str
    version: str
    alias: str
    """The alias that now points to it; empty where it was not to be promoted or an earlier version is better."""

    @property
    def is_champion(self) -> bool:
        return self.alias == CHAMPION


class RegisteredDetector(NamedTuple):
    """A version of a registered model, and where its run keeps the detector's files."""

    category: str
    version: str
    trial_id: str
    """Empty for versions of before it was noted."""
    run_id: str
    folder: str
    """Below the run's artifacts."""
    files: Mapping[str, int]
    """Sizes in bytes of the files directly in it."""


def check_category(category: str) -> None:
    """Raise ValueError where MLflow cannot hold a category of this name."""
    if set(category) & set("/:") or {"'", '"'} <= set(category) or not category.isprintable():
        raise ValueError(
            f"category {category!r} cannot be named in MLflow: no slash, colon or control character, and not both "
            "kinds of quotes; rename its folder."
        )


def quoted(text: str) -> str:
    """A string in MLflow's filter language, which knows two kinds of quotes and no escape."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def pack(detector: Path, folder: Path) -> None:
    """Make `folder` an MLflow model of a detector folder: `served_model.py`, the files, and dskd's code."""
    # Seconds of imports that the trials' processes, which only send events, can do without.
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, Object, ParamSchema, ParamSpec, Property, Schema

    sides = [Property(side, "long") for side in ("left", "top", "right", "bottom")]
    region = Object([*sides, Property("peak", "double")])
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
                        ColSpec("long", "map_size"),
                        ColSpec("string", "overlay", required=False),
                        ColSpec("long", "num_clipped", required=False),
                        ColSpec("string", "category"),
                        ColSpec("string", "teacher"),
                        ColSpec("string", "error", required=False),
                    ]
                ),
                params=ParamSchema([ParamSpec("false_alarm_rate", "double", 0.01)]),
            ),
            input_example=pd.DataFrame({"image": [_grey_square()]}),
            # A local build's suffix (+cpu) names no release that pip could find.
            pip_requirements=[f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _SERVING],
        )


def _grey_square() -> str:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def register(
    client: MlflowClient, category: str, run_id: str, tags: Mapping[str, str], *, promote: bool
) -> Registration:
    """Register what `run_id` holds in `MODEL_FOLDER` as a version of `dskd-<category>`, once.

    The alias (`champion`; `oracle` where `dskd.selection` is that) moves to it unless its present holder, chosen
    on the same images (`dskd.data_sha256`), has a higher `dskd.objective`.
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
    return Registration(run_id, model, str(version.version), alias if promoted else "")


def _aliases(client: MlflowClient, model: str) -> dict[str, str]:
    """Version by alias; the model is made where there is none."""
    try:
        found = client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = client.create_registered_model(
            model,
            description="Detector of anomalies; serve it with `mlflow models serve`, or pull it with tune/pull.py.",
        )
    # Versions that a search returns carry no aliases; the model itself does.
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

    Raises ValueError where there is none, or where it holds no detector.
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
    run_id = str(version.run_id)
    root = str(client.get_run(run_id).info.artifact_uri).rstrip("/")
    folder = str(version.source).removeprefix(f"{root}/")
    # Versions of before detectors were packed to be served are the detector folder itself.
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
    """Copy one of a registered detector's files to `path`; nothing is done where it lies there in full size already.

    Raises OSError where the server does not hand it out.
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
