"""`tune/train.py`: its flags, the runs that it repeats, and what decides whether a training is the same."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from dskd.config import RunConfig, TeacherSource
from dskd.presets import PRESETS
from tune import train
from tune.jobs import train as training
from tune.settings.train import TrainingSettings
from tune.settings.workers import Workers
from tune.storage import staging
from tune.tracking.events import EpochDone, TrialEnded, TrialStarted
from tune.tracking.runs import TrackedRun, config_of, tracked_run, tracking_store
from tune.tracking.tracker import Tracker
from tune.trial.spec import build_spec


def settings(**values: Any) -> TrainingSettings:
    defaults: dict[str, Any] = {
        "config": RunConfig(), "data": "data", "category": "tile", "out": Path("detector"), "name": "train",
        "workers": 1, "gpus_per_worker": None, "cpus_per_worker": 1.0, "teacher_weights": "random",
        "storage": "results", "tracking_uri": None, "address": None, "cache_gb": 1.0,
    }  # fmt: skip
    return TrainingSettings(**defaults | values)


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_comes_back_exactly_from_the_texts_of_a_run(name: str) -> None:
    config = PRESETS[name].with_values(
        {"learning_rate": 0.1 + 0.2, "level_weights": (1 / 3, 2e-17, 1.0), "embedding_depth": 3, "seed": 2**40}
    )
    params = {field: str(value) for field, value in config.flat().items()}
    assert config_of(params | {"teacher_weights": "hub", "num_workers": "2"}) == config


def test_a_text_that_is_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter epochs of the run is 'many', which is no value of that field"):
        config_of({"epochs": "many"})
    with pytest.raises(ValueError, match="epochs must be of type int"):
        config_of({"epochs": "1.5"})


def test_a_run_of_the_time_when_every_length_was_in_epochs_comes_back() -> None:
    params = {field: str(value) for field, value in PRESETS["aand"].with_values({"epochs": 120}).flat().items()}
    del params["steps"], params["patience"]
    config = config_of(params)
    assert config == PRESETS["aand"].with_values({"epochs": 120}) and config.train.steps is None


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, RunConfig]:
    """A tracking store, a run in it as a training leaves it, and the run's configuration."""
    folder = tmp_path_factory.mktemp("tracked")
    uri, config = f"sqlite:///{folder}/mlflow.db", PRESETS["aand"].with_values({"epochs": 3})
    tracker = Tracker(
        uri, "train", artifact_location=f"file://{folder}/artifacts", unsent=folder / "unsent", has_parents=False,
        tags={"mlflow.source.git.commit": "1234567890abcdef", "mlflow.source.name": "tune/train.py",
              "dskd.selection": "oracle"},
    )  # fmt: skip
    told = {"teacher_weights": "resnet.pth", "textures": "dtd", "num_workers": 2}
    tracker.put(TrialStarted("tile", "k", config.flat() | told))
    tracker.put(EpochDone("tile", "k", 1, {"val/best_objective": 0.5}, 1))
    tracker.put(TrialEnded("tile", "k", "finished", ""))
    (folder / "detector").mkdir()
    (folder / "detector" / "detector.json").write_text("{}")
    tags = {"dskd.data_sha256": "f00d"}
    run_id = tracker.log_detector("tile", "k", folder / "detector", {"test/aupro": 0.25}, tags, 60)
    assert tracker.close(60) == 0
    return uri, run_id, config


def test_a_training_is_one_run_that_can_be_repeated(tracked: tuple[str, str, RunConfig]) -> None:
    uri, run_id, config = tracked
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("train")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "tile-k" and run.info.status == "FINISHED"
    assert run.data.metrics == {"val/best_objective": 0.5, "test/aupro": 0.25}
    assert "mlflow.parentRunId" not in run.data.tags and run.data.tags["mlflow.source.name"] == "tune/train.py"
    assert [file.path for file in client.list_artifacts(run_id, "detector")] == ["detector/detector.json"]
    assert tracked_run(uri, run_id) == TrackedRun(
        run_id, config, (), "tile", "resnet.pth", "dtd", "oracle", "f00d", "1234567890abcdef"
    )


