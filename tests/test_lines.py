"""Lines on a terminal break between words."""

import io
import os
import pty
import subprocess

import pytest

from dskd.show.lines import fitted, fitted_command, line_width


def test_a_line_breaks_between_words_and_goes_on_indented() -> None:
    assert fitted("one two three", 8) == "one two\n  three"
    assert fitted("  one two three", 10) == "  one two\n    three"
    assert fitted("one two three", 13) == fitted("one two three", None) == "one two three"


def test_a_word_wider_than_the_terminal_stays_whole() -> None:
    path = "/a-folder/of-a-long/name-with-dashes.png"
    assert path in fitted(f"anomalous  1.25  {path}", 20).split()


def test_a_broken_command_can_be_copied() -> None:
    command = "echo one two three four"
    broken = fitted_command(command, 14)
    assert broken.splitlines() == ["echo one two \\", "    three \\", "    four"]
    assert subprocess.run(["sh", "-c", broken], capture_output=True, text=True, check=True).stdout == command[5:] + "\n"
    assert fitted_command(command, None) == fitted_command(command, 23) == command


def test_each_line_of_a_text_is_fitted_alone() -> None:
    assert fitted("a  b\nfive words are too many", 14) == "a  b\nfive words are\n  too many"


def test_the_width_is_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert line_width(io.StringIO()) is None
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        assert line_width(terminal) == 80  # of a terminal that says 0 columns
        monkeypatch.setenv("COLUMNS", "57")
        assert line_width(terminal) == 57
    os.close(leader)
