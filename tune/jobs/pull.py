"""Downloads the best detector of each category from a search's storage or from MLflow's registry."""

import json
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dskd.checkpoint import DetectorRecord, threshold_for
from tune.jobs.tables import print_command, print_line, print_rows, stderr_console
from tune.settings.pull import PullSettings
from tune.storage.champions import champion_categories, download_detector, download_detector_files, find_best
from tune.storage.files import open_search
from tune.tracking.client import check_server, embedded_tracking, registry_client, run_link, without_password
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
        }


def pull(settings: PullSettings) -> int:
    """Download the detectors and print a table; returns exit code 0.

    Raises ValueError or OSError, in one line, if one cannot be downloaded.
    """
    pulled = list(_from_registry(settings) if settings.is_registered else _from_storage(settings))
    _show(pulled, settings)
    if settings.json:
        detectors = [detector.to_dict() for detector in pulled]
        print(json.dumps({"name": settings.name, "detectors": detectors}, indent=2))  # noqa: T201
    return 0


def _from_storage(settings: PullSettings) -> Iterator[PulledDetector]:
    search = open_search(settings.storage, settings.name)
    known = champion_categories(search)
    if not known:
        raise ValueError(f"{search.uri} holds no champion; check --name and --storage, or wait for the first.")
    found = [(category, find_best(search, category)) for category in settings.wanted or known]
    if missing := [category for category, champion in found if champion is None]:
        raise ValueError(f"no champion of {missing[0]!r} in {search.uri}; there are: {', '.join(known)}.")
    for category, champion in found:
        assert champion is not None
        record = download_detector(search, champion, settings.out / category)
        run_id = champion.run_id
        link = run_link(settings.tracking_uri, run_id) if settings.tracking_uri else run_id[:8]
        folder = settings.out / category
        yield PulledDetector(category, folder, record, champion.trial_id, run_id, link, "", champion.is_final)


def _from_registry(settings: PullSettings) -> Iterator[PulledDetector]:
    tracking = settings.tracking_uri or embedded_tracking(settings.storage, "--alias and --version")
    check_server(tracking)
    client = registry_client(tracking)
    if settings.version is not None:
        (category,) = settings.wanted
        found = [find_version(client, category, settings.version)]
    else:
        alias = settings.alias
        assert alias is not None
        wanted = settings.wanted or registered_categories(client, alias)
        if not wanted:
            where = without_password(tracking)
            raise ValueError(f"no model of {where} has the alias {alias!r}; check it and the address.")
        found = [find_registered(client, category, alias) for category in wanted]
    for detector in found:
        folder = settings.out / detector.category
        record = download_detector_files(partial(fetch, client, detector), detector.files, folder)
        link = run_link(tracking, detector.run_id)
        yield PulledDetector(
            detector.category, folder, record, detector.trial_id, detector.run_id, link, detector.version, True
        )


def _show(pulled: list[PulledDetector], settings: PullSettings) -> None:
    rows = []
    for detector in pulled:
        record = detector.record
        threshold = threshold_for(record.thresholds, TABLE_RATE)
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
    print_command(console, f"dskd predict {shlex.quote(str(pulled[0].folder))} IMAGES --out verdicts")
