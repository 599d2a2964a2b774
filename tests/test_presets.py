import tomllib
from pathlib import Path

import pytest

from dskd.cli.main import main
from dskd.config import RunConfig
from dskd.presets import PRESETS, read_config, to_toml


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    main(["train", "--print-config", *map(str, words)])
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_printed_makes_the_same_run(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--learning-rate", "0.1234567890123456", "--levels", "2", "3", "--level-weights", "0.1", "3"]
    text = printed(capsys, "--preset", preset, *flags, "--score-level-weights", "1", "2", "--epochs", "7")
    file = written(tmp_path / "run.toml", text)
    wanted = PRESETS[preset].with_values(
        {
            "learning_rate": 0.1234567890123456,
            "levels": (2, 3),
            "level_weights": (0.1, 3.0),
            "score_level_weights": (1.0, 2.0),
            "epochs": 7,
        }
    )
    assert RunConfig.from_dict(tomllib.loads(text)) == read_config(file) == wanted
    for other in PRESETS:
        assert printed(capsys, "--config", file, "--preset", other) == text == to_toml(wanted)


def test_flags_stand_above_the_file_and_the_file_above_the_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "run.toml", 'preset = "stfpm"\n[train]\nepochs = 7\nlearning_rate = 1\n')

    def run(*flags: str) -> RunConfig:
        return RunConfig.from_dict(tomllib.loads(printed(capsys, f"--config={file}", *flags)))

    assert run() == PRESETS["stfpm"].with_values({"epochs": 7, "learning_rate": 1.0})
    assert run("--epochs", "9").train.epochs == 9 and run("--epochs", "9").train.learning_rate == 1
    assert run("--preset", "rd4ad") == PRESETS["rd4ad"].with_values({"epochs": 7, "learning_rate": 1.0})
    assert run("--steps", "9").train.length == "9 steps", "a length of one kind replaces one of the other"
    file.write_text("[train]\nsteps = 70\n")
    assert run().train.length == "70 steps" and run("--epochs", "9").train.length == "9 epochs"


BAD = {
    "unknown section": (
        "[trian]\nepochs = 3\n",
        "unknown section 'trian'; known: preset, data, model, loss, score, train",
    ),
    "unknown field": ("[train]\nepoch = 3\n", "unknown field 'epoch' in [train]; known: batch_size, epochs, "),
    "wrong type": ('[train]\nepochs = "3"\n', "run.train.epochs must be of type int, got '3'"),
    "wrong item": ('[model]\nlevels = [1, "2", 3]\n', "run.model.levels must be of type int, got '2'"),
    "no section": ("train = 3\n", "[train] must be a section of fields, got train = 3"),
    "field outside": ("epochs = 3\n", "unknown section 'epochs'"),
    "out of range": ("[data]\nimage_size = 33\n", "image_size must be a positive multiple of 32"),
    "two lengths": (
        "[train]\nepochs = 3\nsteps = 3\n",
        "the length is either steps or epochs, got steps 3 and epochs 3",
    ),
    "unknown preset": ('preset = "patchcore"\n', "preset must be one of "),
    "preset of a wrong type": ("preset = [1]\n", "preset must be one of "),
    "no TOML": ("epochs: 3\n", "is not TOML: "),
    "bytes": ("\udcff", "cannot be read: "),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_naming_file_section_and_field(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = BAD[kind]
    file = tmp_path / "run.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as end:
        main(["train", "--print-config", "--config", str(file)])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and "run.toml" in said.err and message in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "5", "--epochs", "7"], "--steps and --epochs exclude each other"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--steps", "many"], "--steps: invalid literal for int() with base 10: 'many'"),
    ],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_bad_length_is_one_line(
    preset: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--print-config", "--preset", preset, *words])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and message in said.err


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.toml cannot be read: No such file"):
        read_config(tmp_path / "gone.toml")


def test_a_file_that_an_editor_gave_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nepochs = 7\r\n")
    assert read_config(tmp_path / "run.toml").train.epochs == 7
