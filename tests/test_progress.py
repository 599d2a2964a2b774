"""What a person watching a search sees, fed with events and a clock of its own."""

import io
import itertools
import json
import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from rich.console import Console

from tune.study import gauges
from tune.study.progress import QUIET_SECONDS, Counts, SearchProgress
from tune.tracking.events import CategoryContinued, CategoryEnded, EpochDone, Event, Role, TrialEnded, TrialStarted
from tune.trial.spec import OBJECTIVE


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
        assert drawn(progress)[0].endswith("stopped") and drawn(progress)[-1] == "0:31 so far, about 2:00 left"
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
    for expected in ("trial 1 of 1 (a) failed after 0 of 1 validations: ValueError: [bold]too hot[/]", "mind the gap",
                     "a log line", "printed"):  # fmt: skip
        assert shown.count(expected) == 1, expected
        assert shown.index(expected) < shown.rindex("1:05 so far")
    assert "[  1:05] tile: trial 1 of 1 (a) failed" in shown


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
    assert said.err == "[  0:00] tile: trial 1 of 2 (a) finished at 0.5000, the first to end\n"


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


def silent() -> Console:
    """No terminal: a pipe or a file."""
    return Console(file=io.StringIO(), width=200)


def test_a_trials_line_says_its_value_how_it_compares_and_what_it_tried(clock: Clock) -> None:
    console = silent()
    progress = SearchProgress(4, 10, console=console, clock=clock)
    for number, (trial, status, value) in enumerate(
        (("a", "finished", 0.5), ("b", "finished", 0.7), ("c", "pruned", 0.6), ("d", "interrupted", 0.65)), 1
    ):
        progress.show(TrialStarted("tile", trial, {}, number, f"dskd with learning_rate 0.0{number}"))
        progress.show(epoch("tile", trial, number, value))
        progress.show(TrialEnded("tile", trial, status, ""))  # type: ignore[arg-type]
    assert [line.removeprefix("[  0:00] tile: ") for line in written(console).splitlines()] == [
        "trial 1 of 4 (a) finished at 0.5000, the first to end; dskd with learning_rate 0.01",
        "trial 2 of 4 (b) finished at 0.7000, the best so far (before: 0.5000); dskd with learning_rate 0.02",
        "trial 3 of 4 (c) pruned after 3 of 10 validations at 0.6000, best so far 0.7000; dskd with learning_rate 0.03",
        "trial 4 of 4 (d) interrupted after 4 of 10 validations at 0.6500, best so far 0.7000, by the time budget; the "
        "same command continues it; dskd with learning_rate 0.04",
    ]


def test_a_trial_that_the_budget_interrupted_has_not_ended(clock: Clock) -> None:
    progress = SearchProgress(1, 10, console=silent(), clock=clock)
    for event in (TrialStarted("tile", "a", {}), TrialEnded("tile", "a", "interrupted", "")):
        progress.show(event)
    assert drawn(progress)[0].startswith("tile 0/1")
    progress.show(CategoryEnded("tile", "failed", {}, {}))
    assert drawn(progress)[0].endswith("stopped")
    progress.show(TrialStarted("tile", "a", {}, 1))
    progress.show(TrialEnded("tile", "a", "finished", ""))
    assert drawn(progress)[0].startswith("tile 1/1") and drawn(progress)[0].endswith("done")


def test_a_continued_search_neither_replays_nor_renumbers_its_trials(clock: Clock) -> None:
    console = silent()
    progress = SearchProgress(6, 10, console=console, clock=clock)
    known = CategoryContinued("tile", {"a": "finished", "b": "pruned", "c": "failed"}, 1, 0.7676)
    repeated = [
        event
        for number, (trial, status) in enumerate(known.ended.items(), 1)
        for event in (
            TrialStarted("tile", trial, {}, number),
            epoch("tile", trial, 3, 0.2158),
            TrialEnded("tile", trial, status, ""),
        )
    ]
    with progress.watching(["tile"]):
        for event in (known, *repeated):
            progress.show(event)
        progress.show(TrialStarted("tile", "d", {}, 4, "dskd untuned"))
        progress.show(epoch("tile", "d", 10, 0.3))
        progress.show(TrialEnded("tile", "d", "finished", ""))
        for event in (known._replace(ended={**known.ended, "d": "finished"}, num_running=0), *repeated):
            progress.show(event)  # its process was lost, and started again by Ray
    assert written(console).splitlines() == [
        "[  0:00] tile: continues: 3 of 6 ended, 1 go on, best 0.7676",
        "[  0:00] tile: trial 4 of 6 (d) finished at 0.3000, best so far 0.7676; dskd untuned",
    ]
    assert drawn(progress)[0] == "tile 4/6 – 1 1 0.7676 0:00"


