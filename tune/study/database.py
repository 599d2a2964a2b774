"""The database that holds Optuna's studies, which may be away for a while."""

import functools
from typing import Any

import optuna
import sqlalchemy
import tenacity

from tune.storage.shown import shown, shown_url
from tune.study.context import give_up, study_context

_PATIENCE_SECONDS = 120.0
"""Seconds in which a server that refuses connections is asked again."""
_LONGEST_PAUSE = 5.0
"""Maximum seconds between two attempts."""


class StudyStorage(optuna.storages.RDBStorage):
    """Optuna's storage, pickled without its URL, so that what Tune writes contains no password.

    It waits for a server that is away; after `_PATIENCE_SECONDS` any operation raises ConnectionError, and the study of
    this process has that for its reason to end.
    """

    def __init__(self, url: str) -> None:
        is_file = url.startswith("sqlite")
        waits: dict[str, Any] = {} if is_file else {"creator": functools.partial(connect_patiently, url)}
        super().__init__(url, engine_kwargs={"pool_pre_ping": True} | waits)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _restore_storage, ()


def _restore_storage() -> StudyStorage:
    return StudyStorage(study_context().plan.studies)


def connect_patiently(url: str) -> Any:
    """A connection of the URL's driver to its server; errors as `StudyStorage`."""
    address = sqlalchemy.make_url(url)
    kind: Any = address.get_dialect()
    driver = kind.import_dbapi()
    dialect = kind(dbapi=driver)
    words, options = dialect.create_connect_args(address)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(driver.OperationalError),
        wait=tenacity.wait_exponential(multiplier=0.5, max=_LONGEST_PAUSE),
        stop=tenacity.stop_after_delay(_PATIENCE_SECONDS),
        reraise=True,
    )
    try:
        return retrying(dialect.connect, *words, **options)
    except driver.OperationalError as error:
        reason = shown((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise give_up(
            ConnectionError(
                f"the database of the studies, {shown_url(url)}, does not answer: {reason}; "
                "the same command continues the search"
            )
        ) from None
