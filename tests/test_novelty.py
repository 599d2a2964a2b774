"""One-class novelty: a folder of class folders, each class normal for its own detector and anomalous for all others."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dskd.checkpoint import write_detector
from dskd.cli.main import main
from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.data.check import check_data
from dskd.data.datasets import find_categories, read_category, read_test_split
from dskd.detector import Detector
from dskd.device import WorkerRank
from dskd.metrics import Scores
from dskd.presets import to_toml
from dskd.training.inputs import prepare
from dskd.training.run import TrainingRun, objective
from tune.preflight.checks import read_categories
from tune.settings.plan import plan_search, resolve_addresses
from tune.settings.search import SearchSettings
from tune.settings.workers import Workers
from tune.storage.staging import local_copy
from tune.storage.uris import DETECTOR_FOLDER
from tune.trial.spec import OBJECTIVE, build_spec, tracked_figures
from tune.trial.worker import train

NUM_IMAGES = 20
CPU = torch.device("cpu")


def draw(folder: Path, number: int, count: int, seed: int) -> None:
    """Stripes, as many as the class's number and one."""
    rng = np.random.default_rng(seed)
    columns = np.linspace(0, 2 * np.pi * (number + 1), 16)
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = 128 + 80 * np.sin(columns + rng.uniform(0, 1))[None] + rng.normal(0, 8, (16, 16))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:02d}.png")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of 20 images in one folder."""
    root = tmp_path_factory.mktemp("classes")
    for number in range(10):
        draw(root / str(number), number, NUM_IMAGES, number)
    return root


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes whose data set comes in two parts, as CIFAR-10 does, one of them called as normal ones are."""
    root = tmp_path_factory.mktemp("published")
    for seed, part in enumerate(("train", "test")):
        for number, name in enumerate(("good", "ship")):
            draw(root / part / name, number, 8 - 2 * seed, 10 * seed + number)
    return root


@pytest.fixture
def novelty(tiny: RunConfig) -> RunConfig:
    return tiny.with_values({"layout": "classes"})


def test_each_class_is_a_category_whose_test_has_all_the_others_of_a_part_that_no_training_sees(classes: Path) -> None:
    assert list(find_categories(classes, "classes")) == [str(number) for number in range(10)]
    trained, tested = set(), set()
    for name in find_categories(classes, "classes"):
        category = read_category(classes, name, "classes")
        assert {sample.path.parent.name for sample in category.train} == {name}
        assert len(category.train) == 16 and not category.validation and category.unread == ""
        good = [sample for sample in category.test if not sample.is_defective]
        assert {sample.path.parent.name for sample in good} == {name} and len(good) == 4
        others = [sample for sample in category.test if sample.is_defective]
        assert all(sample.defect == sample.path.parent.name != name and sample.mask is None for sample in others)
        assert len(others) == 9 * 4
        trained |= {sample.path for sample in category.train}
        tested |= {sample.path for sample in category.test}
    assert not trained & tested and len(trained | tested) == 10 * NUM_IMAGES


def test_the_published_split_is_taken_where_there_is_one(published: Path) -> None:
    ship, good = (read_category(published, name, "classes") for name in ("ship", "good"))
    assert {sample.path.parent for sample in ship.train} == {published / "train" / "ship"} and len(ship.train) == 8
    assert [sample.path.parent.parent.name for sample in ship.test] == ["test"] * 12
    assert sum(sample.is_defective for sample in ship.test) == sum(sample.is_defective for sample in good.test) == 6
    assert {sample.defect for sample in ship.test} == {"good", "class good"}
    assert {sample.defect for sample in good.test} == {"good", "ship"}
    assert read_test_split(published, "ship", "classes").test == ship.test


def test_class_folders_are_read_only_if_that_is_asked_for(classes: Path, mvtec_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no category in"):
        find_categories(classes)
    (tmp_path / "one").mkdir()
    for root in (tmp_path, mvtec_root / "tile" / "train"):
        with pytest.raises(ValueError, match=r"--layout classes needs at least two class folders in .*, got 1; leave"):
            find_categories(root, "classes")


def test_the_data_check_knows_class_folders(classes: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for root, num_classes in ((classes, 10), (published, 2)):
        report = check_data(root, 16, "classes")
        assert report.is_trainable and len(report.categories) == num_classes
        assert not [problem for problem in report.problems if problem.kind in ("unread file", "files not read")]
    main(["check-data", str(published), "--layout", "classes", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert [category["layout"] for category in document["categories"]] == ["class folders"] * 2
    assert document["categories"][1]["counts"] == {
        "train": {"good": 8}, "validation": {}, "test": {"good": 6, "class good": 6},
    }  # fmt: skip


def test_where_no_image_has_a_mask_the_image_auroc_alone_selects() -> None:
    scores = Scores(0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.9)
    assert objective(scores) == pytest.approx(0.8)
    assert objective(scores._replace(aupro=math.nan)) == 0.7


@pytest.mark.parametrize("selection", ["val", "oracle"])
def test_a_class_is_trained_selected_and_measured_by_images_alone(
    selection: Any, novelty: RunConfig, classes: Path
) -> None:
    spec = DataSpec(data=classes, category="3", teacher=TeacherSource("random"), selection=selection)
    inputs = prepare(novelty, spec, device=CPU, cache=None)
    assert not inputs.validation.masks.any() and inputs.validation.labels.any()
    run = TrainingRun.begin(novelty.with_values({"score_candidates": 8}), inputs, CPU)
    validations = list(run.intervals())
    assert [each.objective for each in validations] == [each.scores.image_auroc for each in validations]
    record, _ = run.detector()
    assert {"val/objective", "val/image_auroc"} <= set(record.metrics) and "val/aupro" not in record.metrics
    assert record.metrics["val/objective"] == record.metrics["val/image_auroc"]


@pytest.mark.parametrize("selection", ["val", "oracle"])
def test_every_tile_of_another_class_is_anomalous(
    selection: Any, novelty: RunConfig, published: Path, tmp_path: Path
) -> None:
    root = tmp_path / "large"
    for source in sorted(published.rglob("*.png")):
        target = root / source.relative_to(published)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(source).resize((96, 64)).save(target)
    config = novelty.with_values({"tile": 32, "overlap": 0})
    spec = DataSpec(data=root, category="ship", teacher=TeacherSource("random"), selection=selection)
    inputs = prepare(config, spec, device=CPU, cache=None)
    truth = inputs.validation
    assert truth.labels.any() and not truth.labels.all() and not truth.masks.any()
    np.testing.assert_array_equal(truth.has_mask, ~truth.labels)
    if selection == "oracle":  # 6 images of each class, of 6 tiles each
        assert truth.labels.sum() == (~truth.labels).sum() == 36
    run = TrainingRun.begin(config, inputs, CPU)
    for _ in run.intervals():
        pass
    write_detector(tmp_path / "ship", *run.detector())
    figures = Detector.load(tmp_path / "ship").evaluate(root, "ship")
    assert 0 <= figures.image_auroc <= 1 and math.isnan(figures.aupro)


def test_the_region_of_a_class_is_no_image_of_it(published: Path, novelty: RunConfig, tmp_path: Path) -> None:
    root = tmp_path / "published"
    shutil.copytree(published, root)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 2:14] = 255
    Image.fromarray(mask).save(root / "train/ship/region.png")
    for name in ("ship", "good"):
        assert read_category(root, name, "classes").train == tuple(
            sample._replace(path=root / sample.path.relative_to(published))
            for sample in read_category(published, name, "classes").train
        )
    assert check_data(root, 16, "classes").is_trainable
    regions = [
        prepare(novelty, DataSpec(data=root, category=name, teacher=TeacherSource("random")), device=CPU, cache=None)
        for name in ("ship", "good")
    ]
    assert regions[0].region is not None and regions[0].region.box == (2, 4, 14, 12) and regions[1].region is None


def test_the_commands_train_and_measure_a_class(
    novelty: RunConfig, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(to_toml(novelty.with_values({"layout": "auto"})))
    words = ["--data", classes, "--category", "0", "--out", tmp_path / "zero", "--config", tmp_path / "run.toml"]
    main(["train", *map(str, words), "--layout", "classes", "--teacher-weights", "random", "--cache-gb", "0"])
    said = capsys.readouterr().err
    assert "val image AUROC" in said and "AUPRO" not in said and "nan" not in said
    main(["evaluate", str(tmp_path / "zero"), "--data", str(classes), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["pixel_auroc"] is figures["aupro"] is None and 0 <= figures["image_auroc"] <= 1
    assert Detector.load(tmp_path / "zero").record.config.data.layout == "classes"


@pytest.mark.slow
def test_a_search_over_ten_classes_trains_each_with_what_it_suggests(
    classes: Path, tiny: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(to_toml(tiny.with_values({"epochs": 1})))
    settings = SearchSettings(
        data=str(classes), storage=str(tmp_path / "results"), layout="classes", config=tmp_path / "run.toml",
        teacher_weights="random", score_candidates=0,
    )  # fmt: skip
    plan = plan_search(settings, resolve_addresses(settings), classes)
    assert len(plan.categories) == 10 == len(read_categories(plan, classes))
    for category, space in plan.spaces.items():
        spec = build_spec(
            space.configuration(space.starting_points()[0]), data=plan.data, category=category, teacher=plan.teacher,
            textures="", selection="val", cache_gb=1.0, workers=Workers(1, 1.0, 0.0), min_workers=None, workers_uri="",
            revision="",
        )  # fmt: skip
        for report in train(spec, WorkerRank(), CPU, None):
            assert report.metrics[OBJECTIVE] == report.metrics["val/image_auroc"] and report.checkpoint is not None
            assert all(math.isfinite(value) for value in tracked_figures(report.metrics).values())
            assert Detector.load(report.checkpoint / DETECTOR_FOLDER).evaluate(classes, category).image_auroc >= 0


def test_all_classes_of_a_remote_folder_are_one_copy(
    classes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = (local_copy(f"file://{classes}", name, 1.0, "classes") for name in ("0", "7"))
    assert first == second and len(read_category(first, "7", "classes").test) == 40
