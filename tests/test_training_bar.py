import io
import re
import sys

import pytest
import torch

from dskd.cli.output import say
from dskd.config import RunConfig
from dskd.show import training_bar
from dskd.show.training_bar import TrainingBar
from dskd.training.inputs import TrainingData
from dskd.training.loop import Step
from dskd.training.run import TrainingRun

CPU = torch.device("cpu")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(run: TrainingRun) -> None:
    with TrainingBar(run, say) as bar:
        for event in run.steps():
            if isinstance(event, Step):
                bar.advance(event)
            else:
                bar.say(f"step {event.interval.step} done")


def test_a_terminal_shows_how_far_the_run_is(
    tiny: RunConfig, inputs: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(training_bar, "REFRESH_SECONDS", 0.0)
    watched(TrainingRun.begin(tiny, inputs, CPU))
    shown = terminal.getvalue()
    assert "step 2 done\n" in shown and "step 4 done\n" in shown
    states = re.findall(
        r"(\d+)%\|[^|]*\| (\d+)/4 \[[\d:]+<[\d:?]+, [^\]]*?(?:steps/s|s/ steps)(?:, loss (\d\.\d+))?", shown
    )
    assert [int(steps) for _, steps, _ in states][-1] == 4, "2 epochs of 2 full batches"
    assert any(loss for _, _, loss in states)


def test_a_continued_run_starts_where_it_was(
    tiny: RunConfig, inputs: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrainingRun.begin(tiny, inputs, CPU)
    next(run.intervals())
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with TrainingBar(run, say):
        pass
    assert " 50%|" in terminal.getvalue()


def test_elsewhere_there_are_plain_lines_and_nothing_else(
    tiny: RunConfig, inputs: TrainingData, capsys: pytest.CaptureFixture[str]
) -> None:
    watched(TrainingRun.begin(tiny, inputs, CPU))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "step 2 done\nstep 4 done\n")
