"""From a category's finished trials to its champion: finalists are trained without each of the other folds.

A fold is one more training for the worker groups: killed ones go on elsewhere, and a continued search finds the
finished ones in the storage.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from dskd.checkpoint import RECORD_FILE, DetectorRecord
from dskd.config import RunConfig
from dskd.training.evidence import Evidence
from tune.storage.files import Storage, StorageError
from tune.storage.inputs import TrainedOn
from tune.storage.uris import DETECTOR_FOLDER, EVIDENCE_FILE
from tune.study.finalists import (
    FinishedTrial,
    Gain,
    best_untuned,
    choose_finalists,
    explain,
    measure_gains,
    winning,
)
from tune.tracking.events import EpochDone, Event, Status, TrialEnded, TrialStarted
from tune.trial.assignment import Training
from tune.trial.checkpoints import newest_checkpoint
from tune.trial.follower import AssignmentFailedError
from tune.trial.groups import Groups
from tune.trial.spec import EPOCH, ERROR, OBJECTIVE, TrialSpec, fingerprints, tracked_figures

_PRESET_FAILED = "the first fold chose alone: the untuned preset failed on another one"
FINALIST: Final = "finalist"
"""Role of a run that trains a finalist, or the untuned preset, without another fold."""


class Selection(NamedTuple):
    """The detector that becomes champion, and why."""

    trial_id: str
    """Id of the run that trained it."""
    detector: str
    """Address of its folder."""
    config: RunConfig
    """With which it was trained."""
    sentence: str
    folds: tuple[Evidence, ...] = ()
    """What the other folds say of its configuration; empty if the first fold alone chose."""
    gain: Gain | None = None
    """Of the winner, or where the preset stays of the best finalist."""
    is_untuned: bool = False
    """Whether the untuned preset stays."""

    def applied(self, record: DetectorRecord) -> DetectorRecord:
        """The record with thresholds from all folds and the figures of the decision; unchanged if it has them."""
        if not self.folds or record.calibration_folds:
            return record
        own = record.part_thresholds and record.normal_part_scores
        files = [*record.calibration_files, *(name for fold in self.folds for name in fold.files)]
        scores = [*record.normal_scores, *(score for fold in self.folds for score in fold.scores)]
        parts = [*own, *(score for fold in self.folds for score in fold.part_scores)] if own else []
        mean = sum(fold.objective for fold in self.folds) / len(self.folds)
        figures = {"val/first_fold_objective": record.metrics["val/objective"], "val/objective": mean}
        if self.gain is not None:
            figures |= {"gain/objective": 0.0 if self.is_untuned else self.gain.mean, "gain/error": self.gain.error}
        return record.with_normal_scores(files, scores, parts, len(self.folds) + 1).with_metrics(figures)


class FoldTrainings:
    """Trains configurations of one category without one fold each, through the worker groups."""

    def __init__(
        self, spec: TrialSpec, groups: Groups, send: Callable[[Event], object], trained_on: TrainedOn | None = None
    ) -> None:
        """`send` takes the events of these runs; `trained_on`: what the category's trials have read."""
        self._spec, self._groups, self._send, self._trained_on = spec, groups, send, trained_on
        self._storage = Storage(spec.workers_uri)

    def detector_of(self, run_id: str) -> str | None:
        """Address of a finished run's detector; None if it has none yet."""
        newest = newest_checkpoint(self._spec.workers_uri, run_id)
        return f"{newest}/{DETECTOR_FOLDER}" if newest and read_record_of(f"{newest}/{DETECTOR_FOLDER}") else None

    def train(self, run_id: str, config: RunConfig) -> str | None:
        """Train to the end, unless that is done already; returns the detector's address, None if it failed."""
        if (known := self.detector_of(run_id)) is not None:
            return known
        spec, category = self._spec.with_config(config), self._spec.category
        params = config.flat() | spec.tracked_values()
        self._send(TrialStarted(category, run_id, params, role=FINALIST))
        assignment = Training(trial_id=run_id, spec=spec)
        error = ""
        last: dict[str, Any] = {}
        try:
            for metrics in self._groups.follow(assignment):
                last = dict(metrics)
                if self._trained_on is not None:
                    self._trained_on.check(fingerprints(last, config))
                now = int(time.time() * 1000)
                self._send(EpochDone(category, run_id, int(last[EPOCH]), tracked_figures(last), now))
            error = str(last.get(ERROR) or "")
        except AssignmentFailedError as failure:
            error = str(failure)
        self._groups.forget(assignment)
        status: Status = "failed" if error else "finished"
        self._send(TrialEnded(category, run_id, status, error, float(last.get(OBJECTIVE, 0.0))))
        return None if error else self.detector_of(run_id)

    def evidence(self, run_id: str, config: RunConfig) -> Evidence | None:
        """What the fold that `config` leaves out says; None if the training failed."""
        detector = self.train(run_id, config)
        if detector is None:
            return None
        folder = detector.removesuffix(f"/{DETECTOR_FOLDER}")
        document = Storage(folder).read_json(EVIDENCE_FILE)
        if document is None:
            raise StorageError(f"{folder} lacks {EVIDENCE_FILE}; remove it, and the same command trains it again.")
        return Evidence.from_document(document)


