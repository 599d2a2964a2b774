import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dskd.calibration import calibrate
from dskd.checkpoint import write_detector
from dskd.config import AmplificationConfig, DataSpec, RunConfig, Selection, TeacherSource
from dskd.data.cache import ArrayCache
from dskd.data.geometry import Geometry
from dskd.data.images import load_framed, read_mask, resize_mask
from dskd.detector import Detector
from dskd.evaluate import compute_metrics, score_images
from dskd.metrics import Scores
from dskd.model.amplification import AmplifiedTeacher, build_amplifier
from dskd.model.network import build_students
from dskd.model.teacher import Teacher, normalize
from dskd.training.inputs import TrainingData, prepare
from dskd.training.run import TrainingRun, objective
from dskd.training.stage_one import AmplificationEpoch, amplifier_optimizer, fit_amplifier

CPU = torch.device("cpu")
AMPLIFIED = AmplificationConfig(amplification=True, amplification_epochs=2, amplification_batch_size=4, memory_size=5)


def prepared(
    config: RunConfig,
    data: Path,
    cache: ArrayCache | None = None,
    textures: Path | None = None,
    selection: Selection = "val",
    **options: Any,
) -> TrainingData:
    spec = DataSpec(data=data, category="tile", teacher=TeacherSource("random"), textures=textures, selection=selection)
    return prepare(config, spec, device=CPU, cache=cache, **options)


def test_held_out_images_take_no_part_in_training(tiny: RunConfig, inputs: TrainingData, mvtec_root: Path) -> None:
    names = {path.name for path in (mvtec_root / "tile/train/good").iterdir()}
    held = {*inputs.validation_files, *inputs.calibration_files}
    assert len(held) == 4 and held < names
    normals = np.concatenate([inputs.validation.images[~inputs.validation.labels], inputs.calibration_images])
    assert len(inputs.train_images) == len(names) - len(held) and len(normals) == len(held)
    for image in normals:
        assert not (inputs.train_images == image).all(axis=(1, 2, 3)).any()


def test_validation_is_normals_and_their_copies_with_masked_defects(inputs: TrainingData) -> None:
    images, masks, labels, has_mask, sources = inputs.validation[:5]
    assert has_mask.all()
    num_normals = int((~labels).sum())
    assert labels.tolist() == [False] * num_normals + [True] * 32
    assert not masks[~labels].any() and masks[labels].any(axis=(1, 2)).all()
    for index in np.flatnonzero(labels):
        original = images[sources[index]]
        change = np.abs(images[index].astype(int) - original).sum(axis=-1)
        assert change[masks[index]].mean() > 10 * change[~masks[index]].mean()


def test_the_detector_scores_as_its_search_of_score_parameters_found(tiny: RunConfig, inputs: TrainingData) -> None:
    searching = tiny.with_values({"score_candidates": 40})
    run = TrainingRun.begin(searching, inputs, CPU)
    list(run.intervals())
    record, _ = run.detector()
    assert record.metrics["val/score_candidates"] == 0, "two held-out images are too few to measure a gain on"
    assert record.config == searching and record.metrics["val/objective"] == run.best_objective

    # As if each defective copy were an image of its own: enough sources to halve.
    count = len(inputs.validation.labels)
    truth = inputs.validation._replace(sources=np.arange(count), labels=np.arange(count) % 2 == 0)
    run.inputs = inputs._replace(validation=truth)
    run.best_scores = compute_metrics(
        score_images(inputs.validation_features, run.students, truth.images, tiny, CPU), truth
    )
    record, _ = run.detector()
    assert record.metrics["val/score_candidates"] == 42
    seen = score_images(inputs.validation_features, run.students, truth.images, record.config, CPU)
    assert record.metrics["val/objective"] == objective(compute_metrics(seen, truth)) >= objective(run.best_scores)
    calibrated = score_images(inputs.calibration_features, run.students, inputs.calibration_images, record.config, CPU)
    expected = [limit.value for limit in calibrate(calibrated.scores.tolist())]
    assert [limit.value for limit in record.thresholds] == pytest.approx(expected, rel=1e-5)


