"""The flags of `tune/serve.py`."""

import os
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from dskd.config import Precision
from tune.settings.limits import (
    MLFLOW_EXAMPLE,
    Cpus,
    Gpus,
    Port,
    Processes,
    Requests,
    Seconds,
    check_name,
    check_ranges,
    check_storage_address,
    resolved_server,
)
from tune.storage.uris import LOCAL_RESULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """Serve the champions of all categories over HTTP, and the inspector's page at /.

    A category's new champion takes the place of the old one while requests go on. It listens on loopback, and asks
    for the token that it prints, or that $DSKD_PAGE_TOKEN holds.
    """

    categories: Positional[Annotated[tuple[str, ...], arg(metavar="CATEGORY…")]] = ()
    """Names of categories, or all."""
    name: str = "search"
    """Name of the search."""
    alias: str | None = None
    """Serve the versions of MLflow's registered models with this alias, such as champion, instead of the champions of
    a search; whoever moves the alias changes what is served."""
    storage: str = LOCAL_RESULTS
    """Folder or s3://bucket/path given to the search as --storage."""
    tracking_uri: str | None = field(default=None, repr=False)
    """MLflow server of --alias; by default $MLFLOW_TRACKING_URI, or the SQLite file in a local storage folder."""
    feedback: str | None = None
    """Folder or s3://bucket/path for images that inspectors judge; by default feedback/ beside the search's champions,
    with --alias none."""
    port: Port = 8000
    """TCP port on loopback."""
    allowed_host: tuple[str, ...] = ()
    """Names under which a proxy publishes the server."""
    poll_seconds: Seconds = 30.0
    """Between looks for new champions."""
    replicas: Processes = 1
    """Processes that hold all champions."""
    cpus_per_replica: Cpus = 1.0
    """CPUs of each."""
    gpus_per_replica: Gpus = 0.0
    """GPUs of each, fractions allowed."""
    precision: Precision = "float32"
    """Of the networks on a GPU, as for `dskd predict`."""
    requests_per_minute: Requests = 6000.0
    """Of one address; behind a proxy all clients have one address. More are answered with 429."""
    max_megapixels: float = 100.0
    """Larger images are refused before they are decoded."""
    address: str | None = None
    """Ray cluster: auto or ray://…; by default one is started on this machine."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))  # lists, from a manifest
        object.__setattr__(self, "allowed_host", tuple(self.allowed_host))
        given = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        object.__setattr__(self, "tracking_uri", resolved_server(given, "--tracking-uri", MLFLOW_EXAMPLE))
        object.__setattr__(self, "address", self.address or os.environ.get("RAY_ADDRESS") or None)
        check_ranges(self)
        if self.precision != "float32" and not self.gpus_per_replica:
            raise ValueError(f"--precision {self.precision} needs --gpus-per-replica above 0; on a CPU it is float32.")
        check_name(self.name, "--name")
        check_storage_address(self.storage, "--storage")
        if self.feedback is not None:
            check_storage_address(self.feedback, "--feedback")
        if self.alias is not None:
            check_name(self.alias, "--alias")
        if not self.max_megapixels > 0:
            raise ValueError(f"--max-megapixels must be above 0, got {self.max_megapixels}.")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The given categories, each once; empty means all."""
        return () if self.categories in ((), ("all",)) else tuple(dict.fromkeys(self.categories))
