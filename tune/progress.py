"""What a person watching a search sees: one line per event that matters, on stderr."""

import sys
import time

from tune.tracking import EpochDone, Event, TrialEnded


class Progress:
    """Counts the trials of each category and says what happens to them."""

    def __init__(self, trials: int) -> None:
        self._trials = trials
        self._ended: dict[str, int] = {}
        self._best: dict[str, float] = {}
        self._epochs: dict[str, int] = {}
        self._started = time.monotonic()

    def say(self, line: str) -> None:
        """One line, with the time since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {line}", file=sys.stderr, flush=True)  # noqa: T201

    def show(self, event: Event) -> None:
        """Count an event, and say so where a trial has ended."""
        if isinstance(event, EpochDone):
            objective = event.metrics.get("objective", 0.0)
            self._epochs[event.trial_id] = event.epoch
            self._best[event.category] = max(objective, self._best.get(event.category, 0.0))
        elif isinstance(event, TrialEnded):
            self._ended[event.category] = self._ended.get(event.category, 0) + 1
            reason = f": {event.error.strip().splitlines()[-1]}" if event.error else ""
            self.say(
                f"{event.category}: trial {self._ended[event.category]}/{self._trials} {event.status} after "
                f"{self._epochs.get(event.trial_id, 0)} epochs{reason}; "
                f"best validation objective so far {self._best.get(event.category, 0.0):.4f}"
            )
