"""What a champion's figures mean for somebody who decides: a light, a sentence, and why."""

from collections.abc import Mapping
from typing import NamedTuple

from dskd.calibration import images_for
from dskd.report.document import Light, Limit

MAX_RATE = 0.05
"""Highest rate of false alarms that the good images must vouch for."""
MAX_MISSED = 0.1
"""Share of the defective test images that may be missed."""
MAX_FALSE_ALARMS = 0.1
"""Share of the good test images that may be flagged."""
MIN_AUROC = 0.9
"""Image AUROC from which a detector is worth more good images."""

RULE = (
    f"ready: at the threshold it misses at most {MAX_MISSED * 100:.0f} % of the defective test images and flags at "
    f"most {MAX_FALSE_ALARMS * 100:.0f} % of the good ones, and enough good images vouch for at most "
    f"{MAX_RATE * 100:.0f} % of false alarms. Needs more good images: they do not, and it tells defects apart (image "
    f"AUROC {MIN_AUROC:g} or more, or as few mistakes). No: everything else."
)


class Judgement(NamedTuple):
    """A champion in three fields of `CategoryReport`."""

    light: Light
    sentence: str
    reason: str


def judge(
    figures: Mapping[str, float], limit: Limit | None, *, is_untrained: bool = False, error: str = ""
) -> Judgement:
    """Judge a champion's `test/…` figures, counted at `limit`; without a champion `error` says why."""
    if limit is None or error:
        return Judgement("no", "There is no detector.", error or "No trial has finished.")
    promise = f"At no more than {_percent(limit.false_alarm_rate)} false alarms"
    counts = [figures.get(f"test/{name}") for name in ("num_missed", "num_defective", "num_false_alarms", "num_good")]
    if any(count is None for count in counts):
        return Judgement(
            "untested",
            f"{promise}: not tested, there are no labelled test images of both kinds.",
            "Put some defective images beside the good ones, and evaluate it.",
        )
    missed, defective, flagged, good = (int(count or 0) for count in counts)
    sentence = f"{promise}: misses {missed} of {defective} defects, flags {flagged} of {good} good images."
    if is_untrained:
        return Judgement("no", sentence, "The teacher is untrained, so the figures mean nothing.")
    few_mistakes = missed <= MAX_MISSED * defective and flagged <= MAX_FALSE_ALARMS * good
    has_enough = limit.false_alarm_rate <= MAX_RATE
    if few_mistakes and has_enough:
        return Judgement("ready", sentence, "Few mistakes, and enough good images vouch for the threshold.")
    if not has_enough and (few_mistakes or figures.get("test/image_auroc", 0.0) >= MIN_AUROC):
        return Judgement(
            "more images",
            sentence,
            f"Its {limit.num_normals} good images vouch for {_percent(limit.false_alarm_rate)} of false alarms; "
            f"{images_for(MAX_RATE)} vouch for {_percent(MAX_RATE)}, {images_for(0.01)} for 1 %.",
        )
    faults = []
    if missed > MAX_MISSED * defective:
        faults.append(f"misses more than {MAX_MISSED * 100:.0f} % of the defects")
    if flagged > MAX_FALSE_ALARMS * good:
        faults.append(f"flags more than {MAX_FALSE_ALARMS * 100:.0f} % of the good images")
    return Judgement("no", sentence, f"It {' and '.join(faults)}.")


def _percent(rate: float) -> str:
    """A rate with one digit after the point, if that is not 0."""
    return f"{rate:.1%}".replace(".0%", "%").replace("%", " %")
