"""What flags may hold: the ranges of numbers, in their types, and one rule for names.

Each class of settings calls `check_ranges(self)` first, so that nothing begins with a number out of range.
"""

import math
import re
import typing
from typing import Annotated, Any, NamedTuple

from tune.storage.shown import HIDDEN, is_readable, printable, shown_url
from tune.storage.uris import absolute, is_address

MLFLOW_EXAMPLE = "http://HOST:5000"
STUDIES_EXAMPLE = "postgresql://USER:PASSWORD@HOST:5432/DATABASE"
_LONGEST_NAME = 100
_WITH_USER = ("http", "https", "postgres", "postgresql", "mysql", "mariadb", "mssql", "oracle")
"""Schemes whose addresses may hold a user and a password."""
_NAME = re.compile(r"\w[\w.-]*")


class Range(NamedTuple):
    """The values that a number may have, both ends included."""

    low: float
    high: float
    may_be_low: bool = True
    """Whether `low` itself is allowed."""

    def check(self, flag: str, value: float) -> None:
        """Raise ValueError, naming the flag, if the value is outside or no number."""
        is_high_enough = value >= self.low if self.may_be_low else value > self.low
        if not (math.isfinite(value) and is_high_enough and value <= self.high):
            least = f"at least {self.low:g}" if self.may_be_low else f"above {self.low:g}"
            raise ValueError(f"{flag} must be {least} and at most {self.high:,.10g}, got {value}.")


Trials = Annotated[int, Range(1, 100_000)]
Processes = Annotated[int, Range(1, 1_000)]
"""Workers of a trial, or of an inspection."""
Together = Annotated[int, Range(1, 10_000)]
"""Trials that run at once."""
Sharing = Annotated[int, Range(1, 64)]
"""Trials of one process."""
Finalists = Annotated[int, Range(0, 1_000)]
Errors = Annotated[float, Range(0, 100)]
"""Standard errors."""
Images = Annotated[int, Range(1, 100_000)]
Cpus = Annotated[float, Range(0, 1_024, may_be_low=False)]
Gpus = Annotated[float, Range(0, 64)]
Gigabytes = Annotated[float, Range(0, 1_000_000)]
Port = Annotated[int, Range(1, 65_535)]
Requests = Annotated[float, Range(1, 1_000_000)]
"""A minute, of one address."""
Seconds = Annotated[float, Range(0, 86_400, may_be_low=False)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def check_ranges(settings: Any) -> None:
    """Raise ValueError for the first field of a dataclass whose number is outside the range of its type."""
    for name, kind in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for limits in _ranges(kind):
            if value is not None:
                limits.check(f"--{name.replace('_', '-')}", value)


def _ranges(kind: Any) -> list[Range]:
    """The ranges in an annotation, also of one beside None."""
    own = [each for each in getattr(kind, "__metadata__", ()) if isinstance(each, Range)]
    return own + [found for inner in typing.get_args(kind) if inner is not None for found in _ranges(inner)]


def check_name(name: str, flag: str) -> None:
    """Raise ValueError if a name cannot be a folder, a key, an experiment and a word of a command line in one.

    Every name that a flag gives to something new, or of something that was so named, follows this rule.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"{flag} takes a name of letters, digits, '.', '_' and '-', with neither '.' nor '-' in front, of at most "
            f"{_LONGEST_NAME} characters, got {printable(repr(name[: _LONGEST_NAME + 1]))}."
        )


def check_storage_address(address: str, flag: str) -> None:
    """Raise ValueError on anything but a folder or s3://BUCKET/PATH: credentials in an address would be passed on."""
    if "\0" in address or not address.strip():
        raise ValueError(f"{flag} takes a folder or s3://BUCKET/PATH, got {address!r}.")
    if shown_url(address) == HIDDEN or (is_address(address) and {"@", "?", "#"} & set(address)):
        raise ValueError(
            f"{flag} takes a folder or s3://BUCKET/PATH without user, key or question mark, got {shown_url(address)}; "
            "keys belong into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a server into AWS_ENDPOINT_URL."
        )


def resolved_server(url: str | None, flag: str, example: str) -> str | None:
    """The URL of a server or database, in the form that its client reads, or None.

    PostgreSQL gets the driver that is installed: without one, SQLAlchemy takes another from version to version.
    Raises ValueError if the URL cannot be told apart, without showing it.
    """
    if url is None:
        return None
    scheme, separator, rest = url.partition("://")
    has_user = "@" in rest.partition("/")[0] and scheme.partition("+")[0].lower() not in _WITH_USER
    if shown_url(url) == HIDDEN or not is_readable(url) or printable(url) != url or has_user:
        raise ValueError(
            f"{flag} cannot be read as an address, and is not shown since it may hold a password; write {example}, "
            "with each of @ : / ? # [ ] % and space in user or password percent-encoded (@ %40, # %23, / %2F)."
        )
    if separator and scheme.startswith("sqlite") and rest.startswith("/") and rest[1:2] not in ("", "/", ":"):
        return f"{scheme}:///{absolute(rest[1:])}"  # the same file in every process
    if separator and scheme == "postgres":
        raise ValueError(f"{flag} begins with postgres://, which SQLAlchemy does not know; write postgresql://….")
    return f"postgresql+psycopg2://{rest}" if separator and scheme == "postgresql" else url
