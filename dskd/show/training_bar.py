"""A progress bar for a training on a terminal."""

import shutil
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

from dskd.show.lines import fitted, line_width
from dskd.training.loop import Step
from dskd.training.run import TrainingRun

REFRESH_SECONDS = 0.5
"""Seconds between two readings of the loss; each makes the host wait for the GPU."""


class TrainingBar:
    """Finished share of the run, loss, steps per second, time left; on stderr, if that is a terminal."""

    def __init__(self, run: TrainingRun, say: Callable[[str], object]) -> None:
        """`say` prints the lines where there is no bar."""
        self._say = say
        self._bar = tqdm(
            total=run.num_steps,
            initial=run.step,
            unit=" steps",
            mininterval=REFRESH_SECONDS,
            ncols=shutil.get_terminal_size().columns,  # 80 if the terminal's width is unknown; tqdm would draw nothing
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, step: Step) -> None:
        """Count a step; if the bar is redrawn, it shows the loss of this step."""
        if self._bar.update():
            self._bar.set_postfix_str(f"loss {step.loss.item():.4f}", refresh=False)

    def say(self, line: str) -> None:
        """Print a line above the bar, or only the line if there is no bar."""
        if self._bar.disable:
            self._say(line)
            return
        self._bar.write(fitted(line, line_width(sys.stderr)), file=sys.stderr)
        sys.stderr.flush()
