"""What a category's page in MLflow says at its head: the outcome in a few lines of Markdown."""

from collections.abc import Mapping, Sequence

_FIGURES = {
    "validation objective": "val/objective",
    "test image AUROC": "test/image_auroc",
    "test pixel AUROC": "test/pixel_auroc",
    "test AUPRO": "test/aupro",
}


def category_note(
    *,
    category: str,
    trial_id: str,
    metrics: Mapping[str, float],
    counts: tuple[int, int, int],
    registered: str,
    pull: str,
    remarks: Sequence[str],
) -> str:
    """The outcome of a category that has a winner; `counts` are its trials, those pruned and those failed."""
    num_trials, num_pruned, num_failed = counts
    rows = [f"| {label} | {metrics[name]:.4f} |" for label, name in _FIGURES.items() if name in metrics]
    untested = [] if "test/image_auroc" in metrics else ["There is no usable test split: no test figures."]
    lines = [
        f"**{category}**: best of {num_trials} trials ({num_pruned} pruned, {num_failed} failed) is **{trial_id}**",
        "",
        "| | |",
        "|---|---|",
        *rows,
        f"| registered as | {registered} |",
        "",
        f"    {pull}",
        "",
        *(f"- {remark}" for remark in (*untested, *remarks)),
    ]
    return "\n".join(lines).rstrip() + "\n"
