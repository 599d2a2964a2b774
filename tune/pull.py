"""Entry: `python tune/pull.py CATEGORY…|all --name NAME --out DIR` delivers champions as detector folders."""

import json as json_format
import os
import sys
from pathlib import Path

from tyro.conf import Positional

from dskd.arguments import UsageError, deferred, parse_into
from tune.jobs.pull import embedded_tracking, from_registry, from_storage
from tune.storage.uris import LOCAL_RESULTS


def pull(
    categories: Positional[tuple[str, ...]],
    /,
    *,
    out: Path,
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
        out: Folder that receives one detector folder per category.
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
        pulled = from_storage(wanted, out, name, storage, tracking)
    else:
        pulled = from_registry(wanted, out, alias, tracking or embedded_tracking(storage))
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


def main() -> None:
    """Pull as the flags say; bad input ends with one line and exit code 2."""
    try:
        parse_into(deferred(pull), sys.argv[1:], prog="tune/pull.py")()
    except UsageError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"pull: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
