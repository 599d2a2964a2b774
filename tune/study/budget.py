"""How the categories of a search share the cluster's slots and the time budget."""

import math
import threading
import time
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions

_CACHE_SECONDS = 2.0
"""Cache lifetime of a share, in seconds."""


class Shares:
    """Number of categories that share the cluster: an actor of the driver, called by every category's study."""

    def __init__(self, num_categories: int, side_by_side: int) -> None:
        self._num_left, self._side_by_side = num_categories, side_by_side

    def side_by_side(self) -> int:
        """Number of categories searched at once, at least 1."""
        return max(1, min(self._num_left, self._side_by_side))

    def end_category(self) -> None:
        """Count a category that no longer needs the cluster."""
        self._num_left -= 1


class Share:
    """One study's share of the cluster."""

    def __init__(self, shares: Any) -> None:
        self._shares = shares
        self._side_by_side = 1
        self._updated = -math.inf

    def of(self, slots: int, *, is_limit: bool = False) -> int:
        """Trials that this study may run at once if the cluster can hold `slots`, at least 1.

        Rounded up, so that no slot is idle; rounded down with `is_limit`, when the user limited the slots.
        """
        if time.monotonic() - self._updated > _CACHE_SECONDS:
            # No answer: the driver is gone, and Ray will end this study too.
            with suppress(ray.exceptions.RayError):
                self._side_by_side = ray.get(self._shares.side_by_side.remote(), timeout=30)
            self._updated = time.monotonic()
        return max(1, slots // self._side_by_side if is_limit else -(-slots // self._side_by_side))


class BudgetSpentError(Exception):
    """The time budget ended before the category could start."""


class TimeBudget:
    """Wall time of a search, divided among categories that run in parallel and one after another."""

    def __init__(self, seconds: float | None, num_categories: int, side_by_side: int) -> None:
        self._end = None if seconds is None else time.time() + seconds
        self._num_waiting = num_categories
        self._side_by_side = side_by_side
        self._lock = threading.Lock()

    def is_spent(self) -> bool:
        """Whether no time is left."""
        return self._end is not None and time.time() >= self._end

    def begin_category(self) -> float | None:
        """End of the category that starts now, in seconds since 1970; None: no limit.

        The remaining time is divided equally among the waiting categories; time that a category does not use goes
        to the later ones. Raises BudgetSpentError if no time is left.
        """
        with self._lock:
            rounds = math.ceil(self._num_waiting / self._side_by_side)
            self._num_waiting -= 1
        if self._end is None:
            return None
        now = time.time()
        if now >= self._end:
            raise BudgetSpentError("the time budget ended before it could start; the same command starts it")
        return now + (self._end - now) / rounds