def test_runs_that_cannot_be_repeated_are_refused(tracked: tuple[str, str, RunConfig], tmp_path: Path) -> None:
    uri, _, _ = tracked
    with pytest.raises(ValueError, match="no run 'beef' in MLflow"):
        tracked_run(uri, "beef")
    client = MlflowClient(tracking_uri=uri)
    parent = client.create_run(client.create_experiment("search"), tags={"dskd.category": "tile"}).info.run_id
    with pytest.raises(ValueError, match="is no training: it has no parameters"):
        tracked_run(uri, parent)
    with pytest.raises(ValueError, match="--from-run needs --tracking-uri"):
        tracking_store(None, str(tmp_path))
    assert tracking_store("http://m", None) == "http://m"


def test_a_run_to_repeat_gives_all_that_is_not_given(
    tracked: tuple[str, str, RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Also the textures of its synthetic defects and what chose its step, which were once dropped in silence."""
    uri, run_id, config = tracked
    asked: list[TrainingSettings] = []

    def stop(settings: TrainingSettings, run: TrackedRun | None) -> None:
        asked.append(settings)
        raise training.TrainingError("far enough")

    monkeypatch.setattr(training, "_trained", stop)
    line = (
        f"--data d --out t --from-run {run_id} --tracking-uri {uri} --teacher-weights x/other.pth --epochs 5 "
        f"--textures {tmp_path}/dtd"
    )
    monkeypatch.setattr(sys, "argv", ["tune/train.py", *line.split()])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 1
    (settings,) = asked
    assert settings.config == config.with_values({"epochs": 5}) and settings.category == "tile"
    assert settings.selection == "oracle" and settings.textures == tmp_path / "dtd"
    said = capsys.readouterr().err
    assert "epochs 5 (there 3)" in said and "another teacher than run" in said and "revision 1234567890ab" in said
    assert "textures" not in said and "selection" not in said, "they are the run's own"

    in_steps = line.replace("--epochs 5", "--steps 50")
    monkeypatch.setattr(sys, "argv", ["tune/train.py", *in_steps.split()])
    with pytest.raises(SystemExit):
        train.main()
    assert asked.pop().config == config.with_values({"steps": 50}), "a length replaces the run's, of whichever kind"
    assert "epochs None (there 3)" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["tune/train.py", *line.split(), "--steps", "50"])
    with pytest.raises(SystemExit) as end:
        train.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "--steps and --epochs exclude each other" in said

    monkeypatch.setattr(sys, "argv", ["tune/train.py", *line.split(), "--selection", "val", "--textures", "leaves"])
    with pytest.raises(SystemExit):
        train.main()
    said = capsys.readouterr().err
    assert asked[1].selection == "val"
    assert "another selection than run" in said and "oracle: val" in said and "dtd: leaves" in said


def test_a_run_whose_textures_or_teacher_nobody_can_find_says_which_flag_names_them(
    tracked: tuple[str, str, RunConfig],
) -> None:
    uri, run_id, config = tracked
    run = tracked_run(uri, run_id)
    asked = settings(config=config, teacher_weights=None)
    with pytest.raises(ValueError, match=f"run {run_id} fed its synthetic defects from the folder dtd; .* --textures"):
        training.repeat(asked, run)
    with pytest.raises(ValueError, match=r"had its teacher from the file resnet\.pth; name its path with --teacher-we"):
        training.repeat(dataclasses.replace(asked, textures=Path("x/dtd")), run)


def test_what_workers_are_told_of_a_repeated_run_is_what_it_was_told() -> None:
    """A search's trial and the training that repeats it are told the same, by one builder."""
    told = build_spec(
        RunConfig(), data="d", category="tile", teacher=TeacherSource("random"), textures="t/dtd", selection="oracle",
        cache_gb=1.0, workers=Workers(2, 1.0, 0.0), min_workers=None, workers_uri="w", revision="",
    )  # fmt: skip
    assert told.tracked_values() == {"teacher_weights": "random", "textures": "dtd", "num_workers": 2}
    assert (told.selection, told.textures) == ("oracle", str(Path("t/dtd").absolute()))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--out t", "tune/train.py: error: missing --data STR; see tune/train.py --help"),
        ("--data d --out t --epoch 3", "unknown flag --epoch, did you mean --epochs?"),
        ("--data d --out t --workers 0", "train: error: --workers must be at least 1 and at most 1,000, got 0"),
        ("--data d --out t --workers 17", "--workers 17 share a batch of 16 images; lower --workers or raise"),
        ("--data d --out t --storage s3://b/p", "with --storage s3://b/p give --tracking-uri too"),
        ("--data d --out t --from-run r --preset aand", "--from-run and --preset exclude each other"),
        ("--data /none --out {tmp}/t --storage {tmp}", "data folder /none does not exist"),
        ("--data {data} --out {tmp}/t --storage {tmp}", "holds several categories, choose one with --category: tile"),
        ("--data {data} --out {data} --storage {tmp}", "is not a detector folder"),
    ],
)
def test_bad_usage_is_one_line(
    line: str, expected: str, mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = line.format(tmp=tmp_path, data=mvtec_root).split()
    monkeypatch.setattr(sys, "argv", ["tune/train.py", *words])
    with pytest.raises(SystemExit) as end:
        train.main()
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and expected in said.err


def test_the_same_command_is_the_same_training_and_another_is_not(
    tiny: RunConfig,
    mvtec_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    shutil.copytree(mvtec_root, data)
    asked = settings(config=tiny, data=str(data), out=tmp_path / "t", storage=str(tmp_path / "s"))
    (data / "tile/train/good/notes.txt").write_text("no image")
    category, key = training._checked(asked)
    assert category == "tile"
    assert "tile: 12 training" in (said := capsys.readouterr().err) and "1 .txt" in said, "what is left out is told"
    same: list[dict[str, Any]] = [{"workers": 2}, {"out": tmp_path / "u"}, {"name": "other"}]
    assert {training._checked(dataclasses.replace(asked, **change))[1] for change in same} == {key}
    others: list[dict[str, Any]] = [
        {"config": tiny.with_values({"seed": 1})},
        {"category": "wood"},
        {"selection": "oracle"},
        {"textures": data / "wood/test/good"},
    ]
    assert key not in {training._checked(dataclasses.replace(asked, **change))[1] for change in others}
    os.utime(data / "tile/train/good/000.png", ns=(1, 1))
    assert training._checked(asked)[1] != key, "an image was replaced"
    with pytest.raises(ValueError, match="12 images to train on, too few for --workers 13"):
        training._checked(dataclasses.replace(asked, config=tiny.with_values({"batch_size": 16}), workers=13))
    assert staging.listing_key(str(data), "wood") == staging.listing_key(f"{data}/", "wood")


@pytest.mark.slow
def test_a_failed_training_is_one_line_exit_code_one_and_a_failed_run(
    tracked: tuple[str, str, RunConfig], tiny: RunConfig, mvtec_root: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    uri, _, _ = tracked

    def diverge(*_: object) -> str:
        raise training.TrainingError("learning_rate 9 is probably too high")

    monkeypatch.setattr(training, "connect", lambda address: None)
    monkeypatch.setattr(training, "cluster_nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(training, "_fit", diverge)
    storage = str(tmp_path / "s")
    asked = settings(
        config=tiny, data=str(mvtec_root), out=tmp_path / "t", storage=storage, tracking_uri=uri, name="bad"
    )
    assert training.train(dataclasses.replace(asked, json=True)) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines()[-1] == "train: failed: learning_rate 9 is probably too high"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("bad")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED" and run.data.params["epochs"] == "2" and not (tmp_path / "t").exists()
    crowded = dataclasses.replace(asked, workers=3)
    with pytest.raises(ValueError, match=r"asks for 3 CPUs \(3 workers\), the cluster has 2; lower --workers"):
        training.train(crowded)
