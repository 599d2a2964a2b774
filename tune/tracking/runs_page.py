"""The page of a search in MLflow: a saved view of its runs, and the link that opens it.

MLflow opens an experiment with neither the columns nor the order that answer anything, and a browser that was never
there on another page than the runs. A view saved as a tag of the experiment, named in the link, holds in every browser.
"""

import base64
import json
import time
import zlib
from typing import Any

from tune.storage.shown import command, shown_url

_VIEW = "dskd"
VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"
NOTE = "mlflow.note.content"
"""Tag of a run or an experiment that MLflow shows as its description, in Markdown."""
CHANGES = "dskd.changes"
"""Tag of a run: what it changes about its preset; of a champion, what its detector does."""
ROLE, STATUS = "dskd.role", "dskd.status"
ERROR = "dskd.error"
CHAMPION_ROLE = "champion"
STAR = " ★"
"""Behind the name of a champion's run."""

_LONGEST_CHANGES = 60
"""Characters of a run's name that say what it changes."""

_COLUMNS = (
    f"tags.`{ROLE}`",
    f"tags.`{STATUS}`",
    "metrics.`val/best_objective`",
    "metrics.`gain/objective`",
    "metrics.`test/image_auroc`",
    "metrics.`test/pixel_auroc`",
    "metrics.`test/aupro`",
    "metrics.`test/num_missed`",
    "metrics.`test/num_false_alarms`",
    "metrics.`threshold/value`",
    "metrics.`threshold/expected_rate`",
    "metrics.`threshold/guaranteed_rate`",
    "params.`preset`",
    "params.`delivered.level_fusion`",
    "params.`delivered.student_fusion`",
    "params.`delivered.score_level_weights`",
    "params.`delivered.blur_sigma`",
    "params.`delivered.score_top_fraction`",
    f"tags.`{CHANGES}`",
)
_WIDTHS = {f"tags.`{CHANGES}`": 420}


def view_tag(now: float | None = None) -> str:
    """The value of `VIEW_TAG`: runs grouped by category, the best validation first, with the columns that matter."""
    state = _state()
    text = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    at = int(1000 * (time.time() if now is None else now))
    return json.dumps({"name": "Search", "createdAt": at, "updatedAt": at, "state": f"deflate;{text}"})


def _state() -> dict[str, Any]:
    """What MLflow 3's page keeps of itself: which runs, in what order, with which columns."""
    return {
        "searchFilter": "",
        "orderByKey": "metrics.`val/best_objective`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(_COLUMNS),
        "columnOrder": [],
        "columnWidths": _WIDTHS,
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "FIRST_20_RUNS",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": False,
        "hideEmptyCharts": True,
        "groupBy": {"aggregateFunction": "max", "groupByKeys": [{"mode": "tag", "groupByData": "dskd.category"}]},
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
    }


def page_of(experiment_id: str) -> str:
    """The page of a search's runs, below a server's address."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={_VIEW}&workflowType=machine_learning"


def how_to_open(uri: str, experiment_id: str) -> str:
    """A link to the page; where no server answers at `uri`, the command that starts one before it."""
    page = page_of(experiment_id)
    if uri.startswith(("http://", "https://")):
        return f"{shown_url(uri).rstrip('/')}/{page}"
    start = command(["mlflow", "ui", "--backend-store-uri", shown_url(uri)])
    return f"{start}   # then open http://127.0.0.1:5000/{page}"


def experiment_note(name: str, data: str, selection: str, *, is_untrained: bool) -> str:
    """Markdown on a search's experiment: what is in it, and how to read it."""
    caveats = ["The teacher is untrained: these figures have no meaning."] if is_untrained else []
    if selection == "oracle":
        caveats.append("Selected on the test images, as papers do: test figures are too optimistic.")
    lines = [
        *(line for caveat in caveats for line in (f"> **{caveat}**", "")),
        f"Search *{name}* over {shown_url(data)}. Each category has a parent run with its note and pictures; below it "
        f"are its trials (`{ROLE}` says what a run is there for, `{CHANGES}` what it changes about its preset). The "
        f"champion's name ends with{STAR}; what its detector holds are the parameters `delivered.…`, and only it has "
        "`test/` figures.",
    ]
    return "\n".join(lines) + "\n"


def run_name(category: str, trial_id: str, number: int, tried: str) -> str:
    """A name that a person can say: the category, the trial's number and what it tries; else its id.

    >>> run_name("flange", "a1b2", 2, "rd4ad with hkd_weight 1")
    'flange 02 · hkd_weight 1'
    """
    if not number:
        return f"{category}-{trial_id}"
    changes = tried.partition(" with ")[2] or tried
    if len(changes) > _LONGEST_CHANGES:
        changes = f"{changes[:_LONGEST_CHANGES].rstrip(' ,')} …"
    return f"{category} {number:02d}{' · ' if changes else ''}{changes}"
