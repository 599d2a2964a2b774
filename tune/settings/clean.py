"""The flags of `tune/clean.py`."""

from dataclasses import dataclass

from tune.settings.limits import check_name, check_storage_address
from tune.storage.uris import LOCAL_RESULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanSettings:
    """List what of a search's storage nobody needs any more, with its size.

    Checkpoints of trials that were pruned or failed or are unknown, checkpoints
    that newer ones have replaced, and what killed processes have left. Nothing
    is removed without --delete. The search goes on afterwards as before.
    """

    name: str = "search"
    """Name of the search."""
    storage: str = LOCAL_RESULTS
    """Folder or s3://bucket/path given to the search as --storage."""
    delete: bool = False
    """Remove what is listed; refused while the search runs."""

    def __post_init__(self) -> None:
        check_name(self.name, "--name")
        check_storage_address(self.storage, "--storage")
