"""A worker that takes one assignment after the other: each as if it were alone in a fresh process."""

import base64
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from PIL import Image

from dskd.checkpoint import read_record
from dskd.config import AmplificationConfig, DataConfig, LossConfig, ModelConfig, RunConfig, ScoreConfig, TrainConfig
from dskd.device import WorkerRank
from dskd.report.inspected import MAX_PICTURE_BYTES
from tune.storage.champions import Champion, find_inspected
from tune.storage.files import Storage
from tune.trial import member, worker
from tune.trial.assignment import Assignment, Evaluation, Order, Training
from tune.trial.checkpoints import keep_checkpoint, newest_checkpoint, opened
from tune.trial.spec import CHECKPOINT, EPOCH, ERROR, OBJECTIVE, REMARK, TrialSpec

DETERMINED = ("train/", "val/", "rung/", "epoch", "data_sha256")
"""Prefixes of what a report must repeat to the last bit; times and loads are left out."""


def config(**values: Any) -> RunConfig:
    """Small enough for a fraction of a second an epoch."""
    small = RunConfig(
        data=DataConfig(image_size=32, validation_fraction=0.34),
        model=ModelConfig(backbone="test_resnet", levels=(1, 2), embedding_depth=1),
        loss=LossConfig(level_weights=(1.0, 1.0), hkd_weight=1.0),
        score=ScoreConfig(score_level_weights=(1.0, 1.0)),
        train=TrainConfig(epochs=2, batch_size=4),
    )
    return small.with_values(values)


def training(name: str, chosen: RunConfig, data: Path, trials: Path) -> Training:
    spec = TrialSpec(
        config=chosen.to_dict(), data=str(data), category="tile", teacher_weights="random", cache_gb=0.0,
        num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0.0, workers_uri=str(trials), revision="",
    )  # fmt: skip
    return Training(trial_id=name, spec=spec)


class Script:
    """A dispatcher with a list of assignments; `dropped`: trials that it ends after their first report."""

    def __init__(self, assignments: list[Assignment], dropped: tuple[str, ...] = ()) -> None:
        self.assignments, self.dropped = assignments, dropped
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self.over: list[str] = []
        self.ask, self.report = SimpleNamespace(remote=self._ask), SimpleNamespace(remote=self._report)
        self.alive = SimpleNamespace(remote=lambda *_: None)
        self.now = SimpleNamespace(remote=lambda: 5.0)
        self.generations: set[float] = set()
        self.is_stopping = SimpleNamespace(remote=lambda: False)

    def _ask(self, slot: str, generation: float) -> Order:
        leave_marks()
        self.generations.add(generation)
        return Order(self.assignments.pop(0)) if self.assignments else Order(must_leave=True)

    def _report(self, slot: str, generation: float, assignment: Assignment, metrics: Any, *, is_over: bool) -> bool:
        self.generations.add(generation)
        self.reports.setdefault(assignment.trial_id, []).append(dict(metrics))
        if is_over:
            self.over.append(assignment.trial_id)
        return assignment.trial_id not in self.dropped


def leave_marks() -> None:
    """What an assignment might leave behind in its process."""
    torch.manual_seed(123)
    torch.set_default_dtype(torch.float64)
    torch.backends.cudnn.benchmark = True
    torch.set_grad_enabled(False)


def serve(script: Script, checkpoint_seconds: float = 0.0) -> Script:
    """Let a worker of this process take all assignments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get_actor", lambda name: script)
        patch.setattr(ray, "get", lambda answer: answer)
        patch.setattr(member, "node_is_leaving", lambda: False)
        patch.setattr(worker, "CHECKPOINT_SECONDS", checkpoint_seconds)
        try:
            member.serve_alone("dispatcher", "group-1", None, "cpu")
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_grad_enabled(True)
            torch.backends.cudnn.benchmark = False
    return script


def main(how: str, data: Path, trials: Path) -> None:
    """Train trial `last`, alone or after others of every kind; writes its weights' digest and its reports to stdout."""
    amplified = AmplificationConfig(
        amplification=True, amplification_epochs=1, amplification_batch_size=4, memory_size=4
    )
    before = {
        "other students": config(student_decoder=False, hkd_weight=0.0),
        "other size": config(image_size=64, epochs=1),
        "amplified": dataclasses.replace(config(epochs=1), amplification=amplified),
        "diverging": config(learning_rate=1e30),
        "unreadable": config(),
        "pruned": config(epochs=3),
        "same": config(),
    }
    assignments: list[Assignment] = []
    if how == "after":
        for name, chosen in before.items():
            assignments.append(training(name, chosen, data / "none" if name == "unreadable" else data, trials))
    script = Script([*assignments, training("last", config(learning_rate=0.002), data, trials)], dropped=("pruned",))
    serve(script)
    if how == "after":
        assert {ERROR in script.reports[name][-1] for name in ("diverging", "unreadable")} == {True}, script.reports
        assert len(script.reports["pruned"]) == 1 and "pruned" not in script.over
        assert len(script.reports["same"]) == 2
    last = script.reports["last"]
    weights = (Path(last[-1][CHECKPOINT]) / "detector" / "model.safetensors").read_bytes()
    told = [{name: value for name, value in each.items() if name.startswith(DETERMINED)} for each in last]
    sys.stdout.write(json.dumps({"weights": hashlib.sha256(weights).hexdigest(), "reports": told}))


