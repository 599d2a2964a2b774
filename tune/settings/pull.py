"""What to download: the flags of `tune/pull.py`."""

import os
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from tune.storage.uris import LOCAL_RESULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class PullSettings:
    """Download the best detector of each category, verified; each folder appears whole or not at all.

    A search that still runs, or was killed, gives its best trial so far. The same command resumes a partial
    download.
    """

    categories: Positional[tuple[str, ...]]
    """Names of categories, or all."""
    out: Path
    """Folder that receives one detector folder per category."""
    name: str = "search"
    """Name of the search."""
    alias: str | None = None
    """Take the versions of MLflow's registered models that have this alias, champion for one, instead of a search's
    own best."""
    storage: str = LOCAL_RESULTS
    """Folder or s3://bucket/path that the search was given."""
    tracking_uri: str | None = None
    """MLflow server, for --alias and for links to the runs in the table; unless given, $MLFLOW_TRACKING_URI, and for
    --alias the SQLite file in a local storage folder."""
    json: bool = False
    """Print one JSON document on stdout."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracking_uri", self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Categories asked for, each once; none means all."""
        return () if self.categories in ((), ("all",)) else tuple(dict.fromkeys(self.categories))
