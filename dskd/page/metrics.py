"""Counters of the served application, as text for Prometheus."""

import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dskd.calibration import drift_of
from dskd.page.inspector import Category

_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the latency's buckets, in seconds."""
_WINDOW = 200
"""Scores of a category that its drift is told from, the latest ones."""


class Metrics:
    """Counts since the start of this process; safe in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._images: Counter[tuple[str, str]] = Counter()
        self._feedback: Counter[tuple[str, str]] = Counter()
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._seconds = 0.0
        self._scores: dict[tuple[str, str], deque[float]] = {}

    def count_request(self, route: str, status: int) -> None:
        with self._lock:
            self._requests[route, status] += 1

    def count_inspection(self, category: str, rows: Iterable[Mapping[str, Any]], seconds: float) -> None:
        """The answers of one request, and how long it took."""
        with self._lock:
            self._buckets[bisect_left(_BOUNDS, seconds)] += 1
            self._seconds += seconds
            for row in rows:
                self._images[category, row["verdict"]] += 1
                if row["score"] is not None:
                    key = category, row["detector_version"]
                    self._scores.setdefault(key, deque(maxlen=_WINDOW)).append(row["score"])

    def count_feedback(self, category: str, judged: str) -> None:
        with self._lock:
            self._feedback[category, judged] += 1

    def text(self, categories: Sequence[Category]) -> str:
        """In Prometheus's text format, version 0.0.4; drift only where enough images were seen."""
        with self._lock:
            lines = [
                *_counter("dskd_requests_total", "Requests by route and status.", ("route", "status"), self._requests),
                *_counter("dskd_images_total", "Images by verdict.", ("category", "verdict"), self._images),
                *_counter("dskd_feedback_total", "Judged images taken.", ("category", "judged"), self._feedback),
                *self._latency(),
            ]
            windows = {key: list(scores) for key, scores in self._scores.items()}
        lines += _help("dskd_drift_p_value", "Of the latest images against the calibration's; 0: drifted.", "gauge")
        for category in categories:
            scores = windows.get((category.name, category.detector_version), [])
            drift = drift_of(category.normal_scores, scores, category.threshold.value)
            if drift is not None:
                lines.append(f"dskd_drift_p_value{_labels(('category',), (category.name,))} {drift.p_value:.6g}")
        return "\n".join(lines) + "\n"

    def _latency(self) -> list[str]:
        lines = _help("dskd_inspection_seconds", "Time of a request for verdicts.", "histogram")
        count = 0
        for bound, number in zip((*map(str, _BOUNDS), "+Inf"), self._buckets, strict=True):
            count += number
            lines.append(f'dskd_inspection_seconds_bucket{{le="{bound}"}} {count}')
        return [*lines, f"dskd_inspection_seconds_sum {self._seconds:.6g}", f"dskd_inspection_seconds_count {count}"]


def _help(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _counter(name: str, text: str, labels: Sequence[str], counts: Mapping[Any, int]) -> list[str]:
    found = (f"{name}{_labels(labels, key)} {count}" for key, count in sorted(counts.items()))
    return [*_help(name, text, "counter"), *found]


def _labels(names: Sequence[str], values: Sequence[object]) -> str:
    said = (f'{name}="{_escaped(str(value))}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(said) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
