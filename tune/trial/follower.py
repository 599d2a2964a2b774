"""Follows an assignment from its submission to its end: for the relays of trials and for the driver."""

from collections.abc import Iterator
from typing import Any

import ray

from tune.trial.assignment import Assignment, Failure, Metrics, News
from tune.trial.spec import EPOCH


class AssignmentFailedError(Exception):
    """An assignment ended without its result."""

    def __init__(self, failure: Failure, epoch: int) -> None:
        super().__init__(failure.reason)
        self.failure = failure
        self.epoch = epoch
        """Last epoch that was reported; 0 if none was."""


def follow(dispatcher: str, assignment: Assignment, *, must_start: bool = False) -> Iterator[Metrics]:
    """Submit an assignment to the dispatcher of that name, or join it, and yield its reports.

    To ask for the next report is to let the group go on. Raises AssignmentFailedError if it failed too often, and with
    `must_start` OSError if no worker group can start at all.
    """
    post: Any = ray.get_actor(dispatcher)
    read = last = -1
    while True:
        news: News = ray.get(post.follow.remote(assignment.key, read))
        if not news.is_known:  # it is new, or the dispatcher was restarted
            ray.get(post.submit.remote(assignment))
            continue
        for report in news.reports:
            yield report
            read = last = int(report.get(EPOCH, 0))
        if news.failure is not None:
            raise AssignmentFailedError(news.failure, max(last, 0))
        if news.is_over:
            return
        if must_start and news.fault:
            raise OSError(f"no worker can start: {news.fault}; the same command continues the search")