def test_the_test_split_is_never_opened(
    tiny: RunConfig, inputs: TrainingData, mvtec_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(mvtec_root / "tile", tmp_path / "tile")
    for part in ("test", "ground_truth"):
        for image in (tmp_path / "tile" / part).rglob("*.png"):
            image.write_text("not an image at all")
    blind = prepared(tiny, tmp_path)
    assert blind.data_sha256 == inputs.data_sha256
    np.testing.assert_array_equal(blind.validation.images, inputs.validation.images)
    assert [p.scores for p in TrainingRun.begin(tiny, blind, CPU).intervals()] == [
        p.scores for p in TrainingRun.begin(tiny, inputs, CPU).intervals()
    ]


def test_a_changed_training_image_changes_the_fingerprint(
    tiny: RunConfig, inputs: TrainingData, mvtec_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(mvtec_root / "tile", tmp_path / "tile")
    assert prepared(tiny, tmp_path).data_sha256 == inputs.data_sha256
    for name in (inputs.validation_files[0], inputs.calibration_files[0], "000.png"):
        shutil.copy(mvtec_root / "wood/train/good/000.png", tmp_path / "tile/train/good" / name)
        assert prepared(tiny, tmp_path).data_sha256 != inputs.data_sha256


def test_the_cache_changes_nothing_but_the_work(
    tiny: RunConfig, inputs: TrainingData, mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ArrayCache(tmp_path / "cache", 10**9)
    filled = prepared(tiny, mvtec_root, cache)
    written = {file: file.stat().st_ino for file in (tmp_path / "cache").glob("*.npy")}
    for place in ("dskd.training.reading.load_images", "dskd.model.features.progress_bar"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("computed a second time"))
    again = prepared(tiny, mvtec_root, ArrayCache(tmp_path / "cache", 10**9))
    monkeypatch.undo()
    assert written and {file: file.stat().st_ino for file in (tmp_path / "cache").glob("*.npy")} == written
    for found in (filled, again):
        np.testing.assert_array_equal(found.train_images, inputs.train_images)
        np.testing.assert_array_equal(found.train_features.rows, inputs.train_features.rows)
        np.testing.assert_array_equal(found.validation_features.rows, inputs.validation_features.rows)
        assert found.train_features.shapes == inputs.train_features.shapes


def with_validation(root: Path, mvtec_root: Path) -> Path:
    """The tiles with two good images and three scratched ones moved from test to validation, one without its mask."""
    tile = Path(shutil.copytree(mvtec_root / "tile", root / "tile"))
    for source, target, names in (
        ("test/good", "validation/good", ("000.png", "001.png")),
        ("test/scratch", "validation/scratch", ("000.png", "001.png", "002.png")),
        ("ground_truth/scratch", "validation_ground_truth/scratch", ("000_mask.png", "001_mask.png")),
    ):
        (tile / target).mkdir(parents=True)
        for name in names:
            (tile / source / name).rename(tile / target / name)
    (tile / "ground_truth/scratch/002_mask.png").unlink()
    return tile


def test_validation_images_of_the_user_are_held_out_and_judge(
    tiny: RunConfig, inputs: TrainingData, mvtec_root: Path, tmp_path: Path
) -> None:
    tile = with_validation(tmp_path, mvtec_root)
    found = prepared(tiny, tmp_path)
    assert len(found.train_images) == 12 and found.num_validation_defects == 3
    held = {*found.validation_files, *found.calibration_files}
    assert held == {"validation/good/000.png", "validation/good/001.png"} and len(found.calibration_files) == 1
    images, masks, labels, has_mask, sources = found.validation[:5]
    assert sources.tolist() == [0] * 33 + [1, 2, 3]
    assert labels.tolist() == [False] + [True] * 35
    assert has_mask.tolist() == [True] * 35 + [False]
    scratched = [load_framed(tile / f"validation/scratch/00{index}.png", Geometry.square(32)).rgb for index in range(3)]
    np.testing.assert_array_equal(images[-3:], scratched)
    drawn = [
        resize_mask(read_mask(tile / f"validation_ground_truth/scratch/00{index}_mask.png"), 32) for index in range(2)
    ]
    np.testing.assert_array_equal(masks[-3:-1], drawn)
    assert masks[-2].any() and not masks[-1].any()
    run = TrainingRun.begin(tiny, found, CPU)
    (last,) = [each for each in run.intervals() if each.interval.number == 1]
    seen = score_images(found.validation_features, run.students, images, tiny, CPU)
    assert last.scores == compute_metrics(seen, found.validation)
    assert last.scores != compute_metrics(seen, found.validation._replace(has_mask=np.ones_like(has_mask)))
    record, _ = run.detector()
    assert record.num_validation_defects == 3 and record.thresholds[0].num_normals == 1
    # the mask is part of the data: another one, another fingerprint
    shutil.copy(
        tile / "validation_ground_truth/scratch/000_mask.png", tile / "validation_ground_truth/scratch/001_mask.png"
    )
    assert prepared(tiny, tmp_path).data_sha256 != found.data_sha256


def test_labelled_defects_without_normals_leave_the_seeded_split(
    tiny: RunConfig, inputs: TrainingData, mvtec_root: Path, tmp_path: Path
) -> None:
    tile = with_validation(tmp_path, mvtec_root)
    shutil.rmtree(tile / "validation/good")
    found = prepared(tiny, tmp_path)
    assert found.validation_files == inputs.validation_files and found.num_validation_defects == 3
    np.testing.assert_array_equal(found.train_images, inputs.train_images)
    for joined, alone in zip(found.validation[:5], inputs.validation[:5], strict=True):
        np.testing.assert_array_equal(np.asarray(joined)[:-3], np.asarray(alone))


def test_textures_change_some_of_the_drawn_defects_and_their_cached_features(
    tiny: RunConfig, inputs: TrainingData, mvtec_root: Path, tmp_path: Path
) -> None:
    cache = ArrayCache(tmp_path / "cache", 10**9)
    assert prepared(tiny, mvtec_root, cache).num_textures == 0
    shutil.copytree(mvtec_root / "wood/train/good", tmp_path / "textures/deep/er")
    found = [
        prepared(tiny, mvtec_root, cache, textures=folder)
        for folder in (tmp_path / "textures", mvtec_root / "wood/train")
    ]
    assert [each.num_textures for each in found] == [12, 12]
    # the same pictures in another place, the same defects
    assert found[0].textures_sha256 == found[1].textures_sha256
    np.testing.assert_array_equal(found[0].validation.images, found[1].validation.images)
    changed = (found[0].validation.images != inputs.validation.images).any(axis=(1, 2, 3))
    assert not changed[~inputs.validation.labels].any() and 0.1 < changed[2:].mean() < 0.6
    fresh = prepared(tiny, mvtec_root, textures=tmp_path / "textures")
    np.testing.assert_array_equal(found[0].validation_features.rows, fresh.validation_features.rows)
    rows = found[0].validation_features.rows != inputs.validation_features.rows
    np.testing.assert_array_equal(np.asarray(rows).any(axis=1), changed)


def test_a_feature_row_is_the_teachers_pyramid_of_that_image(inputs: TrainingData) -> None:
    order = np.array([7, 0, 3])
    pyramid = inputs.train_features.pyramid(order, CPU)
    expected = inputs.teacher(normalize(torch.from_numpy(inputs.train_images[order])))
    assert [level.shape for level in pyramid] == [level.shape for level in expected]
    for level, wanted in zip(pyramid, expected, strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-5)


def test_objective_is_the_mean_of_image_auroc_and_aupro() -> None:
    scores = Scores(image_auroc=0.8, image_ap=0, image_f1_max=0, pixel_auroc=0, pixel_ap=0, pixel_f1max=0, aupro=0.5)
    assert objective(scores) == pytest.approx(0.65)


def test_the_students_of_the_best_validation_are_kept(tiny: RunConfig, inputs: TrainingData) -> None:
    run = TrainingRun.begin(tiny.with_values({"epochs": 6, "learning_rate": 0.05}), inputs, CPU)
    states, progress = [], []
    for each in run.intervals():
        states.append({name: value.clone() for name, value in run.students.state_dict().items()})
        progress.append(each)
    objectives = [each.objective for each in progress]
    assert objectives == [objective(each.scores) for each in progress]
    best = int(np.argmax(objectives))
    assert best < len(objectives) - 1, "these settings are expected to get worse again, or the test shows nothing"
    assert [each.best_objective for each in progress] == np.maximum.accumulate(objectives).tolist()
    record, weights = run.detector()
    assert record.step == 2 * (best + 1) and record.metrics["val/objective"] == max(objectives)
    assert {name: record.metrics[f"val/{name}"] for name in Scores._fields} == progress[best].scores._asdict()
    for name, value in states[best].items():
        assert torch.equal(weights[f"students.{name}"], value)
    for name, value in inputs.teacher.state_dict().items():
        assert torch.equal(weights[f"teacher.{name}"], value)


def test_thresholds_are_calibrated_on_the_held_out_normals_alone(tiny: RunConfig, inputs: TrainingData) -> None:
    run = TrainingRun.begin(tiny, inputs, CPU)
    list(run.intervals())
    record, _ = run.detector()
    students = build_students(tiny.model, inputs.teacher, 0)
    students.load_state_dict(run.best_weights)
    scores = score_images(inputs.teacher, students, inputs.calibration_images, tiny, CPU).scores
    for found, wanted in zip(record.thresholds, calibrate(scores.tolist()), strict=True):
        assert tuple(found) == pytest.approx(tuple(wanted), rel=1e-4)
    assert not record.is_approximate


def test_calibration_images_change_no_weight_and_no_choice(
    tiny: RunConfig, inputs: TrainingData, mvtec_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(mvtec_root / "tile", tmp_path / "tile")
    for name in inputs.calibration_files:
        shutil.copy(mvtec_root / "wood/train/good" / name, tmp_path / "tile/train/good" / name)
    config = tiny.with_values({"epochs": 5, "learning_rate": 0.05})
    runs = [TrainingRun.begin(config, each, CPU) for each in (inputs, prepared(config, tmp_path))]
    one, other = ([progress[1:] for progress in run.intervals()] for run in runs)
    assert one == other
    (first, weights), (second, same) = (run.detector() for run in runs)
    assert first.step == second.step and first.metrics == second.metrics
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert first.thresholds != second.thresholds, "the thresholds alone rest on them"


def test_without_a_share_for_calibration_the_held_out_normals_serve_both(tiny: RunConfig, mvtec_root: Path) -> None:
    shared = prepared(tiny.with_values({"calibration_fraction": 0.0}), mvtec_root)
    assert shared.calibration_files == shared.validation_files and len(shared.validation_files) == 4
    np.testing.assert_array_equal(shared.calibration_images, shared.validation.images[~shared.validation.labels])
    run = TrainingRun.begin(tiny.with_values({"calibration_fraction": 0.0, "epochs": 1}), shared, CPU)
    list(run.intervals())
    record, _ = run.detector()
    assert record.is_approximate and record.thresholds[0].num_normals == 4
    assert '"false_alarm_rates": "approximate"' in record.to_json("")


def test_the_record_says_what_the_detector_rests_on(tiny: RunConfig, inputs: TrainingData, tmp_path: Path) -> None:
    run = TrainingRun.begin(tiny, inputs, CPU)
    list(run.intervals())
    record, weights = run.detector("c0ffee")
    assert (record.category, record.config, record.revision) == ("tile", tiny, "c0ffee")
    assert record.teacher == "random" and record.is_untrained_teacher
    assert record.validation_files == inputs.validation_files
    assert record.calibration_files == inputs.calibration_files
    write_detector(tmp_path / "tile", record, weights)
    loaded = Detector.load(tmp_path / "tile")
    assert loaded.record == record
    images = inputs.train_images
    expected = score_images(inputs.teacher, run.students, images, tiny, CPU).maps
    np.testing.assert_allclose(loaded.score_images(images).maps, expected, rtol=1e-5)
    assert loaded.score_images(inputs.calibration_images).scores.tolist() == list(record.normal_scores)


def test_a_local_teacher_is_named_by_its_file(
    tiny: RunConfig, inputs: TrainingData, mvtec_root: Path, tmp_path: Path
) -> None:
    torch.save(inputs.teacher.features.state_dict(), tmp_path / "mine.pth")
    found = prepare(
        tiny,
        DataSpec(data=mvtec_root, category="tile", teacher=TeacherSource(str(tmp_path / "mine.pth"))),
        device=CPU,
        cache=None,
    )
    assert found.teacher_source == "mine.pth"
    assert found.teacher_sha256 == inputs.teacher_sha256


@pytest.fixture(scope="module")
def amplified(tiny: RunConfig) -> RunConfig:
    return dataclasses.replace(tiny, amplification=AMPLIFIED)


def test_stage_one_amplifies_the_teacher_that_all_that_follows_sees(
    amplified: RunConfig, inputs: TrainingData, mvtec_root: Path
) -> None:
    heard: list[AmplificationEpoch] = []
    found = prepared(amplified, mvtec_root, on_amplification=heard.append)
    assert [epoch.number for epoch in heard] == [0, 1]
    assert isinstance(found.teacher, AmplifiedTeacher)
    assert found.teacher_sha256 == inputs.teacher_sha256, "that of the pretrained weights"
    expected = build_amplifier(inputs.teacher, 5, 0)
    optimizer = amplifier_optimizer(expected, AMPLIFIED)
    list(fit_amplifier(expected, optimizer, inputs.teacher, inputs.train_images, AMPLIFIED, device=CPU))
    for name, value in found.teacher.amplifier.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    for table, plain, images in (
        (found.train_features, inputs.train_features, found.train_images),
        (found.validation_features, inputs.validation_features, found.validation.images),
    ):
        pyramid = table.pyramid(np.array([3, 1]), CPU)
        wanted = found.teacher(normalize(torch.from_numpy(images[[3, 1]])))
        for level, expected_level in zip(pyramid, wanted, strict=True):
            torch.testing.assert_close(level, expected_level, rtol=1e-4, atol=1e-5)
        assert not np.allclose(table.rows, plain.rows)


def test_a_finished_stage_one_is_not_done_again_and_another_one_is_not_taken_for_it(
    amplified: RunConfig, mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ArrayCache(tmp_path / "cache", 10**9)
    first = prepared(amplified, mvtec_root, cache)
    uncached = prepared(amplified, mvtec_root)
    other = prepared(amplified.with_values({"amplification_learning_rate": 0.001}), mvtec_root, cache)
    plain = prepared(amplified.with_values({"amplification": False}), mvtec_root, cache)
    monkeypatch.setattr("dskd.training.inputs.fit_amplifier", lambda *_, **__: pytest.fail("stage I once more"))
    again = prepared(amplified, mvtec_root, ArrayCache(tmp_path / "cache", 10**9))
    for name, value in first.teacher.state_dict().items():
        assert torch.equal(value, again.teacher.state_dict()[name])
        assert torch.equal(value, uncached.teacher.state_dict()[name])
    np.testing.assert_array_equal(first.train_features.rows, again.train_features.rows)
    for different in (other, plain):
        assert not np.array_equal(first.train_features.rows, different.train_features.rows)
        assert not np.array_equal(first.validation_features.rows, different.validation_features.rows)


def test_a_stage_one_that_was_killed_leaves_nothing_behind(
    amplified: RunConfig, mvtec_root: Path, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def die(epoch: AmplificationEpoch) -> None:
        raise Killed

    with pytest.raises(Killed):
        prepared(amplified, mvtec_root, ArrayCache(tmp_path / "cache", 10**9), on_amplification=die)
    heard: list[AmplificationEpoch] = []
    prepared(amplified, mvtec_root, ArrayCache(tmp_path / "cache", 10**9), on_amplification=heard.append)
    assert len(heard) == 2


@pytest.mark.parametrize("wiring", [{}, {"student_encoder": False, "decoder_input": "teacher"}])
def test_a_detector_with_an_amplified_teacher_loads_to_the_same_maps(
    amplified: RunConfig, mvtec_root: Path, tmp_path: Path, wiring: dict[str, Any]
) -> None:
    config = amplified.with_values({**wiring, "epochs": 1})
    run = TrainingRun.begin(config, prepared(config, mvtec_root, ArrayCache(tmp_path / "cache", 10**9)), CPU)
    list(run.intervals())
    write_detector(tmp_path / "tile", *run.detector())
    loaded = Detector.load(tmp_path / "tile")
    assert loaded.record.config == config
    images = run.inputs.validation.images
    seen = score_images(run.inputs.teacher, run.students, images, config, CPU)
    np.testing.assert_allclose(loaded.score_images(images).maps, seen.maps, rtol=1e-5)
    plain = score_images(Teacher(run.inputs.teacher.features), run.students, images, config, CPU)
    assert not np.allclose(plain.maps, seen.maps), "the amplifier takes part in what the detector sees"


def test_a_run_is_refused_the_inputs_of_another_stage_one(amplified: RunConfig, inputs: TrainingData) -> None:
    with pytest.raises(ValueError, match="the same amplification") as raised:
        TrainingRun.begin(amplified, inputs, CPU)
    assert "\n" not in str(raised.value)


def test_batches_of_one_image_and_one_position_are_explained_before_training(mvtec_root: Path, tiny: RunConfig) -> None:
    deep = tiny.with_values({"levels": (1, 2, 3), "level_weights": (1,) * 3, "score_level_weights": (1,) * 3})
    config = deep.with_values({"batch_size": 1})
    spec = DataSpec(data=mvtec_root, category="tile", teacher=TeacherSource("random"))
    inputs = prepare(config, spec, device=torch.device("cpu"), cache=None)
    with pytest.raises(ValueError, match=r"batches of one image of 32 x 32 pixels .* raise --batch-size"):
        TrainingRun.begin(config, inputs, torch.device("cpu"))
    TrainingRun.begin(deep, inputs, torch.device("cpu"))
