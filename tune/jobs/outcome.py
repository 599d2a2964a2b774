"""What a search prints at its end: the table of champions, what differs from the presets, how to go on."""

from collections.abc import Callable, Mapping, Sequence

from dskd.checkpoint import RECORD_FILE, DetectorRecord
from dskd.show.times import duration
from tune.jobs.tables import print_command, print_line, print_rows, stderr_console
from tune.settings.plan import SearchPlan
from tune.settings.search import SearchSettings
from tune.settings.space import BACKBONE, describe_changes
from tune.storage.champions import Champion
from tune.storage.files import Storage, StorageError
from tune.storage.shown import shown
from tune.study.categories import CategoryResult, pull_command
from tune.study.progress import TimeShare
from tune.trial.evaluation import TABLE_RATE

_NUM_SUSPECTS = 3
"""Good images that are named at the end; MLflow's note has ten."""
_COLUMNS = (
    "category",
    "trials",
    "validation",
    "gain",
    "image AUROC",
    "pixel AUROC",
    "AUPRO",
    "missed",
    "false alarms",
    "time",
)


def show_outcome(
    results: Sequence[CategoryResult],
    plan: SearchPlan,
    settings: SearchSettings,
    share: TimeShare | None,
    seconds: Mapping[str, float],
    page: str,
    report: str = "",
) -> None:
    """Print the results of all categories on stderr; `seconds` is the time of each in this command.

    `page` says how to see their runs in MLflow; `report` is the address of the search's report, empty without one.
    """
    rows = [_row(result, seconds.get(result.category)) for result in results]
    console = stderr_console()
    print_rows(console, f"Champions of {settings.name}", _COLUMNS, rows)
    if settings.selection == "oracle":
        what = "selection=oracle: selected on the test images, as papers do; these figures are too optimistic"
        print_line(console, what, "bold red")
    else:
        chooses = "image AUROC" if plan.config.data.layout == "classes" else "mean of image AUROC and AUPRO"
        print_line(
            console,
            f"validation: {chooses} on synthetic defects; gain: over the untuned preset, on the folds that did not "
            "choose; all behind it: on test images, once",
        )
    if plan.teacher.is_untrained:
        print_line(console, "untrained teacher: these figures have no meaning for inspection", "bold red")
    for result in results:
        if result.champion and result.earlier_search:
            print_line(console, compared_with_earlier(result))
    for result in results:
        if result.error:
            print_line(console, shown(f"{result.category}: no champion: {result.error}"))
        if result.champion:
            first, *more = describe_champion(result.champion, plan)
            print_line(console, f"{result.category}: {first}")
            for line in [*([result.decision] if result.decision else []), *more]:
                print_line(console, f"  {line}")
            print_line(console, f"  in {plan.addresses.home}/{result.champion.folder}")
    if share is not None:
        print_line(console, share.sentence)
    if report:
        print_line(console, "the report, for a browser:")
        print_command(console, report)
    print_line(console, "pull the champions:")
    print_command(console, pull_command(plan, "all"))
    print_line(console, "compare the runs:")
    print_command(console, page)


def say_outcome(results: Sequence[CategoryResult], plan: SearchPlan, say: Callable[[str, str, str], object]) -> None:
    """The results in lines, each with its category and its champion's trial, for `--log-format json`."""
    for result in results:
        if result.champion is None:
            say(f"no champion: {result.error}", result.category, "")
            continue
        if result.earlier_search:
            say(compared_with_earlier(result), result.category, "")
        for line in [result.decision, *describe_champion(result.champion, plan)]:
            if line:
                say(line, result.category, result.champion.trial_id)


def _row(result: CategoryResult, seconds: float | None) -> tuple[str, ...]:
    """The cells of a category; – for what is not known."""
    metrics = result.champion.metrics if result.champion else {}
    ends = {"pruned": result.num_pruned, "failed": result.num_failed, "interrupted": result.num_interrupted}
    trials = ", ".join([str(result.num_trials), *(f"{count} {end}" for end, count in ends.items() if count)])

    def figure(name: str) -> str:
        return f"{metrics[name]:.4f}" if name in metrics else "–"

    return (
        result.category,
        trials,
        figure("val/objective"),
        _gain(metrics),
        *map(figure, ("test/image_auroc", "test/pixel_auroc", "test/aupro")),
        _share(metrics, "test/num_missed", "test/num_defective"),
        _share(metrics, "test/num_false_alarms", "test/num_good"),
        "–" if seconds is None else duration(seconds),
    )


def _gain(metrics: Mapping[str, float]) -> str:
    """Gain over the untuned preset and its error, on folds that did not choose; – where it was not measured."""
    if "gain/objective" not in metrics:
        return "–"
    return f"{metrics['gain/objective']:+.3f} ± {metrics['gain/error']:.3f}"


_HIGHER_IS_BETTER = {"image AUROC": "test/image_auroc", "pixel AUROC": "test/pixel_auroc", "AUPRO": "test/aupro"}
_LOWER_IS_BETTER = {"missed": "test/num_missed", "false alarms": "test/num_false_alarms"}


def compared_with_earlier(result: CategoryResult) -> str:
    """What got better and what got worse since the champion of the earlier search, on the same test images."""
    assert result.champion is not None
    now, before = result.champion.metrics, result.earlier_figures
    said: dict[str, list[str]] = {"better": [], "worse": []}
    for better, names in (("better", _HIGHER_IS_BETTER), ("worse", _LOWER_IS_BETTER)):
        other = "worse" if better == "better" else "better"
        for label, name in names.items():
            if name in now and name in before and now[name] != before[name]:
                digits = ".4f" if better == "better" else ".0f"
                change = f"{label} {before[name]:{digits}} → {now[name]:{digits}}"
                said[better if now[name] > before[name] else other].append(change)
    parts = [f"{word}: {', '.join(changes)}" for word, changes in said.items() if changes]
    return f"{result.category}, against the champion of {result.earlier_search}: {'; '.join(parts) or 'no change'}"


def _share(metrics: Mapping[str, float], part: str, whole: str) -> str:
    return f"{metrics[part]:.0f} of {metrics[whole]:.0f}" if part in metrics and whole in metrics else "–"


def describe_champion(champion: Champion, plan: SearchPlan) -> list[str]:
    """How its configuration differs from the closest preset, with its threshold; then the images that look worst."""
    try:
        document = Storage(plan.addresses.home).read_json(f"{champion.folder}/{RECORD_FILE}")
    except StorageError as error:  # the search itself has succeeded
        return [str(error)]
    if document is None:
        return ["its record is missing in the storage"]
    record = DetectorRecord.from_document(document)
    changes = describe_changes(record.config, plan.configs)
    if len(plan.teachers) > 1 and f"{BACKBONE} " not in changes:
        changes += f", {BACKBONE} {record.config.model.backbone}"
    limit = record.threshold(TABLE_RATE)
    kind = "expected, not proven" if record.is_approximate else "proven"
    lines = [f"{changes}; threshold {limit.value:.4g} for at most {limit.false_alarm_rate:.1%} false alarms ({kind})"]
    if worst := ", ".join(f"{name} ({times:.1f} × the median)" for name, times in record.suspects(_NUM_SUSPECTS)):
        lines.append(f"good images that look worst (--exclude leaves out those that are bad): {worst}")
    return lines