@pytest.mark.slow
def test_a_trial_after_others_of_every_kind_is_the_trial_alone_to_the_last_bit(
    mvtec_root: Path, tmp_path: Path
) -> None:
    """Other students, size and stage I; one diverged, one had no data, one was pruned, one was of its own kind."""
    found = []
    for how in ("alone", "after"):
        words = [sys.executable, __file__, how, str(mvtec_root), str(tmp_path / how)]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1], timeout=240
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    alone, after = found
    assert len(alone["reports"]) == 2 and alone["reports"][-1][OBJECTIVE] > 0
    assert alone == after


def test_a_trial_that_another_worker_began_goes_on_from_its_last_checkpoint(mvtec_root: Path, tmp_path: Path) -> None:
    whole = serve(Script([training("whole", config(), mvtec_root, tmp_path)]))
    assert whole.generations == {5.0}, "by the dispatcher's clock: that of this node may be wrong"
    one = training("one", config(), mvtec_root, tmp_path)
    begun = serve(Script([one], dropped=("one",)))
    assert [each[EPOCH] for each in begun.reports["one"]] == [1]
    ended = serve(Script([one]))
    assert [each[EPOCH] for each in ended.reports["one"]] == [2] and ended.over == ["one"]
    repeated = serve(Script([one]))  # its end was not heard
    assert [each[EPOCH] for each in repeated.reports["one"]] == [2] and repeated.over == ["one"]
    assert repeated.reports["one"][0][CHECKPOINT] == ended.reports["one"][0][CHECKPOINT]
    detectors = [read_record(Path(each[-1][CHECKPOINT]) / "detector") for each in
                 (whole.reports["whole"], ended.reports["one"], repeated.reports["one"])]  # fmt: skip
    assert detectors[0].metrics == detectors[1].metrics == detectors[2].metrics


def test_a_worker_evaluates_on_the_test_images_or_says_why_it_cannot(
    detector_folder: Path, mvtec_root: Path, tmp_path: Path
) -> None:
    record = read_record(detector_folder)
    odd = record.most_anomalous(3)

    def evaluation(name: str, data: Path) -> Evaluation:
        return Evaluation(
            keep_at=str(tmp_path / "search"),
            suspects=odd,
            trial_id=name,
            detector_uri=str(detector_folder),
            data=str(data),
            category="tile",
            cache_gb=0,
            cpus=1,
            threshold=1.0,
        )

    done = serve(Script([evaluation("sound", mvtec_root), evaluation("none", tmp_path)]))
    (figures,), (remark,) = done.reports["sound"], done.reports["none"]
    assert 0 <= figures["test/image_auroc"] <= 1 and REMARK not in figures
    assert remark.keys() == {REMARK} and remark[REMARK].startswith("no test figures: ")
    assert done.over == ["sound", "none"]
    kept = find_inspected(Storage(str(tmp_path / "search")), Champion("tile", "sound", "champions/tile/sound", {}, ""))
    assert kept is not None and kept.threshold == 1.0
    assert [image.file for image in kept.test[:1]] == ["test/good/000.png"] and len(kept.test) == 8
    missed = [image for image in kept.test if image.is_defective and image.score <= kept.threshold]
    assert len(missed) == figures["test/num_missed"]
    assert [(Path(each.file).name, each.score) for each in kept.suspects] == list(odd)
    assert [each.score for each in kept.weakest_defects] == sorted(
        image.score for image in kept.test if image.is_defective
    )
    for each in (*kept.suspects, *kept.weakest_defects, *kept.strongest_good):
        data = base64.b64decode(each.webp)
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (each.width, each.height) == (576, 288)
        assert len(data) <= MAX_PICTURE_BYTES
    thresholds, fpr, pro = zip(*((point.threshold, point.fpr, point.pro) for point in kept.pro), strict=True)
    assert list(thresholds) == sorted(thresholds, reverse=True) and 1.0 in thresholds
    assert list(fpr) == sorted(fpr) and list(pro) == sorted(pro) and pro[-1] > 0.9
    assert not find_inspected(
        Storage(str(tmp_path / "search")), Champion("tile", "none", "champions/tile/none", {}, "")
    )


