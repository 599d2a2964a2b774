"""What a person watching a search sees, fed with events and a clock of its own."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from tune.study.progress import SearchProgress
from tune.tracking.events import CategoryEnded, EpochDone, Event, TrialEnded, TrialStarted


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def screen(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=30, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(progress: SearchProgress, width: int = 100) -> list[str]:
    """The cells of every row of the table, and the line below it."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(progress.table())
    lines = written(console).splitlines()
    assert all(len(line) <= width for line in lines)
    return [" ".join(line.replace("│", " ").split()) for line in lines if "│" in line] + [lines[-1].strip()]


def epoch(category: str, trial: str, number: int, objective: float, **more: float) -> EpochDone:
    return EpochDone(category, trial, number, {"val/best_objective": objective, **more}, 0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_table_counts_trials_and_forecasts_from_their_durations(clock: Clock) -> None:
    progress = SearchProgress(4, 10, console=screen(), clock=clock)
    with progress.watching(["tile", "wood"]):
        assert drawn(progress) == ["tile 0/4 – 0 0 – –", "wood 0/4 – 0 0 – –", "0:00 so far, about – left"]
        for trial in ("a", "b"):
            progress.show(TrialStarted("tile", trial, {}))
        clock.now += 10
        progress.show(epoch("tile", "a", 1, 0.5))
        # A whole trial takes 100 s: two run with 90 s left each, two wait, side by side (380 / 2); wood 400 more.
        assert drawn(progress)[0] == "tile 0/4 2 0 0 0.5000 3:10"
        assert drawn(progress)[-1] == "0:10 so far, about 6:30 left"
        clock.now += 20
        progress.show(TrialEnded("tile", "a", "pruned", ""))
        progress.show(TrialEnded("tile", "b", "failed", "Traceback\nValueError: too hot\n"))
        clock.now += 1
        # Trials took 30 s each in the mean; nothing runs for the moment.
        assert drawn(progress)[:2] == ["tile 2/4 – 1 1 0.5000 0:30", "wood 0/4 – 0 0 – 2:00"]
        progress.show(CategoryEnded("tile", "finished", {}, {}))
        progress.show(TrialStarted("wood", "c", {}))
        assert drawn(progress)[0].endswith("done") and drawn(progress)[-1] == "0:31 so far, about 2:00 left"
        clock.now += 60
        progress.show(epoch("wood", "c", 3, 0.75))
        # It outlasts the mean, so that it is taken for a whole one: 140 s more, and three of 30 s.
        assert drawn(progress)[1] == "wood 0/4 1 0 0 0.7500 3:50"


def test_lines_warnings_and_logs_stand_above_the_table(clock: Clock) -> None:
    console = screen()
    progress = SearchProgress(1, 1, console=console, clock=clock)
    log = logging.getLogger("other")
    handler = logging.StreamHandler()  # keeps the sys.stderr of now
    log.addHandler(handler)
    with progress.watching(["tile"]):
        progress.show(TrialStarted("tile", "a", {}))
        clock.now += 65
        progress.show(TrialEnded("tile", "a", "failed", "ValueError: [bold]too hot[/]"))
        # as warnings.showwarning does, which pytest has replaced
        sys.stderr.write(warnings.formatwarning("mind the gap", UserWarning, "file.py", 1))
        log.warning("a log line")
        sys.stdout.write("printed\n")
    log.removeHandler(handler)
    assert handler.stream is sys.stderr
    shown = written(console)
    for expected in ("trial 1/1 failed after 0 validations: ValueError: [bold]too hot[/]; best", "mind the gap",
                     "a log line", "printed"):  # fmt: skip
        assert shown.count(expected) == 1, expected
        assert shown.index(expected) < shown.rindex("1:05 so far")
    assert "[  1:05] tile: trial 1/1 failed" in shown


def test_ctrl_c_leaves_the_terminal_as_it_was(clock: Clock) -> None:
    console = screen()
    progress = SearchProgress(1, 1, console=console, clock=clock)
    before = (sys.stdout, sys.stderr)
    with pytest.raises(KeyboardInterrupt), progress.watching(["tile"]):
        assert "\x1b[?25l" in written(console), "the cursor is hidden meanwhile"
        raise KeyboardInterrupt
    assert written(console).rindex("\x1b[?25h") > written(console).rindex("\x1b[?25l")
    assert (sys.stdout, sys.stderr) == before
    progress.say("afterwards")
    assert written(console).rstrip().endswith("afterwards")


@pytest.mark.parametrize("width", [12, 24, 40])
def test_a_narrow_terminal_gets_a_narrow_table(width: int, clock: Clock) -> None:
    console = screen(width)
    progress = SearchProgress(1000, 10, console=console, clock=clock)
    with progress.watching(["a category of a rather long name", "tile"]):
        progress.show(epoch("tile", "a", 1, 0.5))
        assert len(drawn(progress, width)) >= 2


def events() -> Iterator[Event]:
    yield TrialStarted("tile", "a", {})
    yield epoch("tile", "a", 1, 0.5)
    yield TrialEnded("tile", "a", "finished", "")


def test_elsewhere_there_are_plain_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SearchProgress(2, 1)
    with progress.watching(["tile"]):
        for event in events():
            progress.show(event)
    said = capsys.readouterr()
    assert said.out == ""
    assert (
        said.err == "[  0:00] tile: trial 1/2 finished after 1 validations; best validation objective so far 0.5000\n"
    )


def test_the_share_of_training_is_taken_over_the_trials_own_time(clock: Clock) -> None:
    progress = SearchProgress(2, 2, console=Console(file=io.StringIO()), clock=clock)
    assert progress.time_share() is None
    measured: dict[str, Any] = {"time/train_seconds": 4.0, "time/validation_seconds": 1.0}
    for trial in ("a", "b"):
        progress.show(TrialStarted("tile", trial, {}))
        clock.now += 6.0
        progress.show(epoch("tile", trial, 1, 0.5, **measured))
        progress.show(epoch("tile", trial, 2, 0.5, **measured))
        clock.now += 4.0
        progress.show(TrialEnded("tile", trial, "finished", ""))
        clock.now += 100.0  # nobody's time
    for event in (TrialStarted("tile", "c", {}), epoch("tile", "c", 2, 0.5, **measured)):
        progress.show(event)  # ended before this search was continued, and told once more
    progress.show(TrialEnded("tile", "c", "finished", ""))
    share = progress.time_share()
    assert share is not None and tuple(share) == (16.0, 4.0, 20.0)
    assert share.sentence.startswith("80% of the trials' time was training, 20% validation, 0% the rest")
