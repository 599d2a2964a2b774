"""How many categories share the cluster now: fewer and fewer as a search comes to its end."""

import math
import threading
import time
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions

_KEPT_SECONDS = 2.0
"""For so long an answer is taken to hold."""


class Shares:
    """Kept by the driver, asked by every category's study; an actor."""

    def __init__(self, num_categories: int, side_by_side: int) -> None:
        self._num_left, self._side_by_side = num_categories, side_by_side

    def side_by_side(self) -> int:
        """Categories that are searched at once, at least 1."""
        return max(1, min(self._num_left, self._side_by_side))

    def end_category(self) -> None:
        """One category needs the cluster no more."""
        self._num_left -= 1


class Share:
    """One study's part of the cluster."""

    def __init__(self, shares: Any) -> None:
        self._shares = shares
        self._side_by_side = 1
        self._asked = -math.inf

    def of(self, slots: int, *, is_limit: bool = False) -> int:
        """Trials that this study may have at once where the cluster holds `slots`, at least 1.

        Rounded up, so that no slot idles; down where the slots are a limit that somebody set.
        """
        if time.monotonic() - self._asked > _KEPT_SECONDS:
            # Where nobody answers the driver is gone, and this study goes with it.
            with suppress(ray.exceptions.RayError):
                self._side_by_side = ray.get(self._shares.side_by_side.remote(), timeout=30)
            self._asked = time.monotonic()
        return max(1, slots // self._side_by_side if is_limit else -(-slots // self._side_by_side))


class BudgetSpentError(Exception):
    """A category's turn came when the search's time was over."""


class TimeBudget:
    """Wall time of a search, shared by categories that are searched some side by side and some after others."""

    def __init__(self, seconds: float | None, num_categories: int, side_by_side: int) -> None:
        self._end = None if seconds is None else time.time() + seconds
        self._num_waiting = num_categories
        self._side_by_side = side_by_side
        self._lock = threading.Lock()

    def begin_category(self) -> float | None:
        """When the category that begins now must end, in seconds since 1970; None: whenever it does.

        It gets what is left in equal parts for those that wait: what it leaves over is theirs, and none
        uses up what another needs. Raises BudgetSpentError where nothing is left.
        """
        with self._lock:
            rounds = math.ceil(self._num_waiting / self._side_by_side)
            self._num_waiting -= 1
        if self._end is None:
            return None
        now = time.time()
        if now >= self._end:
            raise BudgetSpentError("the time budget ended before it could begin; the same command begins with it")
        return now + (self._end - now) / rounds
