"""Downloads the best detector of each category from a search's storage or from MLflow's registry."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dskd.checkpoint import DetectorRecord
from tune.jobs.tables import print_command, print_line, print_rows, stderr_console
from tune.settings.entry import say
from tune.settings.pull import PullSettings
from tune.storage.champions import champion_categories, download_detector, download_detector_files, find_best
from tune.storage.files import StorageError, open_search
from tune.storage.shown import command, shown, shown_url
from tune.tracking.client import check_server, embedded_tracking, registry_client, run_link
from tune.tracking.registry import fetch, find_registered, find_version, registered_categories
from tune.trial.evaluation import TABLE_RATE

_COLUMNS = ("category", "validation", "image AUROC", "pixel AUROC", "AUPRO", "threshold", "folder", "run")
_FIGURES = ("val/objective", "test/image_auroc", "test/pixel_auroc", "test/aupro")


class PulledDetector(NamedTuple):
    """A downloaded detector and its origin."""

    category: str
    folder: Path
    record: DetectorRecord
    trial_id: str
    run_id: str
    link: str
    version: str
    """Version of the registered model; empty if it came from a search's storage."""
    is_final: bool
    """False for the best trial so far of a search that has not ended."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "category": self.category,
            "folder": str(self.folder),
            "trial": self.trial_id,
            "run": self.run_id,
            "is_final": self.is_final,
            "version": self.version,
            "teacher": self.record.teacher,
            "metrics": dict(self.record.metrics),
            "thresholds": [threshold._asdict() for threshold in self.record.thresholds],
            **self.record.rates(TABLE_RATE),
        }


def pull(settings: PullSettings) -> int:
    """Download the detectors and print a table; returns the exit code: 1 if some are not whole, which are named.

    Raises ValueError or OSError, in one line, if there is nothing to download.
    """
    pulled, faults = list[PulledDetector](), dict[str, str]()
    for category, fetched in _from_registry(settings) if settings.is_registered else _from_storage(settings):
        try:
            pulled.append(fetched())
        except (ValueError, OSError) as error:
            faults[category] = shown(str(error))
            say(f"{category}: not pulled: {error}")
    if pulled:
        _show(pulled, settings)
    if settings.json:
        detectors = [detector.to_dict() for detector in pulled]
        print(json.dumps({"name": settings.name, "detectors": detectors, "faults": faults}, indent=2))  # noqa: T201
    return 1 if faults else 0


_Fetched = Callable[[], PulledDetector]
"""Downloads one detector; raises ValueError or OSError, in one line, if it is not whole."""


def _from_storage(settings: PullSettings) -> Iterator[tuple[str, _Fetched]]:
    search = open_search(settings.storage, settings.name)
    known = champion_categories(search)
    if not known:
        raise ValueError(f"{search.uri} holds no champion; check --name and --storage, or wait for the first.")
    if missing := [category for category in settings.wanted if category not in known]:
        raise ValueError(f"no champion of {missing[0]!r} in {search.uri}; there are: {', '.join(known)}.")

    def fetched(category: str) -> PulledDetector:
        champion = find_best(search, category)
        if champion is None:
            raise StorageError(f"{search.uri} holds no champion of {category!r} any more.")
        folder, run_id = settings.out / category, champion.run_id
        record = download_detector(search, champion, folder)
        link = run_link(settings.tracking_uri, run_id) if settings.tracking_uri else run_id[:8]
        return PulledDetector(category, folder, record, champion.trial_id, run_id, link, "", champion.is_final)

    for category in settings.wanted or known:
        yield category, partial(fetched, category)


def _from_registry(settings: PullSettings) -> Iterator[tuple[str, _Fetched]]:
    tracking = settings.tracking_uri or embedded_tracking(settings.storage, "--alias and --version")
    check_server(tracking)
    client = registry_client(tracking)
    version, alias = settings.version, settings.alias
    wanted = settings.wanted if version is not None else settings.wanted or registered_categories(client, alias or "")
    if not wanted:
        raise ValueError(f"no model of {shown_url(tracking)} has the alias {alias!r}; check it and the address.")

    named = None if version is None else find_version(client, wanted[0], version)

    def fetched(category: str) -> PulledDetector:
        detector = named or find_registered(client, category, alias or "")
        folder = settings.out / category
        record = download_detector_files(partial(fetch, client, detector), detector.files, folder)
        link = run_link(tracking, detector.run_id)
        return PulledDetector(
            category, folder, record, detector.trial_id, detector.run_id, link, detector.version, True
        )

    for category in wanted:
        yield category, partial(fetched, category)


def _show(pulled: list[PulledDetector], settings: PullSettings) -> None:
    rows = []
    for detector in pulled:
        record = detector.record
        threshold = record.threshold(TABLE_RATE)
        remarks = [
            *([] if detector.is_final else ["best so far"]),
            *(["chosen by the test images"] if record.selection == "oracle" else []),
            *(["untrained teacher"] if record.is_untrained_teacher else []),
        ]
        rows.append(
            (
                f"{detector.category} ({', '.join(remarks)})" if remarks else detector.category,
                *(f"{record.metrics[figure]:.4f}" if figure in record.metrics else "–" for figure in _FIGURES),
                f"{threshold.value:.4g} ({threshold.false_alarm_rate:.1%} false alarms)",
                str(detector.folder),
                detector.link,
            )
        )
    console = stderr_console()
    named = f"Champions of {settings.name}"
    if settings.is_registered:
        which = f"the alias {settings.alias}" if settings.alias else f"the version {settings.version}"
        named = f"Registered models with {which}"
    print_rows(console, named, _COLUMNS, rows)
    print_line(console, "inspect images:")
    print_command(console, command(["dskd", "predict", str(pulled[0].folder), "IMAGES", "--out", "verdicts"]))
