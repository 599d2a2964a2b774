"""Shows the versions of a category's registered detector, and makes another one champion."""

import json

from tune.jobs.tables import print_command, print_line, print_rows, stderr_console
from tune.settings.versions import VersionsSettings
from tune.storage.shown import command
from tune.tracking.client import check_server, embedded_tracking, registry_client
from tune.tracking.versions import DetectorVersion, detector_versions, set_champion

_COLUMNS = ("version", "champion", "validation", "images", "detector", "search", "trial", "registered", "why")


def versions(settings: VersionsSettings) -> int:
    """Print the versions, after the alias was moved if that is asked for; returns exit code 0.

    Raises ValueError or OSError, in one line, on an unknown category or version.
    """
    tracking = settings.tracking_uri or embedded_tracking(settings.storage, "tune/versions.py")
    check_server(tracking)
    client = registry_client(tracking)
    if settings.champion is not None:
        set_champion(client, settings.category, settings.champion, settings.reason.strip())
    found = detector_versions(client, settings.category)
    console = stderr_console()
    print_rows(console, f"Detectors of {settings.category}", _COLUMNS, [_row(each) for each in found])
    print_line(console, "validation figures compare only versions of the same images")
    print_line(console, "pull one of them:")
    words = ["python", "tune/pull.py", settings.category, "--version", str(found[0].version), "--out", "detectors"]
    print_command(console, command(words))
    if settings.json:
        document = {"category": settings.category, "versions": [each._asdict() for each in found]}
        print(json.dumps(document, indent=2))  # noqa: T201
    return 0


def _row(version: DetectorVersion) -> tuple[str, ...]:
    time = f"since {version.since}" if version.is_champion else f"until {version.until}" if version.until else "–"
    return (
        str(version.version),
        time if version.since or not version.is_champion else "yes",
        "–" if version.objective is None else f"{version.objective:.4f}",
        version.data_sha256[:8] or "–",
        version.detector_version or "–",
        version.search or "–",
        version.trial_id or "–",
        version.registered,
        version.reason or "–",
    )