def read_record_of(detector: str) -> DetectorRecord | None:
    """The record of a detector folder in the storage; None if there is none."""
    document = Storage(detector).read_json(RECORD_FILE)
    return None if document is None else DetectorRecord.from_document(document)


def select_champion(
    trials: Sequence[FinishedTrial],
    trainings: FoldTrainings,
    configuration: Callable[[Mapping[str, Any]], RunConfig],
    *,
    num_finalists: int,
    min_errors: float,
    common: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Selection:
    """Choose among a category's finished trials, at least one.

    `configuration` gives that of a trial's suggested values; `common` is the trial with the configuration that is best
    over all categories. A finalist is trained as it would be delivered, so that its score parameters, too, were found
    on the first fold alone.
    """
    best = max(trials, key=lambda trial: trial.objective)
    records = {trial.trial_id: read_record_of(trial.detector) for trial in trials}
    num_folds = max(record.num_folds if record else 0 for record in records.values())
    untuned = best_untuned(trials)

    def alone(reason: str) -> Selection:
        return Selection(best.trial_id, best.detector, configuration(best.suggested), reason)

    if num_finalists < 1 or num_folds < 2 or untuned is None:
        return alone(_why_alone(num_finalists, num_folds))
    preset = _fixed(configuration(untuned.suggested))
    finalists: dict[str, FinishedTrial] = {}
    wanted: dict[str, RunConfig] = {}
    for trial in choose_finalists(trials, num_finalists, common):
        record = records[trial.trial_id]
        if record is None:
            say(f"finalist {trial.trial_id} is out: {trial.detector} has no {RECORD_FILE}")
        elif _fixed(record.config) != preset:
            wanted[trial.trial_id], finalists[trial.trial_id] = _fixed(record.config), trial
    say(f"comparing {len(wanted)} finalists with the untuned preset on {num_folds - 1} other folds")
    baseline = f"{untuned.trial_id}-untuned"
    evidence = _on_other_folds(wanted | {baseline: preset}, num_folds, trainings)
    of_preset = evidence.pop(baseline, None)
    for name in wanted.keys() - evidence.keys():
        say(f"finalist {name} is out: it failed on a fold")
    if of_preset is None:
        return alone(_PRESET_FAILED)
    gains = measure_gains(evidence, of_preset)
    winner = winning(gains, min_errors)
    sentence = explain(gains, winner, num_folds, min_errors)
    if winner is not None:
        trial = finalists[winner.trial_id]
        config = configuration(trial.suggested)
        return Selection(trial.trial_id, trial.detector, config, sentence, tuple(evidence[trial.trial_id]), winner)
    own = records[untuned.trial_id]
    if own is not None and _fixed(own.config) == preset:
        run_id, detector = untuned.trial_id, untuned.detector
    else:  # the trial delivers other score parameters
        trained = trainings.train(baseline, preset)
        if trained is None:
            return alone(_PRESET_FAILED)
        run_id, detector = baseline, trained
    best_gain = gains[0] if gains else None
    return Selection(run_id, detector, preset, sentence, tuple(of_preset), best_gain, is_untuned=True)


def _fixed(config: RunConfig) -> RunConfig:
    """The same with its score parameters, without a search for others."""
    return config.with_values({"score_candidates": 0})


def _why_alone(num_finalists: int, num_folds: int) -> str:
    if num_folds < 2:  # then there are no finalists either
        return "one held-out set chose alone: the images are not cut into folds"
    if num_finalists < 1:
        return "the first fold chose alone (--finalists 0)"
    return "the first fold chose alone: no untuned preset finished to compare with"


def _on_other_folds(
    configs: Mapping[str, RunConfig], num_folds: int, trainings: FoldTrainings
) -> dict[str, list[Evidence]]:
    """Evidence of every configuration on all folds but the first, by name; without those that failed on one."""
    # Fold by fold, so that a worker reads the images of each once.
    jobs = [(name, fold) for fold in range(1, num_folds) for name in configs]
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="fold") as pool:
        results = list(
            pool.map(
                lambda job: trainings.evidence(
                    f"{job[0]}-fold-{job[1]}", configs[job[0]].with_values({"fold": job[1]})
                ),
                jobs,
            )
        )
    by_name: dict[str, list[Evidence]] = {}
    failed = set()
    for (name, _), found in zip(jobs, results, strict=True):
        if found is None:
            failed.add(name)
        else:
            by_name.setdefault(name, []).append(found)
    return {name: found for name, found in by_name.items() if name not in failed}
