"""What a search prints at its end: the table of champions, what differs from the presets, how to go on."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dskd.checkpoint import RECORD_FILE
from dskd.config import RunConfig
from tune.settings.plan import SearchPlan
from tune.settings.search import SearchSettings
from tune.settings.space import BACKBONE
from tune.storage.champions import Champion
from tune.storage.files import Storage, StorageError
from tune.study.categories import CategoryResult
from tune.study.progress import TimeShare
from tune.tracking.client import tracking_ui_command


def show_outcome(
    results: Sequence[CategoryResult], plan: SearchPlan, settings: SearchSettings, share: TimeShare | None
) -> None:
    """Print the results of all categories on stderr."""
    table = Table(title=f"Champions of {settings.name}")
    for column in (
        "category",
        "trials",
        "pruned",
        "failed",
        "validation",
        "image AUROC",
        "pixel AUROC",
        "AUPRO",
    ):
        table.add_column(column, justify="left" if column == "category" else "right")
    for result in results:
        counts = [str(result.num_trials), str(result.num_pruned), str(result.num_failed)]
        metrics = result.champion.metrics if result.champion else {}
        figures = ("val/objective", "test/image_auroc", "test/pixel_auroc", "test/aupro")
        table.add_row(
            result.category,
            *counts,
            *(f"{metrics[name]:.4f}" if name in metrics else "–" for name in figures),
        )
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 110)
    console.print(table)
    if settings.selection == "oracle":
        console.print(
            "[bold red]selection=oracle: selected on the test images, as papers do; these figures are too optimistic[/]"
        )
    else:
        chooses = "image AUROC" if plan.config.data.layout == "classes" else "mean of image AUROC and AUPRO"
        console.print(f"validation: {chooses} on synthetic defects; AUROC and AUPRO: test images, once")
    if plan.teacher.is_untrained:
        console.print("[bold red]untrained teacher: these figures have no meaning for inspection[/]")
    for result in results:
        if result.error:
            console.print(f"{result.category}: no champion: {result.error}", markup=False)
        if result.champion:
            place = f"{plan.addresses.home}/{result.champion.folder}"
            for line in (f"{result.category}: {changes_of(result.champion, plan)}", f"  in {place}"):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    if share is not None:
        console.print(share.sentence, highlight=False)
    lines = [
        f"pull:    python tune/pull.py all --name {settings.name} --storage {settings.storage} --out detectors",
        f"compare: {tracking_ui_command(plan.addresses.tracking)}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def changes_of(champion: Champion, plan: SearchPlan) -> str:
    """The fields in which a champion's configuration differs from the closest preset of the search, as text."""
    try:
        record = Storage(plan.addresses.home).read_json(f"{champion.folder}/{RECORD_FILE}")
    except StorageError as error:  # the search itself has succeeded
        return str(error)
    if record is None:
        return "its record is missing in the storage"
    found = RunConfig.from_dict(record["config"]).flat()
    named = {BACKBONE} if len(plan.teachers) > 1 else set()
    differences = {
        preset: {name: value for name, value in found.items() if value != base.flat()[name] or name in named}
        for preset, base in plan.configs.items()
    }
    preset = min(differences, key=lambda name: len(differences[name]))
    changed = ", ".join(f"{name} {_short(value)}" for name, value in differences[preset].items())
    return f"{preset} with {changed}" if changed else f"{preset} itself"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
