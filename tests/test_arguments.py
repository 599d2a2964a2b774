import io
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import dskd
from dskd.arguments import parse, parse_into
from dskd.cli import main as commands
from dskd.cli.examples import EXAMPLES
from dskd.cli.main import main
from tune import clean, demo, pull, score, search, serve, versions
from tune.settings.clean import CleanSettings
from tune.settings.demo import DemoSettings
from tune.settings.pull import PullSettings
from tune.settings.score import ScoringSettings
from tune.settings.search import SearchSettings
from tune.settings.serve import ServeSettings
from tune.settings.versions import VersionsSettings

ROOT = Path(__file__).resolve().parents[1]
BAD = {
    "": "dskd: error: no command given; there are: demo-data, check-data, train, evaluate, predict, compare, feedback, "
    "page, export",
    "trian": "dskd: error: unknown command trian, did you mean train?; there are: ",
    "--nonsense": "dskd: error: unknown flag --nonsense; see dskd --help",
    "--verison": "dskd: error: unknown flag --verison, did you mean --version?; see dskd --help",
    "train --dta d --out o": "dskd train: error: unknown flag --dta, did you mean --data?; see dskd train --help",
    "train --data d --out o --levels 1 --nonsense": "dskd train: error: unknown flag --nonsense; see dskd train --help",
    "train --data d --out o --preset": "dskd train: error: Missing value for argument '--preset'",
    "train --data d --out o --epoch 3": (
        "dskd train: error: unknown flag --epoch, did you mean --epochs?; see dskd train --help"
    ),
    "train --data d --out o --image_sise=64": "unknown flag --image-sise, did you mean --image-size?",
    "train --data d --out o --nonsense": "dskd train: error: unknown flag --nonsense; see dskd train --help",
    "train --data d": "dskd train: error: missing --out PATH; see dskd train --help",
    "predict --threshold 2": "dskd predict: error: missing DETECTOR, --out PATH; see dskd predict --help",
    "train --data d --out o --epochs many": "dskd train: error: --epochs: invalid literal for int()",
    "train --data d --out o --levels one": "dskd train: error: --levels: ",
    "train --data d --out o --epochs": "Missing value for argument '--epochs'",
    "train --data d --out o --epochs 0": "dskd: error: epochs must be at least 1, got 0",
    "train --data d --out o --preset patchcore": "invalid choice 'patchcore' for argument '--preset'",
    "train --data d --out o --schedule linear": "invalid choice 'linear' for argument '--schedule'",
    "evaluate detector extra --data d": "dskd evaluate: error: unexpected extra; see dskd evaluate --help",
    "train --data d --out o --levels 1 2": "level_weights (loss) must have one weight per level (2), got 3",
}


@pytest.mark.parametrize("line", BAD)
@pytest.mark.parametrize(("columns", "encoding"), [("40", "utf-8"), ("200", "utf-8"), ("80", "ascii")])
def test_bad_usage_is_one_line_on_stderr(
    line: str, columns: str, encoding: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the terminal: tyro draws its frames by its width and by what stdout can show."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", printed := io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(SystemExit) as end:
        main(line.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and printed.tell() == 0
    assert said.count("\n") == 1 and BAD[line] in said
    assert "tyro" not in said and "--- " not in said and not set(said) & set("╭│─\x1b")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["predict", "-h"]])
def test_help_is_whole(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr()
    assert not end.value.code and said.err == ""
    for text in {"train": ("--out PATH", "Passes over the normal"), "predict": ("DETECTOR",)}.get(
        words[0], ("evaluate",)
    ):
        assert text in said.out


def test_the_version_is_told_and_stands_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dskd.__version__ == project["version"]
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as end:
            main([flag])
        said = capsys.readouterr()
        assert not end.value.code and said.err == "" and f"dskd {dskd.__version__}" in said.out
        assert (said.out.count("\n") == 1) == (flag == "--version")


def test_what_the_command_itself_says_comes_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the parser's words are held back."""

    def draw(out: Path, seed: int) -> None:
        sys.stderr.write("drawing\n")
        assert capsys.readouterr().err == "drawing\n"

    monkeypatch.setattr("dskd.demo.dataset.draw_dataset", draw)
    main(["demo-data", str(tmp_path)])
    assert capsys.readouterr().err.startswith(f"drew {tmp_path}")


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_help_ends_with_examples_and_shows_no_type_of_nothing(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert "{None}" not in said
    assert said.splitlines()[-len(EXAMPLES[command]) :] == [f"  {example}" for example in EXAMPLES[command]]
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"  {EXAMPLES[command][0]}\n" in capsys.readouterr().out


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_examples_of_the_library_are_valid_command_lines(example: str) -> None:
    program, *words = shlex.split(example)
    assert program == "dskd"
    functions = {name: getattr(commands, name.replace("-", "_")) for name in EXAMPLES}
    settings = {"train": commands._train_command(words[1:])} if words[0] == "train" else {}
    parse(functions | settings, words, prog="dskd", description="", version="", examples=EXAMPLES)


ENTRIES: dict[str, tuple[Any, Any]] = {
    "search": (search, SearchSettings),
    "clean": (clean, CleanSettings),
    "pull": (pull, PullSettings),
    "score": (score, ScoringSettings),
    "demo": (demo, DemoSettings),
    "serve": (serve, ServeSettings),
    "versions": (versions, VersionsSettings),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_examples_of_the_application_are_valid_and_end_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    entry, settings = ENTRIES[name]
    for example in entry.EXAMPLES:
        python, program, *words = shlex.split(example)
        assert (python, program) == ("python", f"tune/{name}.py")
        parse_into(settings, words, prog=program, examples=())
    with pytest.raises(SystemExit):
        parse_into(settings, ["--help"], prog=program, examples=entry.EXAMPLES)
    said = capsys.readouterr().out
    assert "{None}" not in said and said.endswith(f"  {entry.EXAMPLES[-1]}\n")
