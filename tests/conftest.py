"""What several test files share: a small data set, a small network, one detector trained with them, and clusters.

While tests run, jaxtyping checks every call in these modules against its annotations: that a tensor has the shape,
and that names such as "b" mean one size within a call. jaxtyping's pytest option cannot pass an option to beartype
for more than one module, so the hook is installed here, before the first import of dskd.
"""
# ruff: noqa: E402

from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

SHAPE_CHECKED = (
    "dskd.anomaly",
    "dskd.calibration",
    "dskd.data",
    "dskd.draw",
    "dskd.evaluate",
    "dskd.export",
    "dskd.losses",
    "dskd.metrics",
    "dskd.model",
    "dskd.show.overlays",
    "dskd.show.plots",
    "dskd.show.validation",
    "dskd.training",
)
"""All with arrays, and no class with a method that returns Self, which beartype cannot check one function at a time."""
install_import_hook(
    SHAPE_CHECKED,
    # the numeric tower: an int may stand where a float is asked for, as in mypy
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import Generator
from PIL import Image

from dskd.checkpoint import write_detector
from dskd.config import (
    DataConfig,
    DataSpec,
    LossConfig,
    ModelConfig,
    RunConfig,
    ScoreConfig,
    TeacherSource,
    TrainConfig,
)
from dskd.training.inputs import TrainingData, prepare
from dskd.training.run import TrainingRun

SIZE = 64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With servers running, only warnings that point at our own lines are errors.

    What Ray, gRPC, boto3 and MLflow warn of there, such as a socket that was collected before it was closed, comes
    when it comes: it would end whichever test happens to run.
    """
    for item in items:
        if item.get_closest_marker("cluster") or item.get_closest_marker("services"):
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.filterwarnings(r"error:::(dskd|tune)\."))


@pytest.fixture(scope="session", autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither the user's cache nor the user's servers, and one thread: tiny networks lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("RAY_", "MLFLOW_", "DSKD_", "AWS_")):
                patch.delenv(name)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # MLflow waits between its own attempts; the tests of an absent server need none.
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """For tests of how a function refuses what its annotations forbid."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def mvtec_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories, each of 12 training images, 4 good and 4 scratched test images with masks."""
    root = tmp_path_factory.mktemp("mvtec")
    for seed, (name, stripes) in enumerate({"tile": 8, "wood": 3}.items()):
        rng = np.random.default_rng(seed)
        for part, defect, count in (("train", "good", 12), ("test", "good", 4), ("test", "scratch", 4)):
            for index in range(count):
                pixels, mask = _draw(rng, stripes, is_scratched=defect != "good")
                _save(pixels, root / name / part / defect / f"{index:03d}.png")
                if defect != "good":
                    _save(mask, root / name / "ground_truth" / defect / f"{index:03d}_mask.png")
    return root


def _draw(rng: Generator, stripes: int, *, is_scratched: bool) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    wave = np.sin(2 * np.pi * (stripes * columns + rows) / SIZE + rng.uniform(0, 0.5))
    pixels = 120 + 50 * wave[..., None] * (1.0, 0.8, 0.5) + rng.normal(0, 6, (SIZE, SIZE, 3))
    mask = np.zeros((SIZE, SIZE), np.uint8)
    if is_scratched:
        top, left = rng.integers(8, SIZE - 24, 2)
        mask[top : top + 6, left : left + 16] = 255
        pixels[mask > 0] = (250, 30, 30)
    return pixels.clip(0, 255).astype(np.uint8), mask


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def tiny() -> RunConfig:
    """Both students at 32 pixels on timm's smallest ResNet: an epoch takes a fraction of a second."""
    return RunConfig(
        data=DataConfig(image_size=32, validation_fraction=0.34),  # 4 of 12: 2 select, 2 calibrate
        model=ModelConfig(backbone="test_resnet", levels=(1, 2), embedding_depth=1),
        loss=LossConfig(level_weights=(1.0, 1.0), hkd_weight=1.0),
        score=ScoreConfig(score_level_weights=(1.0, 1.0)),
        train=TrainConfig(epochs=2, batch_size=4),
    )


@pytest.fixture(scope="session")
def inputs(mvtec_root: Path, tiny: RunConfig) -> TrainingData:
    return prepare(
        tiny,
        DataSpec(data=mvtec_root, category="tile", teacher=TeacherSource("random")),
        device=torch.device("cpu"),
        cache=None,
    )


@pytest.fixture(scope="session")
def detector_folder(tiny: RunConfig, inputs: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished detector of `tile`; copy it before changing it."""
    run = TrainingRun.begin(tiny, inputs, torch.device("cpu"))
    for _ in run.intervals():
        pass
    folder = tmp_path_factory.mktemp("detectors") / "tile"
    write_detector(folder, *run.detector())
    return folder


@pytest.fixture
def cluster_folder() -> Iterator[Path]:
    """Short, for the paths of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as short:
        yield Path(short)


@pytest.fixture
def local_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray of three CPUs in this process, without a dashboard that Ray's own cleaner could ask.

    All tests share one token: a process keeps that of its first Ray.
    """
    import ray

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("0" * 32)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