def test_a_checkpoint_counts_only_when_it_is_complete_and_replaces_the_one_before(tmp_path: Path) -> None:
    trials, folder = str(tmp_path / "trials"), tmp_path / "made"
    folder.mkdir()
    assert newest_checkpoint(trials, "one") == ""
    with opened("") as nothing:
        assert nothing is None
    for epoch in (1, 2):
        (folder / "training.pt").write_text(str(epoch))
        kept = keep_checkpoint(trials, "one", epoch, folder)
        assert newest_checkpoint(trials, "one") == kept
        with opened(kept) as found:
            assert found is not None and (found / "training.pt").read_text() == str(epoch)
    assert [path.parent.name for path in Path(trials).rglob("training.pt")] == ["epoch-000002"]
    Storage(trials).upload(folder, "one/epoch-000003")  # killed before it wrote the index
    assert newest_checkpoint(trials, "one") == kept


def test_checkpoints_of_a_lost_lease_touch_nothing_of_its_successor(tmp_path: Path) -> None:
    trials, folder = str(tmp_path / "trials"), tmp_path / "made"
    folder.mkdir()
    (folder / "training.pt").write_text("state")
    keep_checkpoint(trials, "one", 1, folder)  # of a search before there were generations
    keep_checkpoint(trials, "one", 2, folder, generation=1)
    newer = keep_checkpoint(trials, "one", 3, folder, generation=2)
    late = keep_checkpoint(trials, "one", 9, folder, generation=1)
    assert newest_checkpoint(trials, "one") == newer != late
    assert (Path(newer) / "training.pt").is_file()
    after = keep_checkpoint(trials, "one", 4, folder, generation=2)
    assert newest_checkpoint(trials, "one") == after
    assert [str(path.parent) for path in Path(trials).rglob("training.pt")] == [after], "the others are removed"


class Stopping(Script):
    """A search that is stopped after a trial's second report: as the group waits for its verdict, or right after."""

    def __init__(self, assignment: Assignment, *, is_later: bool, is_heard: bool) -> None:
        """Without `is_heard` no sign of life is answered before the group ends."""
        super().__init__([assignment])
        self._is_later = is_later
        self._is_stopping = threading.Event()
        self._has_saved = threading.Event()
        self.alive = SimpleNamespace(remote=lambda *_: self._is_stopping.wait(0.05) and is_heard)
        self.is_stopping = SimpleNamespace(remote=self._is_stopping.is_set)
        self.saved = SimpleNamespace(remote=lambda slot: self._has_saved.set())

    def stop(self, seconds: float) -> None:
        """Let the group hear of it, and wait at most so long for it to say that all is stored."""
        self._is_stopping.set()
        self._has_saved.wait(seconds)

    def slowed(self, *given: Any) -> Iterator[Any]:
        """The training, which the stop meets in its third interval."""
        for report in worker.train(*given):
            yield report
            if self._is_later and report.metrics[EPOCH] == 2:
                self.stop(1.0)

    def _report(self, slot: str, generation: float, assignment: Assignment, metrics: Any, *, is_over: bool) -> bool:
        super()._report(slot, generation, assignment, metrics, is_over=is_over)
        if not self._is_later and metrics[EPOCH] == 2:
            self.stop(1.0)
        return not self._is_stopping.is_set()


@pytest.mark.parametrize(
    ("seconds", "is_later", "is_heard", "stored"),
    [(3600.0, False, True, [2]), (3600.0, False, False, [2]), (3600.0, True, True, [3]), (0.0, True, True, [2, 3])],
)
def test_a_stop_stores_what_was_reported_last(
    seconds: float, is_later: bool, is_heard: bool, stored: list[int], mvtec_root: Path, tmp_path: Path
) -> None:
    """No checkpoint was due before; `seconds`: from which an interval is too long to wait for its end."""
    assignment = training("one", config(epochs=6), mvtec_root, tmp_path)
    script = Stopping(assignment, is_later=is_later, is_heard=is_heard)
    kept: list[int] = []

    def keep(trials: str, trial_id: str, epoch: int, folder: Path, generation: int) -> str:
        kept.append(epoch)
        return keep_checkpoint(trials, trial_id, epoch, folder, generation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member, "SPARE_SECONDS", seconds)
        patch.setattr(member, "keep_checkpoint", keep)
        patch.setattr(member, "train", script.slowed)
        serve(script, checkpoint_seconds=3600.0)
    assert kept == stored
    newest = newest_checkpoint(str(tmp_path), "one")
    assert newest.endswith(f"epoch-{stored[-1]:06d}") and (Path(newest) / "training.pt").is_file()


