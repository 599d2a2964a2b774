"""The versions of a category's registered model: which one is champion, since when, by which search and why."""

import datetime
from typing import NamedTuple

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tune.tracking.registry import (
    CHAMPION,
    REASON,
    SINCE,
    UNTIL,
    model_name,
    note_champion,
    quoted,
    time_text,
)


class DetectorVersion(NamedTuple):
    """One version of a category's registered model; texts are empty where MLflow does not know."""

    category: str
    version: int
    is_champion: bool
    registered: str
    """Time of registration, in UTC to the second; the times below are in the same form."""
    search: str
    trial_id: str
    objective: float | None
    """Validation objective; comparable only between versions of the same `data_sha256`."""
    data_sha256: str
    detector_version: str
    """As in the verdicts of that detector."""
    since: str
    """When it last became champion."""
    until: str
    """When another became champion in its place."""
    reason: str
    """Why it last became champion."""


def detector_versions(client: MlflowClient, category: str) -> list[DetectorVersion]:
    """All versions of a category, the newest first; ValueError if there is none."""
    name = model_name(category)
    found = client.search_model_versions(f"name = {quoted(name)}")
    if not found:
        raise ValueError(f"no registered model {name}: no search has registered a detector of {category!r}.")
    champion = champion_version(client, category)
    versions = [_described(category, version, champion) for version in found]
    return sorted(versions, key=lambda each: -each.version)


def champion_version(client: MlflowClient, category: str) -> str:
    """The version with the alias `champion`; empty if none has it."""
    try:
        return str(client.get_model_version_by_alias(model_name(category), CHAMPION).version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return ""


def _described(category: str, version: ModelVersion, champion: str) -> DetectorVersion:
    tags = dict(version.tags)
    objective = tags.get("dskd.objective")
    created = datetime.datetime.fromtimestamp(version.creation_timestamp / 1000, datetime.UTC)
    return DetectorVersion(
        category=category,
        version=int(version.version),
        is_champion=str(version.version) == champion,
        registered=time_text(created),
        search=tags.get("dskd.search", ""),
        trial_id=tags.get("dskd.trial", ""),
        objective=None if objective is None else float(objective),
        data_sha256=tags.get("dskd.data_sha256", ""),
        detector_version=tags.get("dskd.detector_version", ""),
        since=tags.get(SINCE, ""),
        until=tags.get(UNTIL, ""),
        reason=tags.get(REASON, ""),
    )


def set_champion(client: MlflowClient, category: str, version: int, reason: str) -> DetectorVersion:
    """Give the alias `champion` to a version by hand, and keep the reason; returns that version.

    Raises ValueError if there is no such version, or if it is the champion already.
    """
    known = {each.version: each for each in detector_versions(client, category)}
    if version not in known:
        numbers = ", ".join(map(str, sorted(known)))
        raise ValueError(f"{model_name(category)} has no version {version}; there are: {numbers}.")
    if known[version].is_champion:
        raise ValueError(f"version {version} of {model_name(category)} is the champion already.")
    before = champion_version(client, category)
    client.set_registered_model_alias(model_name(category), CHAMPION, str(version))
    note_champion(client, category, str(version), before, reason)
    return next(each for each in detector_versions(client, category) if each.version == version)
