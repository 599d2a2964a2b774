"""`tune/demo.py`: its flags, and what it does where the hub of teacher weights is out of reach."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dskd.detector import Detector
from dskd.model.teacher import TeacherUnavailableError
from tune import demo
from tune.jobs import demo as job
from tune.jobs.demo import chosen_weights, inspect_test, next_free
from tune.settings.demo import DemoSettings

ROOT = Path(__file__).resolve().parents[1]
UNAVAILABLE = "cannot fetch teacher weights from the hub; give a local file with --teacher-weights FILE"


@pytest.fixture(params=[("hub",)])
def no_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the demo asked for, where the weights of the parameter are not at hand."""
    asked: list[tuple[str, str]] = []
    absent = request.param

    def build(backbone: str, levels: tuple[int, ...], weights: str) -> None:
        asked.append((backbone, weights))
        if weights in absent:
            raise TeacherUnavailableError(UNAVAILABLE)

    monkeypatch.setattr(job, "build_teacher", build)
    return asked


def ended(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["tune/demo.py", *line.split()])
    with pytest.raises(SystemExit) as end:
        demo.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_flags_reach_the_search_and_default_to_the_demo_of_the_readme() -> None:
    usual = DemoSettings().search("hub")
    assert (usual.data, usual.storage, usual.name) == ("dskd-demo/data", "dskd-demo/results", "demo-hub")
    assert (usual.trials, usual.steps, usual.epochs, usual.image_size, usual.batch_size) == (3, 160, None, 192, 8)
    assert usual.preset == "rd4ad"
    small = DemoSettings().search("lite0")
    assert (small.preset, small.steps, small.image_size, small.name) == ("rd4ad", 320, 256, "demo-lite0")
    asked = DemoSettings(
        out=Path("d"), trials=2, epochs=3, image_size=64, batch_size=4, name="mine", address="auto"
    ).search("weights.pth")
    assert (asked.data, asked.storage, asked.name, asked.address) == ("d/data", "d/results", "mine", "auto")
    assert (asked.trials, asked.epochs, asked.image_size, asked.batch_size) == (2, 3, 64, 4)
    assert asked.teacher_weights == "weights.pth"
    assert DemoSettings().search("weights.pth").name == "demo-file"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--trial 3", "tune/demo.py: error: unknown flag --trial, did you mean --trials?"),
        ("--trials two", "tune/demo.py: error: --trials: invalid literal for int()"),
        ("--trials 0", "error: --trials must be at least 1 and at most 100,000, got 0"),
        ("--image-size 50", "error: image_size must be a positive multiple of 32"),
        ("--name a/b", "error: --name takes a name of letters"),
        ("--teacher-weights none.pth --out {tmp}/d", "demo: error: teacher weights must be 'hub', 'lite0', 'random'"),
        ("--teacher-weights random --out {tmp}", "demo: error: {tmp}/data is not empty"),
    ],
)
def test_bad_input_is_one_line(
    line: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("keep me")
    monkeypatch.setattr(job, "say", lambda text: None)
    assert ended(line.format(tmp=tmp_path), monkeypatch) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and expected.format(tmp=tmp_path) in said.err
    assert not (tmp_path / "d").exists(), "bad input is found before anything is made"


def test_without_a_hub_the_teacher_of_a_package_stands_in_and_says_so(
    no_hub: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen_weights(None) == "lite0"
    assert no_hub == [("resnet18.tv_in1k", "hub"), ("tf_efficientnet_lite0.in1k", "lite0")]
    said = capsys.readouterr().err
    assert UNAVAILABLE in said and "Continuing with EfficientNet-Lite0" in said and "untrained" not in said
    usual = DemoSettings().search("lite0")
    assert usual.name == "demo-lite0"
    assert usual.run_configs()["rd4ad"].model.backbone == "tf_efficientnet_lite0.in1k"


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("no_hub", [("hub", "lite0")], indirect=True)
def test_without_hub_and_package_an_untrained_teacher_stands_in_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen_weights(None) == "random"
    said = capsys.readouterr().err
    assert UNAVAILABLE in said and "Continuing with an untrained teacher" in said and "not for inspection" in said


@pytest.mark.usefixtures("no_hub")
def test_weights_that_were_asked_for_are_never_replaced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert chosen_weights("random") == "random" and chosen_weights("file.pth") == "file.pth"
    assert ended(f"--teacher-weights hub --out {tmp_path / 'd'}", monkeypatch) == 2
    assert capsys.readouterr().err == f"demo: error: {UNAVAILABLE}\n"


def test_what_the_unreachable_hub_advises_is_a_flag_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: 1 / 0)
    with pytest.raises(TeacherUnavailableError, match=r"give a local file with --teacher-weights FILE"):
        chosen_weights("hub")
    helped = subprocess.run(
        [sys.executable, "tune/demo.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    for flag in ("--teacher-weights", "--out", "--trials", "--steps", "--epochs", "--image-size", "--address"):
        assert flag in helped.stdout


def test_the_command_of_the_readme_passes_its_flags_on(tmp_path: Path) -> None:
    """`.ci/demo`, with a set-up that does nothing and a Python that writes down what it is called with."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, body in (
        (".ci/demo", (ROOT / ".ci" / "demo").read_text()),
        (".ci/setup", "#!/bin/sh\n"),
        (".venv/bin/python", '#!/bin/sh\nprintf "%s\\n" "$@"\n'),
    ):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    words = ["--out", "a b", "--trials", "2"]
    done = subprocess.run(
        [tmp_path / ".ci" / "demo", *words], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert done.stdout.splitlines() == [f"{tmp_path}/tune/demo.py", *words]


def test_defects_found_and_good_images_flagged_are_counted(
    detector_folder: Path, mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = Detector.load(detector_folder)
    limit = detector.threshold(job.FALSE_ALARM_RATE).value
    folders = sorted((mvtec_root / "tile/test").iterdir())
    alarms = {
        folder.name: [seen.is_anomalous for seen in detector.predict(sorted(folder.iterdir()), limit)]
        for folder in folders
    }
    good = alarms.pop("good")
    bad = [alarm for kind in alarms.values() for alarm in kind]
    found = inspect_test(mvtec_root / "tile/test", detector_folder, tmp_path / "verdicts/tile")
    assert found == (sum(bad), len(bad), sum(good), len(good)) and len(bad) > 0 < len(good)
    said = capsys.readouterr().err
    assert said.startswith(f"tile      {sum(bad)} of {len(bad)} defects found, {sum(good)} of {len(good)} good images")
    assert (tmp_path / "verdicts/tile/summary.json").is_file()


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    assert next_free(tmp_path / "verdicts") == tmp_path / "verdicts"
    (tmp_path / "verdicts").mkdir()
    (tmp_path / "verdicts-2").mkdir()
    assert next_free(tmp_path / "verdicts") == tmp_path / "verdicts-3"