def test_in_a_pipe_nothing_is_silent_for_half_a_minute(clock: Clock) -> None:
    console = silent()
    progress = SearchProgress(3, 10, console=console, clock=clock)

    def pass_a_minute() -> set[str]:
        """What is said in a minute in which nothing happens, looked at every second."""
        before = len(written(console))
        for _ in range(60):
            clock.now += 1
            progress.beat()
        said = [line.partition("] ")[2] for line in written(console)[before:].splitlines()]
        assert len(said) >= 2
        return {line.partition("; about")[0] for line in said}

    progress.begin("preparing: checks")
    assert pass_a_minute() == {"still preparing: checks"}
    with progress.watching(["tile", "wood"]):
        assert pass_a_minute() == {"2 categories starting or waiting"}
        progress.show(TrialStarted("tile", "a", {}, 1))
        assert pass_a_minute() == {"tile: 0 of 3 trials ended, 1 preparing; 1 category starting or waiting"}
        progress.show(epoch("tile", "a", 4, 0.5))
        assert pass_a_minute() == {"tile: 0 of 3 trials ended, at validation 4 of 10; 1 category starting or waiting"}
        for trial in "abc":
            progress.show(TrialEnded("tile", trial, "finished", ""))
        ending = "tile: 3 of 3 trials ended, testing and storing the champion, best 0.5000"
        assert pass_a_minute() == {f"{ending}; 1 category starting or waiting"}
    progress.begin("finishing: MLflow")
    assert pass_a_minute() == {"still finishing: MLflow"}
    times = [60 * int(line[1:4]) + int(line[5:7]) for line in written(console).splitlines()]
    assert max(after - before for before, after in itertools.pairwise(times)) < 30
    assert QUIET_SECONDS < 30


def test_finalists_on_other_folds_are_no_trials_and_told_apart(clock: Clock) -> None:
    console = silent()
    progress = SearchProgress(1, 10, console=console, clock=clock)
    with progress.watching(["tile"]):
        progress.show(TrialStarted("tile", "a", {}, 1))
        progress.show(epoch("tile", "a", 10, 0.5))
        clock.now += 30
        progress.show(TrialEnded("tile", "a", "finished", ""))
        for name in ("a-fold-1", "a-untuned-fold-1"):
            progress.show(TrialStarted("tile", name, {}, role="finalist"))
            progress.show(epoch("tile", name, 10, 0.9))
        compares = "tile: 1 of 1 trials ended, comparing finalists: 0 of 2 trainings on other folds ended, best 0.5000"
        assert progress.status() == compares, "nobody knows how long they take"
        progress.show(TrialEnded("tile", "a-fold-1", "finished", "", 0.75))
        progress.show(TrialEnded("tile", "a-untuned-fold-1", "failed", "too hot"))
        assert "testing and storing the champion" in progress.status()
    said = written(console)
    assert "tile: a-fold-1 finished at 0.7500; 1 of 2 trainings on other folds ended" in said
    assert "tile: a-untuned-fold-1 failed: too hot; 2 of 2 trainings" in said and "trial 2" not in said


def test_a_live_table_needs_no_such_lines(clock: Clock) -> None:
    progress = SearchProgress(3, 10, console=(console := screen()), clock=clock)
    with progress.watching(["tile"]):
        clock.now += 100
        progress.beat()
    assert "waiting" not in written(console)


def test_beats_come_from_a_thread_and_end_with_it(capfd: pytest.CaptureFixture[str], clock: Clock) -> None:
    progress = SearchProgress(1, 1, clock=clock)
    before = set(threading.enumerate())
    with progress.beating():
        (thread,) = set(threading.enumerate()) - before
        progress.begin("preparing")
        clock.now += QUIET_SECONDS
        while "still preparing" not in (said := capfd.readouterr().err):
            assert not said, "bad input ends with one line"
            time.sleep(0.05)
    assert not thread.is_alive()


def test_on_a_terminal_lines_break_between_words(clock: Clock) -> None:
    console = screen(80)
    progress = SearchProgress(2, 10, console=console, clock=clock)
    with progress.watching(["tile"]):
        progress.show(
            TrialStarted("tile", "a", {}, 1, "dskd with " + ", ".join(f"hkd_weight_{n} 0.5" for n in "abcdef"))
        )
        progress.show(epoch("tile", "a", 10, 0.5))
        progress.show(TrialEnded("tile", "a", "finished", ""))
    shown = [line.rstrip() for line in written(console).splitlines() if "hkd" in line]
    assert len(shown) == 2 and all(len(line) <= 80 for line in shown)
    assert sum(line.count(f"hkd_weight_{n} 0.5") for n in "abcdef" for line in shown) == 6


