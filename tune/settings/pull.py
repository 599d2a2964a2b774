"""The flags of `tune/pull.py`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from tune.settings.limits import MLFLOW_EXAMPLE, check_name, check_storage_address, resolved_server
from tune.storage.uris import LOCAL_RESULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class PullSettings:
    """Download and verify the best detector of each category.

    A folder appears complete or not at all. A search that is still running, or
    was killed, gives its best trial so far. The same command resumes a partial
    download.
    """

    categories: Positional[Annotated[tuple[str, ...], arg(metavar="CATEGORY…")]]
    """Names of categories, or all."""
    out: Path
    """Folder that receives one detector folder per category."""
    name: str = "search"
    """Name of the search."""
    alias: str | None = None
    """Download the versions of MLflow's registered models with this alias, such as champion, instead of the best
    detectors of a search."""
    version: int | None = None
    """Download this version of one category's registered model, such as the champion of last week."""
    storage: str = LOCAL_RESULTS
    """Folder or s3://bucket/path given to the search as --storage."""
    tracking_uri: str | None = field(default=None, repr=False)
    """MLflow server, for --alias and for links to the runs in the table; by default $MLFLOW_TRACKING_URI, or for
    --alias the SQLite file in a local storage folder."""
    json: bool = False
    """Print one JSON document on stdout."""

    def __post_init__(self) -> None:
        given = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        object.__setattr__(self, "tracking_uri", resolved_server(given, "--tracking-uri", MLFLOW_EXAMPLE))
        check_name(self.name, "--name")
        check_storage_address(self.storage, "--storage")
        if self.alias is not None:
            check_name(self.alias, "--alias")

        if self.version is not None and (self.alias is not None or len(self.wanted) != 1):
            raise ValueError("--version takes one category, and no --alias: each category counts its own versions.")

    @property
    def is_registered(self) -> bool:
        """Whether the detectors come from MLflow's registry."""
        return self.alias is not None or self.version is not None

    @property
    def wanted(self) -> tuple[str, ...]:
        """The given categories, each once; empty means all."""
        return () if self.categories in ((), ("all",)) else tuple(dict.fromkeys(self.categories))
