"""Entry: `python tune/pull.py CATEGORY…|all --name NAME --to DIR` delivers champions as detector folders."""

import json as json_format
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tyro.conf import Positional

from dskd.usage import BadUsage, deferred, parse_into
from tune.settings import LOCAL_RESULTS

if TYPE_CHECKING:
    from dskd.checkpoint import DetectorRecord


def pull(
    categories: Positional[tuple[str, ...]],
    /,
    *,
    to: Path,
    name: str = "search",
    alias: str | None = None,
    storage: str = LOCAL_RESULTS,
    tracking_uri: str | None = None,
    json: bool = False,
) -> None:
    """Download the best detector of each category, verified; each folder appears whole or not at all.

    A search that still runs, or was killed, gives its best trial so far. A download that broke off is gone on
    with by the same command.

    Args:
        categories: Names of categories, or all.
        to: Folder that receives one detector folder per category.
        name: Name of the search.
        alias: Take the versions of MLflow's registered models that have this alias, champion for one, instead of a
            search's own best.
        storage: Folder or s3://bucket/path that the search was given.
        tracking_uri: MLflow server, for --alias and for links to the runs in the table; unless given,
            $MLFLOW_TRACKING_URI, and for --alias the SQLite file in a local storage folder.
        json: Print one JSON document on stdout.
    """
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    from rich.console import Console
    from rich.table import Table

    from dskd.checkpoint import threshold_for

    tracking = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    wanted = () if categories in ((), ("all",)) else tuple(dict.fromkeys(categories))
    title = f"Champions of {name}" if alias is None else f"Registered models with the alias {alias}"
    table = Table(title=title)
    for column in (
        "category",
        "validation",
        "image AUROC",
        "pixel AUROC",
        "AUPRO",
        "threshold",
        "folder",
        "run",
    ):
        table.add_column(column, overflow="fold")
    documents = []
    if alias is None:
        pulled = _from_storage(wanted, to, name, storage, tracking)
    else:
        pulled = _from_registry(wanted, to, alias, tracking or _embedded_tracking(storage))
    for one in pulled:
        record, threshold = one.record, threshold_for(one.record.thresholds, 0.01)
        figures = ("val/objective", "test/image_auroc", "test/pixel_auroc", "test/aupro")
        remarks = [
            *([] if one.is_final else ["best so far"]),
            *(["chosen by the test images"] if record.selection == "oracle" else []),
            *(["untrained teacher"] if record.is_untrained_teacher else []),
        ]
        table.add_row(
            f"{one.category} ({', '.join(remarks)})" if remarks else one.category,
            *(f"{record.metrics[figure]:.4f}" if figure in record.metrics else "–" for figure in figures),
            f"{threshold.value:.4g} ({threshold.false_alarm_rate:.1%} false alarms)",
            str(one.folder),
            one.link,
        )
        documents.append(
            {"category": one.category, "folder": str(one.folder), "trial": one.trial_id, "run": one.run_id}
            | {"is_final": one.is_final, "version": one.version}
            | {"teacher": record.teacher, "metrics": dict(record.metrics)}
            | {"thresholds": [threshold._asdict() for threshold in record.thresholds]}
        )
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    console.print(table)
    console.print(f"inspect images: dskd predict {documents[0]['folder']} IMAGES --out verdicts", markup=False)
    if json:
        print(json_format.dumps({"name": name, "detectors": documents}, indent=2))  # noqa: T201


class _Pulled(NamedTuple):
    """A delivered detector and where it came from."""

    category: str
    folder: Path
    record: "DetectorRecord"
    trial_id: str
    run_id: str
    link: str
    version: str
    """Of the registered model; empty where it came from a search's storage."""
    is_final: bool
    """False for the best trial so far of a search that has not ended."""


def _from_storage(
    categories: tuple[str, ...], to: Path, name: str, storage: str, tracking: str | None
) -> Iterator[_Pulled]:
    from tune.champions import champion_categories, deliver, find_best
    from tune.storage import open_search
    from tune.tracking import run_link

    search = open_search(storage, name)
    known = champion_categories(search)
    if not known:
        raise ValueError(f"{search.uri} holds no champion; check --name and --storage, or wait for the first.")
    found = [(category, find_best(search, category)) for category in categories or known]
    if missing := [category for category, champion in found if champion is None]:
        raise ValueError(f"no champion of {missing[0]!r} in {search.uri}; there are: {', '.join(known)}.")
    for category, champion in found:
        assert champion is not None
        record = deliver(search, champion, to / category)
        run_id = champion.run_id
        link = run_link(tracking, run_id) if tracking else run_id[:8]
        yield _Pulled(category, to / category, record, champion.trial_id, run_id, link, "", champion.is_final)


def _from_registry(categories: tuple[str, ...], to: Path, alias: str, tracking: str) -> Iterator[_Pulled]:
    from tune.champions import deliver_files
    from tune.registry import fetch, find_registered, registered_categories
    from tune.tracking import check_server, registry_client, run_link, without_password

    check_server(tracking)
    client = registry_client(tracking)
    wanted = categories or registered_categories(client, alias)
    if not wanted:
        raise ValueError(f"no model of {without_password(tracking)} has the alias {alias!r}; check it and the address.")
    for detector in [find_registered(client, category, alias) for category in wanted]:
        folder = to / detector.category
        record = deliver_files(
            lambda file, path, detector=detector: fetch(client, detector, file, path),  # type: ignore[misc]
            detector.files,
            folder,
        )
        run_id, version = detector.run_id, detector.version
        yield _Pulled(
            detector.category, folder, record, detector.trial_id, run_id, run_link(tracking, run_id), version, True
        )


def _embedded_tracking(storage: str) -> str:
    """The SQLite file that a search on one machine keeps in its storage folder."""
    file = Path(storage).absolute() / "mlflow.db"
    if "://" in storage or not file.is_file():
        raise ValueError(f"--alias needs --tracking-uri or $MLFLOW_TRACKING_URI: there is no {file}.")
    return f"sqlite:///{file}"


def main() -> None:
    """Pull as the flags say; bad input ends with one line and exit code 2."""
    try:
        parse_into(deferred(pull), sys.argv[1:], prog="tune/pull.py")()
    except BadUsage as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"pull: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