@pytest.mark.parametrize("role", ["preset", "start-from", "trial"])
def test_what_a_trial_is_there_for_does_not_make_it_a_finalists_training(role: Role) -> None:
    progress = SearchProgress(3, 10, console=Console(file=io.StringIO()))
    progress.show(TrialStarted("tile", "a", {}, role=role))
    progress.show(EpochDone("tile", "a", 4, {OBJECTIVE: 0.5}, 1))
    assert "at validation 4" in progress.status() and "finalists" not in progress.status()
    assert progress.running() == {"tile": ["a"]}
    progress.show(TrialStarted("wood", "a-fold-1", {}, role="finalist"))
    progress.show(CategoryEnded("tile", "finished", {}, {}))
    assert progress.running() == {"wood": ["a-fold-1"]}, "of those that go on"


def test_lines_for_programs_are_json_with_search_category_and_trial(clock: Clock) -> None:
    file = io.StringIO()
    progress = SearchProgress(1, 2, console=Console(file=file, force_terminal=True), clock=clock, json_of="parts")
    with progress.watching(["ti:le"]):
        progress.show(TrialStarted("ti:le", "a", {}, 1, "dskd untuned"))
        progress.show(EpochDone("ti:le", "a", 2, {OBJECTIVE: 0.5}, 1))
        progress.show(TrialEnded("ti:le", "a", "finished", "", 0.5))
        progress.say("two\nlines")
    first, second = map(json.loads, file.getvalue().splitlines())
    assert (first["search"], first["category"], first["trial"]) == ("parts", "ti:le", "a")
    assert first["message"].startswith("trial 1 of 1 (a) finished at 0.5000")
    assert "category" not in second and datetime.fromisoformat(second["time"]).tzinfo is not None


def test_whoever_watches_by_figures_is_told_of_all_events_but_not_of_each_at_once(clock: Clock) -> None:
    """What is told has a figure for each category and state: after each event that would be all of a driver's time."""
    told: list[Counts] = []
    progress = SearchProgress(2, 2, console=screen(), clock=clock, on_change=told.append)
    progress.show(TrialStarted("tile", "a", {}))
    clock.now += 10
    progress.show(EpochDone("tile", "a", 1, {OBJECTIVE: 0.5}, 1))
    progress.show(TrialEnded("tile", "a", "pruned", ""))
    assert [each.trials["tile"]["running"] for each in told] == [1, 1]
    assert told[0].seconds_left is None and told[1].seconds_left is not None and told[1].seconds_left > 0
    clock.now += 1
    progress.beat()
    assert len(told) == 3 and told[-1].trials["tile"]["running"] == 0 and told[-1].trials["tile"]["pruned"] == 1
    clock.now += 1
    progress.beat()
    assert len(told) == 3, "nothing has changed"
    with progress.beating():
        progress.show(TrialStarted("tile", "b", {}))
        progress.show(TrialEnded("tile", "b", "failed", ""))
    assert told[-1].trials["tile"]["failed"] == 1, "the last event is told at the latest at the end"


def test_of_many_categories_the_table_and_the_line_show_those_that_run(clock: Clock) -> None:
    console = silent()
    progress = SearchProgress(1, 10, console=console, clock=clock)
    names = [f"part-{number:03}" for number in range(500)]
    with progress.watching(names):
        for name in names[:300]:
            progress.show(TrialStarted(name, "a", {}, 1))
        for name in names[:290]:
            progress.show(TrialEnded(name, "a", "finished", ""))
        for name in names[:250]:
            progress.show(CategoryEnded(name, "finished", {}, {}))
        shown = Console(file=io.StringIO(), width=100, color_system=None)
        shown.print(progress.table(12))
        rows = [line.split("│")[1].strip() for line in written(shown).splitlines() if "│" in line]
        assert rows == [*names[250:252], *names[290:300]], "ten run, and two wait for their champions"
        assert "488 more of 500 categories, 250 of all are over" in written(shown)
        parts = progress.status().split("; ")
    assert [part.partition(":")[0] for part in parts[:8]] == names[290:298]
    assert parts[8:10] == ["42 more categories begun", "200 categories starting or waiting"]


def test_figures_reach_the_gauges_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[tuple[str, ...], float] = {}

    class Kept:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self._name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            written[self._name, *tags.values()] = value

    monkeypatch.setattr(gauges, "Gauge", Kept)
    shown = gauges.SearchGauges("parts")
    shown.show(Counts({"tile": {"running": 2, "failed": 1}}, None))
    shown.show(Counts({"tile": {"running": 1, "failed": 1}}, 90.0))
    assert written == {
        ("dskd_search_trials", "parts", "tile", "running"): 1,
        ("dskd_search_trials", "parts", "tile", "failed"): 1,
        ("dskd_search_seconds_left", "parts"): 90.0,
    }
