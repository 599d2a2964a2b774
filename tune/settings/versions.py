"""The flags of `tune/versions.py`."""

import os
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from tune.storage.uris import LOCAL_RESULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionsSettings:
    """Show the registered versions of a category's detector.

    Which one is champion, since when, by which search and why. With
    --champion another version becomes champion; MLflow keeps the reason.
    """

    category: Positional[Annotated[str, arg(metavar="CATEGORY")]]
    """Name of the category."""
    champion: int | None = None
    """Version that becomes champion, such as the one before the present."""
    reason: str = ""
    """Why, for those who ask later; needed with --champion."""
    storage: str = LOCAL_RESULTS
    """Local folder given to the search as --storage, whose MLflow file is read without --tracking-uri."""
    tracking_uri: str | None = None
    """MLflow server; by default $MLFLOW_TRACKING_URI, or the SQLite file in a local storage folder."""
    json: bool = False
    """Print one JSON document on stdout."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracking_uri", self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None)
        if self.champion is not None and not self.reason.strip():
            raise ValueError("--champion needs --reason TEXT, which MLflow keeps beside the version.")
        if self.champion is None and self.reason:
            raise ValueError("--reason is of use with --champion VERSION only.")