class Crew(Script):
    """A dispatcher of a process with two slots."""

    def __init__(self, assignments: list[Assignment], dropped: tuple[str, ...] = ()) -> None:
        super().__init__(assignments, dropped)
        self.failed = SimpleNamespace(remote=lambda slot, text: self.failures.append((slot, text)))
        self.retire = SimpleNamespace(remote=lambda slot: self.retired.add(slot))
        self.failures: list[tuple[str, str]] = []
        self.retired: set[str] = set()

    def _ask(self, slot: str, generation: float) -> Order:
        return Order(self.assignments.pop(0)) if self.assignments else Order(must_leave=True)

    def work(self) -> "Crew":
        """Let one process with two slots take all assignments; returns once both have left."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray, "get_actor", lambda name: self)
            patch.setattr(ray, "get", lambda answer: answer)
            patch.setattr(member, "node_is_leaving", lambda: False)
            patch.setattr(worker, "CHECKPOINT_SECONDS", 0.0)
            member.serve_together("dispatcher", ["group-1.1", "group-1.2"], None, "cpu")
        return self


@pytest.mark.slow
def test_trials_that_share_a_process_end_as_alone(mvtec_root: Path, tmp_path: Path) -> None:
    """One is pruned, one diverges, and each slot takes the next as soon as it is free; nobody leaves before."""
    chosen = {
        "one": config(epochs=3), "diverging": config(learning_rate=1e30), "pruned": config(epochs=3, seed=1),
        "last": config(seed=2, learning_rate=0.002),
    }  # fmt: skip
    told = Crew([training(name, each, mvtec_root, tmp_path) for name, each in chosen.items()], ("pruned",)).work()
    assert {name: [each[EPOCH] for each in reports] for name, reports in told.reports.items()} == {
        "one": [1, 2, 3], "diverging": [1], "pruned": [1], "last": [1, 2],
    }  # fmt: skip
    assert "1e+30 is probably too high" in told.reports["diverging"][0][ERROR]
    assert sorted(told.over) == ["diverging", "last", "one"] and not told.failures
    for name in ("one", "last"):
        alone = serve(Script([training(name, chosen[name], mvtec_root, tmp_path / "alone")]))
        for mine, expected in zip(told.reports[name], alone.reports[name], strict=True):
            assert (mine["train/loss"], mine[OBJECTIVE]) == (expected["train/loss"], expected[OBJECTIVE])
        assert read_record(Path(told.reports[name][-1][CHECKPOINT]) / "detector").config == chosen[name]


def test_a_failure_ends_one_trial_of_a_shared_process_which_then_takes_nothing_more(
    mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one for want of memory: beside others, or in a fresh process, it may suffice."""
    both = threading.Barrier(2)

    def broken(spec: TrialSpec, *given: Any) -> Iterator[Any]:
        for report in worker.train(spec, *given):
            if report.metrics[EPOCH] == 1:
                both.wait(60)
            if report.metrics[EPOCH] == 1 and spec.config["train"]["seed"] == 1:
                raise torch.OutOfMemoryError("GPU full")
            yield report

    monkeypatch.setattr(member, "train", broken)
    assignments = [training(str(seed), config(epochs=3, seed=seed), mvtec_root, tmp_path) for seed in range(3)]
    crew = Crew([*assignments]).work()
    ((slot, text),) = crew.failures
    assert "OutOfMemoryError: GPU full" in text.splitlines()[-1] and slot in crew.retired
    assert [each[EPOCH] for each in crew.reports["0"]] == [1, 2, 3], "the other goes on to its end"
    assert crew.assignments == assignments[2:], "what waits is for a fresh process"


def test_want_of_memory_beside_others_is_no_fault_of_the_trial(
    mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("GPU full")

    monkeypatch.setattr("dskd.training.loop.distillation_loss", full)
    spec = training("one", config(), mvtec_root, tmp_path).spec
    with pytest.raises(torch.OutOfMemoryError):
        list(worker.train(dataclasses.replace(spec, trials_per_gpu=2), WorkerRank(), torch.device("cpu"), None))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
