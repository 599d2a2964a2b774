"""Detectors in this process: one thread computes, and takes what waits as one batch."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from dskd.checkpoint import RECORD_FILE, BrokenDetectorError
from dskd.config import Precision
from dskd.detector import PREDICT_CHUNK, Detector
from dskd.jobs.feedback import Quarantine, QuarantineFullError
from dskd.page.inspector import Category, Judged, Photo, Question, Refusal, unknown_category
from dskd.page.judging import check_photo, describe_category, judge_photos

MAX_WAITING = 256
"""Images in the queue; a request that would exceed them is answered with 503."""
_log = logging.getLogger(__name__)


class Bench:
    """An `Inspector` of detector folders. A folder whose record changes, by feedback or a new search, is read again."""

    def __init__(self, folders: Sequence[Path], device: str = "cpu", precision: Precision = "float32") -> None:
        """Load the detectors; raises ValueError where two are of one category, BrokenDetectorError as `Detector`."""
        self._device, self._precision = device, precision
        self._folders: dict[str, Path] = {}
        self._loaded: dict[str, tuple[object, Detector]] = {}
        for folder in folders:
            stamp, detector = _stamp(folder), Detector.load(folder, device, precision)
            name = detector.record.category
            if name in self._folders:
                raise ValueError(
                    f"{self._folders[name]} and {folder} are both of the category {name!r}; serve one of them."
                )
            self._folders[name], self._loaded[name] = folder, (stamp, detector)
        self._lock = threading.Lock()
        self._waiting: queue.Queue[tuple[Question, Future[dict[str, Any]]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="dskd-bench", daemon=True)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The computing thread runs in this block; what still waits at its end is answered first."""
        self._thread.start()
        try:
            yield
        finally:
            self._waiting.put(None)
            self._thread.join()

    async def categories(self) -> Sequence[Category]:
        detectors = await asyncio.to_thread(lambda: [self._detector(name) for name in self._folders])
        return [describe_category(detector.record) for detector in detectors]

    async def inspect(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        for question in questions:
            if question.category not in self._folders:
                raise unknown_category(question.category, tuple(self._folders))
        if self._waiting.qsize() + len(questions) > MAX_WAITING:
            raise Refusal(503, f"More than {MAX_WAITING} images wait already; send these again in a few seconds.")
        answers: list[Future[dict[str, Any]]] = [Future() for _ in questions]
        for each in zip(questions, answers, strict=True):
            self._waiting.put(each)
        return list(await asyncio.gather(*map(asyncio.wrap_future, answers)))

    async def keep_feedback(self, category: str, photo: Photo, judged: Judged) -> dict[str, Any]:
        if category not in self._folders:
            raise unknown_category(category, tuple(self._folders))
        return await asyncio.to_thread(self._keep, category, photo, judged)

    def _keep(self, category: str, photo: Photo, judged: Judged) -> dict[str, Any]:
        check_photo(photo)
        version = self._detector(category).record.detector_version
        try:
            return Quarantine.of(self._folders[category]).keep(photo.content, judged, photo.name, version)
        except QuarantineFullError as error:
            raise Refusal(503, str(error)) from None

    def _detector(self, name: str) -> Detector:
        """The detector of a category as its folder is now; the one before where that cannot be read."""
        with self._lock:
            stamp, detector = self._loaded[name]
            with contextlib.suppress(OSError):  # gone for a moment, while a new one takes its place
                if (now := _stamp(self._folders[name])) != stamp:
                    try:
                        detector = Detector.load(self._folders[name], self._device, self._precision)
                    except BrokenDetectorError as error:
                        _log.error("goes on with the detector before: %s", error)
                    self._loaded[name] = now, detector
            return detector

    def _work(self) -> None:
        is_open = True
        while is_open:
            batch: dict[str, list[tuple[Question, Future[dict[str, Any]]]]] = {}
            item = self._waiting.get()
            for _ in range(PREDICT_CHUNK):
                if item is None:
                    is_open = False
                    break
                if item[1].set_running_or_notify_cancel():  # who asked may be gone
                    batch.setdefault(item[0].category, []).append(item)
                try:
                    item = self._waiting.get_nowait()
                except queue.Empty:
                    break
            else:
                self._waiting.put(item)
            for name, items in batch.items():
                answer_each(self._detector(name), items)


def answer_each(detector: Detector, items: Sequence[tuple[Question, Future[dict[str, Any]]]]) -> None:
    """Answer questions as one batch; where that fails one by one, so that one image costs no other its verdict."""
    try:
        rows = judge_photos(detector, [question for question, _ in items])
    except Exception as error:
        if len(items) > 1:
            for item in items:
                answer_each(detector, [item])
        else:
            items[0][1].set_exception(error)
        return
    for (_, answer), row in zip(items, rows, strict=True):
        answer.set_result(row)


def _stamp(folder: Path) -> object:
    """Changes whenever the record is written, which replaces the file."""
    found = (folder / RECORD_FILE).stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
