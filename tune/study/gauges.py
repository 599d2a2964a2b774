"""Figures of a running search for Prometheus, beside Ray's own: the cluster's metrics agents collect both."""

import functools

from ray.util.metrics import Gauge

from tune.study.progress import Counts


class SearchGauges:
    """`ray_dskd_search_trials` by search, category and state, and `ray_dskd_search_seconds_left` by search."""

    def __init__(self, search: str) -> None:
        self._search = search

    @functools.cached_property
    def _trials(self) -> Gauge:  # made when there is something to show: the cluster is joined then
        return Gauge("dskd_search_trials", "Trials of a search, by state.", tag_keys=("search", "category", "state"))

    @functools.cached_property
    def _left(self) -> Gauge:
        return Gauge("dskd_search_seconds_left", "Estimated seconds to a search's end.", tag_keys=("search",))

    def show(self, counts: Counts) -> None:
        for category, states in counts.trials.items():
            for state, number in states.items():
                self._trials.set(number, {"search": self._search, "category": category, "state": state})
        if counts.seconds_left is not None:
            self._left.set(counts.seconds_left, {"search": self._search})
