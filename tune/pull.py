"""Entry: `python tune/pull.py CATEGORY…|all --name NAME --to DIR` delivers champions as detector folders."""

import json as json_format
import os
import sys
from pathlib import Path

from tyro.conf import Positional

from dskd.usage import BadUsage, deferred, parse_into
from tune.settings import LOCAL_RESULTS


def pull(
    categories: Positional[tuple[str, ...]],
    /,
    *,
    to: Path,
    name: str = "search",
    storage: str = LOCAL_RESULTS,
    tracking_uri: str | None = None,
    json: bool = False,
) -> None:
    """Download the best detector of each category, verified; each folder appears whole or not at all.

    Args:
        categories: Names of categories, or all.
        to: Folder that receives one detector folder per category.
        name: Name of the search.
        storage: Folder or s3://bucket/path that the search was given.
        tracking_uri: MLflow server, for links to the runs in the table; $MLFLOW_TRACKING_URI unless given.
        json: Print one JSON document on stdout.
    """
    # Ray, MLflow and torch take seconds to import; --help and a mistyped flag need none of them.
    from rich.console import Console
    from rich.table import Table

    from dskd.checkpoint import threshold_for
    from tune.champions import champion_categories, deliver, find_champion
    from tune.storage import open_search
    from tune.tracking import run_link

    tracking = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    search = open_search(storage, name)
    known = champion_categories(search)
    if not known:
        raise ValueError(f"{search.uri} holds no champion; check --name and --storage, or wait for the first.")
    wanted = known if categories in ((), ("all",)) else tuple(dict.fromkeys(categories))
    found = [(category, find_champion(search, category)) for category in wanted]
    if missing := [category for category, champion in found if champion is None]:
        raise ValueError(f"no champion of {missing[0]!r} in {search.uri}; there are: {', '.join(known)}.")
    table = Table(title=f"Champions of {name}")
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
    for category, champion in found:
        assert champion is not None
        folder = to / category
        record = deliver(search, champion, folder)
        threshold = threshold_for(record.thresholds, 0.01)
        link = run_link(tracking, champion.run_id) if tracking else champion.run_id[:8]
        figures = ("val/objective", "test/image_auroc", "test/pixel_auroc", "test/aupro")
        table.add_row(
            f"{category} (untrained teacher)" if record.is_untrained_teacher else category,
            *(f"{record.metrics[figure]:.4f}" if figure in record.metrics else "–" for figure in figures),
            f"{threshold.value:.4g} ({threshold.false_alarm_rate:.1%} false alarms)",
            str(folder),
            link,
        )
        documents.append(
            {"category": category, "folder": str(folder), "trial": champion.trial_id, "run": champion.run_id}
            | {"teacher": record.teacher, "metrics": dict(record.metrics)}
            | {"thresholds": [threshold._asdict() for threshold in record.thresholds]}
        )
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    console.print(table)
    console.print(f"inspect images: dskd predict {to / wanted[0]} IMAGES --out verdicts", markup=False)
    if json:
        print(json_format.dumps({"name": name, "detectors": documents}, indent=2))  # noqa: T201


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
