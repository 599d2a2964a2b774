import contextlib
import importlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from dskd.checkpoint import RECORD_FILE, WEIGHTS_FILE, read_record
from dskd.cli.main import main
from dskd.cli.output import vouched_rates
from dskd.config import DataConfig, RunConfig
from dskd.data.datasets import fingerprint
from dskd.data.files import IMAGE_SUFFIXES
from dskd.detector import UNTRAINED_TEACHER
from dskd.presets import PRESETS
from dskd.training.speed import StepSpeed

TINY = [
    "--image-size", "32", "--backbone", "test_resnet", "--levels", "1", "2", "--level-weights", "1", "1",
    "--score-level-weights", "1", "1", "--embedding-depth", "1", "--epochs", "1", "--batch-size", "4",
    "--validation-fraction", "0.34", "--teacher-weights", "random", "--device", "cpu",
]  # fmt: skip


class CommandResult(NamedTuple):
    code: int
    out: str
    err: list[str]


def dskd(*words: object) -> CommandResult:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
    return CommandResult(code, out.getvalue(), err.getvalue().splitlines())


@pytest.fixture(scope="module")
def trained(mvtec_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CommandResult]:
    out = tmp_path_factory.mktemp("cli") / "detector"
    return out, dskd("train", "--data", mvtec_root, "--category", "wood", "--out", out, *TINY, "--json")


def test_train_writes_a_detector_with_a_preview(trained: tuple[Path, CommandResult]) -> None:
    folder, outcome = trained
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    record = read_record(folder)
    assert document["category"] == record.category == "wood"
    assert document["teacher"] == "random"
    assert {name: document[name] for name in record.metrics} == record.metrics
    assert document["requested_rate"] == 0.01 and document["expected_rate"] == document["guaranteed_rate"] == 1 / 3
    assert document["step"] == record.step == 2
    assert record.config.model.levels == (1, 2) and record.config.train.epochs == 1
    with Image.open(folder / "preview.png") as preview:
        assert preview.size[0] > 0
    assert outcome.err[:2] == ["wood: 12 training, 0 validation, 8 test images", UNTRAINED_TEACHER]
    assert any(line.startswith("step    2/2  loss ") for line in outcome.err)


def test_evaluate_prints_one_json_document(trained: tuple[Path, CommandResult], mvtec_root: Path) -> None:
    outcome = dskd("evaluate", trained[0], "--data", mvtec_root, "--json")
    assert outcome.code == 0
    document = json.loads(outcome.out)
    assert (document["category"], document["teacher"]) == ("wood", "random")
    for name in ("image_auroc", "pixel_auroc", "aupro"):
        assert 0 <= document[name] <= 1
    assert outcome.err == [UNTRAINED_TEACHER, "wood: 12 training, 0 validation, 8 test images"]
    spoken = dskd("evaluate", trained[0], "--data", mvtec_root)
    lines = spoken.out.splitlines()
    figures = dict(line.split() for line in lines[: lines.index("")])
    assert float(figures["aupro"]) == pytest.approx(document["aupro"], abs=1e-4)


