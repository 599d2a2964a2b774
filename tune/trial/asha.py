"""When ASHA stops a trial, and how many epochs a study then computes: the schedule, and its expectation."""

REDUCTION = 3
"""At every rung about one trial of this many goes on."""


_FEWEST_EPOCHS = 3
"""Before that an objective says little: in a real search of *transistor* at 9 epochs all six tuned trials were stopped
after the first one at .25 to .30, where the preset, which ended at .73, had .31."""


def grace_period(epochs: int) -> int:
    """Epochs that every trial gets: the first rung."""
    return max(min(_FEWEST_EPOCHS, epochs), epochs // REDUCTION**2)


def rungs(epochs: int) -> tuple[int, ...]:
    """Epochs after which a trial of `epochs` may be stopped before its last one."""
    found = []
    rung = grace_period(epochs)
    while rung < epochs:
        found.append(rung)
        rung *= REDUCTION
    return tuple(found)


def expected_survivors(trials: float) -> float:
    """How many of `trials` that reach a rung one after the other are expected to pass it.

    The first always passes; a later one passes if it is not below the (1 − 1/REDUCTION) quantile, linearly
    interpolated, of the n before it. Where objectives are exchangeable and uniform, that quantile lies at
    ((n − 1)(1 − 1/REDUCTION) + 1) / (n + 1) in the mean (the i-th of n order statistics is i / (n + 1)).
    A sampler that learns proposes better and better trials, and more of them pass.
    """
    whole = int(trials)
    passed = min(trials, 1.0)
    for before in range(1, whole):
        passed += _share_that_passes(before)
    return passed + (trials - whole) * _share_that_passes(whole) if whole >= 1 else passed


def _share_that_passes(before: int) -> float:
    return 1 - ((before - 1) * (1 - 1 / REDUCTION) + 1) / (before + 1)


def expected_epochs(trials: int, epochs: int) -> float:
    """Epochs over all of a study's trials, the stopped ones counted up to the rung that stopped them.

    Every rung is taken for a draw of its own. Where instead no trial ever overtakes another, later survivors are
    better than the first one, which passed unseen, and more go on: 13 to 20 % more epochs, found by simulation.
    """
    total, running, trained = 0.0, float(trials), 0
    for rung in rungs(epochs):
        total += running * (rung - trained)
        running, trained = expected_survivors(running), rung
    return total + running * (epochs - trained)
