"""ASHA's schedule: the reports at which it may stop a trial, and the expected number of reports of a study.

A trial reports after each validation, at equal distances, so a report stands for a share of the trial's length.
"""

REDUCTION = 3
"""At each rung about one in this many trials continues."""
_MIN_REPORTS = 3
"""First report whose objective is used: in a real search of *transistor* with 9 epochs all six tuned trials were
stopped after epoch 1 at .25 to .30, where the preset, which ended at .73, had .31."""


def grace_period(reports: int) -> int:
    """Reports that every trial of `reports` is trained for, at least a tenth of them: the first rung."""
    return max(min(_MIN_REPORTS, reports), reports // REDUCTION**2, -(-reports // 10))


def rungs(reports: int) -> tuple[int, ...]:
    """Reports after which a trial of `reports` may be stopped early."""
    found = []
    rung = grace_period(reports)
    while rung < reports:
        found.append(rung)
        rung *= REDUCTION
    return tuple(found)


def expected_survivors(trials: float) -> float:
    """Expected number of `trials` that pass a rung which they reach one after the other.

    The first always passes; a later one passes if it is not below the (1 − 1/REDUCTION) quantile, linearly
    interpolated, of the n before it. If objectives are exchangeable and uniform, the mean of that quantile is
    ((n − 1)(1 − 1/REDUCTION) + 1) / (n + 1) (the i-th of n order statistics has the mean i / (n + 1)).
    With a sampler that learns, trials improve and more of them pass.
    """
    whole = int(trials)
    passed = min(trials, 1.0)
    for before in range(1, whole):
        passed += _share_that_passes(before)
    return passed + (trials - whole) * _share_that_passes(whole) if whole >= 1 else passed


def _share_that_passes(before: int) -> float:
    return 1 - ((before - 1) * (1 - 1 / REDUCTION) + 1) / (before + 1)


def expected_reports(trials: int, reports: int) -> float:
    """Expected reports over all trials of a study; a stopped trial counts up to the rung that stopped it.

    The rungs are treated as independent draws. If instead the order of the trials never changes, later survivors are
    better than the first one, which passed unconditionally, and more continue: 13 to 20 % more reports by simulation.
    """
    total, running, trained = 0.0, float(trials), 0
    for rung in rungs(reports):
        total += running * (rung - trained)
        running, trained = expected_survivors(running), rung
    return total + running * (reports - trained)