def test_evaluate_counts_what_the_threshold_gets_right_and_wrong(
    trained: tuple[Path, CommandResult], mvtec_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(mvtec_root / "wood", tmp_path / "wood")
    for part, name in (("test", "003.png"), ("ground_truth", "003_mask.png")):
        (tmp_path / "wood" / part / "hole").mkdir()
        (tmp_path / "wood" / part / "scratch" / name).rename(tmp_path / "wood" / part / "hole" / name)
    verdicts = tmp_path / "verdicts"
    dskd("predict", trained[0], tmp_path / "wood/test", "--out", verdicts, "--threshold", "0")
    rows = [json.loads(line) for line in (verdicts / "predictions.jsonl").read_text().splitlines()]
    scores = {kind: sorted(row["score"] for row in rows if f"/{kind}/" in row["image"])
              for kind in ("good", "scratch", "hole")}  # fmt: skip
    limit = (scores["good"][1] + scores["good"][2]) / 2  # two of four good images are above it
    scratched = sum(score > limit for score in scores["scratch"])
    holed = sum(score > limit for score in scores["hole"])
    words = ["evaluate", trained[0], "--data", tmp_path, "--threshold", repr(limit)]
    document = json.loads(dskd(*words, "--json").out)
    assert document["confusion"] == {
        "num_good": 4, "num_false_alarms": 2, "num_defective": 4, "num_missed": 4 - scratched - holed
    }  # fmt: skip
    assert document["defects"] == {
        "hole": {"num_found": holed, "num_images": 1},
        "scratch": {"num_found": scratched, "num_images": 3},
    }
    assert document["detector_version"] == read_record(trained[0]).detector_version == rows[0]["detector_version"]
    spoken = dskd(*words).out.splitlines()
    assert f"8 test images; threshold {limit:g} as given" in spoken
    assert ["good", "2", "2"] in [line.split() for line in spoken]
    assert any(line.startswith(f"hole           {holed} of 1 ") for line in spoken)


def test_figures_without_masks_are_null_and_not_nan(
    trained: tuple[Path, CommandResult], mvtec_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(mvtec_root / "wood", tmp_path / "wood")
    shutil.rmtree(tmp_path / "wood/ground_truth")
    outcome = dskd("evaluate", trained[0], "--data", tmp_path, "--json")
    document = json.loads(outcome.out, parse_constant=pytest.fail)
    assert document["pixel_auroc"] is None and 0 <= document["image_auroc"] <= 1


def test_predict_writes_a_verdict_and_a_picture_of_every_image(
    trained: tuple[Path, CommandResult], mvtec_root: Path, tmp_path: Path
) -> None:
    images = mvtec_root / "wood/test"
    outcome = dskd("predict", trained[0], images, "--out", tmp_path / "verdicts", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.err[0] == UNTRAINED_TEACHER
    lines = (tmp_path / "verdicts/predictions.jsonl").read_text().splitlines()
    verdicts = [json.loads(line) for line in lines]
    assert json.loads(outcome.out)["predictions"] == verdicts
    assert [verdict["image"] for verdict in verdicts] == [str(path) for path in sorted(images.rglob("*.png"))]
    limit = read_record(trained[0]).thresholds[0].value
    for verdict in verdicts:
        assert verdict["teacher"] == "random" and verdict["threshold"] == limit
        assert (verdict["verdict"] == "anomalous") == (verdict["score"] > limit) == bool(verdict["regions"])
        with Image.open(tmp_path / "verdicts" / verdict["overlay"]) as picture:
            assert picture.size[0] > picture.size[1]
    assert (
        len({verdict["overlay"] for verdict in verdicts}) == len(list((tmp_path / "verdicts/overlays").iterdir())) == 8
    )
    anomalous = sum(verdict["verdict"] == "anomalous" for verdict in verdicts)
    assert json.loads(outcome.out)["num_anomalous"] == anomalous
    assert outcome.err[-1].startswith(f"{anomalous} of 8 anomalous; threshold ")


def test_a_given_threshold_stands_above_the_calibrated_one(
    trained: tuple[Path, CommandResult], mvtec_root: Path, tmp_path: Path
) -> None:
    image = mvtec_root / "wood/test/good/000.png"
    found = {
        limit: dskd("predict", trained[0], image, "--out", tmp_path / name, "--threshold", limit).out.split()[0]
        for name, limit in (("low", "-1"), ("high", "1e9"))
    }
    assert found == {"-1": "anomalous", "1e9": "good"}


def test_a_rate_that_the_images_cannot_vouch_for_is_said(
    trained: tuple[Path, CommandResult], mvtec_root: Path, tmp_path: Path
) -> None:
    images = mvtec_root / "wood/test/good"
    outcome = dskd("predict", trained[0], images, "--out", tmp_path / "out", "--false-alarm-rate", "0.01")
    assert "2 normal images cannot vouch for 1.0%: it takes 99" in outcome.err[-1]


def test_rates_are_said_to_be_approximate_where_the_same_images_selected(mvtec_root: Path, tmp_path: Path) -> None:
    words = ["train", "--data", mvtec_root, "--category", "tile", "--out", tmp_path / "tile", *TINY, "--json"]
    outcome = dskd(*words, "--calibration-fraction", "0")
    note = "(approximate: the images behind it also selected the model)"
    assert json.loads(outcome.out)["guaranteed_rate"] is None and outcome.err[-1].endswith(note)
    image = mvtec_root / "tile/test/good/000.png"
    seen = dskd("predict", tmp_path / "tile", image, "--out", tmp_path / "seen", "--json")
    assert (
        json.loads(seen.out)["guaranteed_rate"] is None
        and json.loads(seen.out)["expected_rate"] > 0
        and note in seen.err[-1]
    )
    given = dskd("predict", tmp_path / "tile", image, "--out", tmp_path / "given", "--threshold", "1")
    assert "approximate" not in given.err[-1]


def test_an_unreadable_image_amid_others_is_a_row_that_says_why(
    trained: tuple[Path, CommandResult], mvtec_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(mvtec_root / "wood/test/good", tmp_path / "in")
    (tmp_path / "in/001.png").write_bytes((tmp_path / "in/000.png").read_bytes()[:500])
    (tmp_path / "in/notes.txt").write_text("no image")
    outcome = dskd("predict", trained[0], tmp_path / "in", "--out", tmp_path / "out", "--json")
    assert outcome.code == 1 and outcome.err[1] == "4 images; not read: 1 files that are no images (1 .txt)"
    assert outcome.err[2].startswith(f"unreadable: {tmp_path / 'in/001.png'} is not a readable image")
    told = json.loads(outcome.out)
    assert (told["num_unreadable"], told["not_read"]) == (1, {"others": {".txt": 1}, "left_out": {}})
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert rows == told["predictions"] and [Path(row["image"]).name for row in rows] == [f"00{n}.png" for n in range(4)]
    assert [row["verdict"] == "unreadable" for row in rows] == [False, True, False, False]
    assert "not a readable image" in rows[1]["error"] and rows[1]["score"] is None and rows[1]["overlay"] is None
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out"]


def test_the_preset_decides_the_defaults_and_flags_change_them(mvtec_root: Path, tmp_path: Path) -> None:
    words = ["train", "--data", mvtec_root, "--category", "tile", "--out", tmp_path / "stfpm", *TINY]
    for preset in (["--preset", "stfpm"], ["--preset=stfpm"]):
        assert dskd(*words, *preset).code == 0
        config = read_record(tmp_path / "stfpm").config
        assert not config.model.student_decoder and config.score.level_fusion == "product"
        assert config.train.optimizer == "sgd" and config.train.batch_size == 4


def test_the_aand_preset_amplifies_the_teacher_and_says_so(mvtec_root: Path, tmp_path: Path) -> None:
    words = ["train", "--data", mvtec_root, "--category", "tile", "--out", tmp_path / "aand", *TINY]
    stage = ["--amplification-epochs", "2", "--amplification-batch-size", "4", "--memory-size", "4"]
    trained = dskd(*words, "--preset", "aand", *stage)
    assert trained.code == 0, trained.err
    said = [line for line in trained.err if line.startswith("stage I epoch")]
    assert [line.split()[3] for line in said] == ["1/2", "2/2"]
    config = read_record(tmp_path / "aand").config
    assert config.amplification.amplification and not config.model.student_encoder
    assert dskd("evaluate", tmp_path / "aand", "--data", mvtec_root).code == 0
    plain = dskd(*words, "--preset", "aand", "--no-amplification")
    assert plain.code == 0 and not any(line.startswith("stage I") for line in plain.err)


def test_demo_data_can_be_trained_on_as_its_message_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr("dskd.demo.dataset.draw_dataset", lambda out, seed: asked.append((out, seed)))
    outcome = dskd("demo-data", tmp_path / "demo", "--seed", "3")
    assert outcome.code == 0 and asked == [(tmp_path / "demo", 3)]
    assert f"dskd train --data {tmp_path / 'demo'}" in outcome.err[0]


def test_check_data_prints_all_and_its_exit_code_says_whether_training_would_fail(
    mvtec_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    shutil.copytree(mvtec_root / "tile", root / "tile")
    (root / "stray").mkdir()
    for index in range(9):
        Image.new("RGB", (8, 8)).save(root / "stray" / f"{index}.png")
    told = dskd("check-data", root, "--no-time")
    assert told.code == 0 and told.err == [f"0 errors, 9 notes: {root} can be trained on"]
    lines = told.out.splitlines()
    assert "  test        4 good, 4 defective (4 scratch)" in lines and "  size        64 x 64 pixels" in lines
    assert "  training    3200 steps, each of 10 images seen 3200 times" in lines
    assert lines[-1] == f"note: 8 more of this kind (unread file) in {root / 'stray'}; --json names them."
    (root / "tile/train/good/005.png").write_bytes(b"not an image")
    told = dskd("check-data", root)
    assert told.code == 1 and told.err == [f"1 errors, 9 notes: {root} cannot be trained on as it is"]
    assert any(line.startswith("error: ") and "005.png is not a readable" in line for line in told.out.splitlines())
    told = dskd("check-data", root, "--json")
    document = json.loads(told.out)
    assert told.code == 1 and document["is_trainable"] is False and len(document["problems"]) == 10
    assert document["categories"][0]["counts"]["train"] == {"good": 12}
    assert document["categories"][0]["width"] == [64, 64]


def test_check_data_says_how_long_a_training_is_and_takes(mvtec_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[RunConfig] = []

    def two_seconds(config: RunConfig, device: torch.device) -> StepSpeed:
        measured.append(config)
        return StepSpeed(2, 2.0)

    monkeypatch.setattr("dskd.training.speed.untrained_step_speed", two_seconds)
    words = ("--preset", "stfpm", "--batch-size", "5", "--image-size", "64")
    told = dskd("check-data", mvtec_root, *words, "--steps", "90", "--json")
    document = json.loads(told.out)["training"]
    assert (document["batch_size"], document["seconds_per_step"]) == (5, 2.0)
    alarms = document["categories"]["tile"].pop("false_alarms")
    assert alarms == {
        "training_rate": 1 / 2, "training_images_for_1_percent": 990, "search_rate": 1 / 13,
        "search_images_for_1_percent": 99,
    }  # fmt: skip
    assert document["categories"]["tile"] == {
        "images": 10, "steps": 90, "times_each_image_is_seen": 45.0, "seconds": 180.0,
    }  # fmt: skip
    assert measured == [PRESETS["stfpm"].with_values({"batch_size": 5, "image_size": 64, "steps": 90})]
    told = dskd("check-data", mvtec_root, *words, "--epochs", "45")
    line = "  training    90 steps, each of 10 images seen 45 times; 3 min on this machine"
    assert told.out.splitlines().count(line) == 2
    line = (
        "  alarms      one training vouches for 50.0% at best (1% takes 990 good images); a search can be asked for "
        "7.7%, not proven (1% takes 99)"
    )
    assert told.out.splitlines().count(line) == 2
    told = dskd("check-data", mvtec_root, "--batch-size", "20", "--steps", "60")
    assert "each of 10 images seen 60 times; 1 min on" in told.out, "a batch of all images, half as large as measured"

    def no_room(config: RunConfig, device: torch.device) -> StepSpeed:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dskd.training.speed.untrained_step_speed", no_room)
    told = dskd("check-data", mvtec_root, "--steps", "90")
    assert told.code == 0 and told.err[0].startswith("a batch does not fit into the memory")
    assert "  training    90 steps, each of 10 images seen 90 times\n" in told.out
    told = dskd("check-data", mvtec_root, "--steps", "90", "--epochs", "45")
    assert told.code == 2 and told.err[0].startswith("dskd: error: --steps and --epochs exclude each other")


def test_good_validation_images_of_ones_own_vouch_for_both_alike() -> None:
    own = vouched_rates(50, 40, DataConfig())
    assert own["training_rate"] == own["search_rate"] == 1 / 21
    assert own["training_images_for_1_percent"] == own["search_images_for_1_percent"] == 198
    assert vouched_rates(50, 0, DataConfig(calibration_fraction=0.0))["training_rate"] == 1 / 11


def test_names_that_are_no_text_are_checked_trained_on_and_written_so(mvtec_root: Path, tmp_path: Path) -> None:
    shutil.copytree(mvtec_root / "tile/train", tmp_path / "tile/train")
    for index in range(12):
        (tmp_path / f"tile/train/good/{index:03d}.png").rename(tmp_path / f"tile/train/good/f\udcfcr{index}.png")
    (tmp_path / "stray\udcfc.png").write_bytes(b"")
    checked = subprocess.run(
        [sys.executable, "-m", "dskd", "check-data", tmp_path], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0 and "stray\\udcfc.png is not read" in checked.stdout, checked.stderr
    told = dskd("train", "--data", tmp_path, "--out", tmp_path / "detector", *TINY)
    assert told.code == 0, told.err
    assert all(name.startswith("f\udcfcr") for name in read_record(tmp_path / "detector").validation_files)


def test_textures_of_a_folder_are_recorded(mvtec_root: Path, tmp_path: Path) -> None:
    words = ["train", "--data", mvtec_root, "--category", "tile", *TINY]
    textures = mvtec_root / "wood/train/good"
    assert dskd(*words, "--out", tmp_path / "drawn").code == 0
    assert dskd(*words, "--out", tmp_path / "given", "--textures", textures).code == 0
    drawn, given = read_record(tmp_path / "drawn"), read_record(tmp_path / "given")
    assert (drawn.num_textures, drawn.textures_sha256) == (0, "")
    assert (given.num_textures, given.textures_sha256) == (12, fingerprint(sorted(textures.iterdir())))
    assert drawn.data_sha256 == given.data_sha256


def test_a_failed_export_ends_in_one_line_and_leaves_nothing(
    trained: tuple[Path, CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = importlib.import_module("dskd.export")
    monkeypatch.setattr(export, "build_model", lambda *_: importlib.import_module("onnx").ModelProto())
    outcome = dskd("export", trained[0], "--onnx", tmp_path / "wood.onnx")
    assert outcome.code == 1 and outcome.out == "" and list(tmp_path.iterdir()) == []
    assert len(outcome.err) == 2 and "export failed, nothing was written: onnxruntime cannot run" in outcome.err[1]


class Place(NamedTuple):
    """What the bad commands are made of; `new` must not appear."""

    data: Path
    detector: Path
    tmp: Path

    @property
    def new(self) -> Path:
        return self.tmp / "new"


def train_words(place: Place, *more: object, data: object = None, category: str = "tile") -> list[object]:
    return ["train", "--data", data or place.data, "--category", category, "--out", place.new, *TINY, *more]


def with_file(place: Place, name: str, content: bytes) -> Path:
    (place.tmp / name).parent.mkdir(parents=True, exist_ok=True)
    (place.tmp / name).write_bytes(content)
    return place.tmp / name


def broken_data(place: Place) -> Path:
    shutil.copytree(place.data / "tile", place.tmp / "data/tile")
    with_file(place, "data/tile/train/good/005.png", b"not an image")
    return place.tmp / "data"


def broken_detector(place: Place) -> Path:
    shutil.copytree(place.detector, place.tmp / "broken")
    with_file(place, f"broken/{WEIGHTS_FILE}", b"short")
    return place.tmp / "broken"


def image(place: Place) -> Path:
    return place.data / "tile/test/good/000.png"


BAD: dict[str, tuple[Callable[[Place], list[Any]], str]] = {
    "missing data": (lambda p: train_words(p, data=p.tmp / "nowhere"), "nowhere does not exist"),
    "data of another layout": (lambda p: train_words(p, data=p.data / "tile/test"), "no category in"),
    "unknown category": (lambda p: train_words(p, category="screw"), "it holds: tile, wood"),
    "no category chosen": (
        lambda p: ["train", "--data", p.data, "--out", p.new, *TINY],
        "several categories, choose one with --category: tile, wood",
    ),
    "unreadable training image": (lambda p: train_words(p, data=broken_data(p)), "005.png is not a readable image"),
    "textures of no image": (lambda p: train_words(p, "--textures", p.tmp), "no texture in"),
    "checking missing data": (lambda p: ["check-data", p.tmp / "nowhere"], "nowhere does not exist"),
    "checking data of another layout": (lambda p: ["check-data", p.tmp], "no category in"),
    "checking at no size": (
        lambda p: ["check-data", p.data, "--image-size", "0"],
        "image_size must be positive and at most 8192, got 0",
    ),
    "missing teacher": (lambda p: train_words(p, "--teacher-weights", p.tmp / "no.pth"), "no.pth"),
    "unknown backbone": (lambda p: train_words(p, "--backbone", "resnet17"), "resnet17"),
    "unknown device": (lambda p: train_words(p, "--device", "tpu"), "--device must be auto, cpu, cuda or cuda:N"),
    "diverging": (lambda p: train_words(p, "--learning-rate", "1e30", "--epochs", "4"), "learning_rate 1e+30"),
    "diverging in stage I": (
        lambda p: train_words(
            p, "--preset", "aand", "--amplification-learning-rate", "1e30", "--amplification-batch-size", "4"
        ),
        "stage I) is not finite",
    ),
    "output below a file": (
        lambda p: [*train_words(p), "--out", with_file(p, "file", b"") / "detector"],
        "file is no folder that you may write to",
    ),
    "training into another folder": (lambda p: [*train_words(p), "--out", p.data], "is not a detector folder"),
    "evaluating no detector": (lambda p: ["evaluate", p.tmp, "--data", p.data], f"it has no {RECORD_FILE}"),
    "evaluating a damaged detector": (
        lambda p: ["evaluate", broken_detector(p), "--data", p.data],
        f"{WEIGHTS_FILE} was changed or cut short",
    ),
    "evaluating an unknown category": (
        lambda p: ["evaluate", p.detector, "--data", p.data, "--category", "screw"],
        "no category 'screw'",
    ),
    "predicting with no detector": (lambda p: ["predict", p.tmp, image(p), "--out", p.new], RECORD_FILE),
    "predicting a missing image": (
        lambda p: ["predict", p.detector, p.tmp / "gone.png", "--out", p.new],
        "gone.png does not exist",
    ),
    "a threshold that is no number": (
        lambda p: ["predict", p.detector, image(p), "--out", p.new, "--threshold", "nan"],
        "--threshold must be a finite number, got nan",
    ),
    "an infinite threshold": (
        lambda p: ["predict", p.detector, image(p), "--out", p.new, "--threshold=-inf"],
        "--threshold must be a finite number, got -inf",
    ),
    "predicting an empty folder": (lambda p: ["predict", p.detector, p.tmp, "--out", p.new], "holds no image"),
    "predicting into an existing folder": (
        lambda p: ["predict", p.detector, image(p), "--out", p.tmp],
        "results are never overwritten",
    ),
    "exporting no detector": (lambda p: ["export", p.tmp, "--onnx", p.new], f"it has no {RECORD_FILE}"),
    "exporting onto another file": (
        lambda p: ["export", p.detector, "--onnx", with_file(p, "notes.txt", b"notes")],
        "is not a detector exported by dskd; choose another --onnx",
    ),
    "exporting with a missing image": (
        lambda p: ["export", p.detector, "--onnx", p.new, "--images", p.tmp / "gone.png"],
        "gone.png does not exist",
    ),
    "an impossible opset": (
        lambda p: ["export", p.detector, "--onnx", p.new, "--opset", "9"],
        "--opset must lie in 18 to 25, got 9",
    ),
    "an impossible rate": (
        lambda p: ["predict", p.detector, image(p), "--out", p.new, "--false-alarm-rate", "0"],
        "--false-alarm-rate must lie in (0, 1)",
    ),
    "a page that answers nobody": (
        lambda p: ["page", p.detector, "--requests-per-minute", "0"],
        "--requests-per-minute must be at least 1",
    ),
}


COUNTED = "tile: 12 training, 0 validation, 8 test images"


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    kind: str, mvtec_root: Path, detector_folder: Path, tmp_path: Path
) -> None:
    words, message = BAD[kind]
    command = words(Place(mvtec_root, detector_folder, tmp_path))
    before = sorted(tmp_path.rglob("*"))
    outcome = dskd(*command)
    assert outcome.code == 2, outcome
    said = [line for line in outcome.err if line not in (UNTRAINED_TEACHER, COUNTED)]
    assert len(said) == 1 and said[0].startswith("dskd: error: ") and message in said[0], outcome.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", [["--image-size", "33"], ["--epochs", "0"], ["--lr", "1"], ["--preset", "patchcore"]])
def test_a_bad_flag_is_refused_before_anything_is_read(flag: list[str], tmp_path: Path) -> None:
    outcome = dskd("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "new", *flag)
    assert outcome.code == 2 and outcome.out == ""
    assert flag[0].lstrip("-").replace("-", "_") in " ".join(outcome.err).replace("-", "_")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_comes_without_torch(words: list[str]) -> None:
    body = (
        "import sys\nfrom dskd.cli.main import main\n"
        f"try:\n    main({words})\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('loaded', *sorted({'torch', 'timm', 'numpy', 'scipy', 'PIL'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.split() == ["loaded"]
    assert "--image-size" in done.stdout if "train" in words else "evaluate" in done.stdout


def test_images_of_every_suffix_are_found_below_a_folder(detector_folder: Path, tmp_path: Path) -> None:
    for suffix in IMAGE_SUFFIXES:
        path = tmp_path / "in" / suffix[1:] / f"part{suffix.upper()}"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (40, 30), (90, 120, 30)).save(path)
    (tmp_path / "in/notes.txt").write_text("no image")
    assert dskd("predict", detector_folder, tmp_path / "in", "--out", tmp_path / "out").code == 0
    assert len((tmp_path / "out/predictions.jsonl").read_text().splitlines()) == len(IMAGE_SUFFIXES)


def test_the_largest_image_is_a_flag_and_an_environment_variable(
    trained: tuple[Path, CommandResult], mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = mvtec_root / "wood/test/good"
    monkeypatch.setenv("DSKD_MAX_MEGAPIXELS", "0.001")  # 64 x 64 pixels are 0.004
    refused = dskd("predict", trained[0], images, "--out", tmp_path / "refused")
    assert refused.code == 1 and "allow more with --max-megapixels" in "".join(refused.err)
    allowed = dskd("predict", trained[0], images, "--out", tmp_path / "allowed", "--max-megapixels", 1)
    assert allowed.code == 0
    for given in ("none", "nan", "-1"):
        monkeypatch.setenv("DSKD_MAX_MEGAPIXELS", given)
        wrong = dskd("check-data", mvtec_root)
        assert wrong.code == 2 and f"above 0, got '{given}'" in wrong.err[-1]


def test_a_cache_folder_that_cannot_be_made_says_which_flags_help(mvtec_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    words = ("--data", mvtec_root, "--category", "tile", "--teacher-weights", "random", "--image-size", 32)
    told = dskd("train", *words, "--out", tmp_path / "out", "--cache-dir", tmp_path / "file" / "cache")
    assert told.code == 2 and "cannot be made" in told.err[-1] and "--cache-gb 0" in told.err[-1]
