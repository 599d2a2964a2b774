import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from dskd.model.features import FeatureTable
from dskd.training.run import TrainingRun

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nearest() -> Iterator[ModuleType]:
    """As when a benchmark is started: its folder is searched first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("nearest")


@pytest.fixture(scope="module")
def presets(nearest: ModuleType) -> ModuleType:
    return benchmark("presets")


@pytest.fixture(scope="module")
def geometry(nearest: ModuleType) -> ModuleType:
    return benchmark("geometry")


@pytest.fixture
def digits(presets: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As when it is started: the folder of the benchmarks is searched first."""
    monkeypatch.setitem(sys.modules, "presets", presets)
    return benchmark("digits")


@pytest.mark.slow
def test_the_digits_are_written_and_every_method_is_measured_on_each_of_its_classes(
    digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--data", tmp_path / "digits", "--results", tmp_path / "runs.jsonl", "--categories", "0", "8", "--presets",
        "stfpm", "rd4ad", "--seeds", "0", "1", "--image-size", "32", "--epochs", "1", "--batch-size", "64",
        "--teacher-weights", "random", "--cache-gb", "0", "--set", "backbone", "test_resnet", "levels", "[1, 2]",
        "level_weights", "[1, 1]", "score_level_weights", "[1, 1]", "embedding_depth", "1",
    ]  # fmt: skip
    digits.main([str(word) for word in words])
    assert sum(1 for _ in (tmp_path / "digits").rglob("*.png")) == 1797
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(record["category"], record["method"]) for record in records[1:3]] == [("0", "stfpm"), ("0", "rd4ad")]
    assert len(records) == 12 and {record["num_test"] for record in records} == {359}
    assert all(record["figures"][0]["pixel_auroc"] is None for record in records)
    stfpm = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| stfpm | its own map | "))
    cells = [cell.strip() for cell in stfpm.strip("|").split("|")]
    means = [
        mean(record["figures"][0]["image_auroc"] for record in records
             if (record["method"], record["config"]["train"]["seed"]) == ("stfpm", seed))
        for seed in (0, 1)
    ]  # fmt: skip
    assert cells[4] == f"{mean(means):.3f} ± {stdev(means):.3f}" and cells[-1] == "2"


def test_a_killed_benchmark_of_the_presets_continues(
    presets: ModuleType,
    mvtec_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = tmp_path / "runs.jsonl"
    words = [
        "--data", mvtec_root, "--results", results, "--categories", "tile", "--presets", "stfpm", "dskd", "--parts",
        "--image-size", "32", "--steps", "22", "--steps-of", "stfpm", "3", "--batch-size", "4", "--teacher-weights",
        "random", "--cache-dir", tmp_path / "cache", "--set", "backbone", "test_resnet", "levels", "[1, 2]",
        "level_weights", "[1, 1]", "score_level_weights", "[1, 1]", "embedding_depth", "1",
    ]  # fmt: skip
    presets.main([str(word) for word in words])
    table = capsys.readouterr().out
    lines = results.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    memory, *records = records
    assert memory["method"] == "nearest neighbours, 5% kept" and memory["best_step"] is None
    assert [record["method"] for record in records] == ["stfpm", "dskd", *presets.PARTS]
    assert [record["num_steps"] for record in records] == [3, 22, 22, 22, 22]
    for record in [memory, *records]:
        pair = record["method"] in ("dskd", "dskd: embedding detached")
        assert [entry["scored_by"] for entry in record["figures"]] == 2 * (
            list(presets.SCORED_BY) if pair else ["its own map"]
        )
        assert all(0 <= entry[name] <= 1 for entry in record["figures"] for name in presets.FIGURES)
    # The parts of a pair say other things than the pair, or the weights did not reach the scoring.
    assert len({entry["pixel_auroc"] for entry in records[1]["figures"][:3]}) == 3
    assert table.count("| tile | ") == 1 + 1 + 3 + 1 + 1 + 3

    started: list[str] = []
    begin = TrainingRun.begin
    monkeypatch.setattr(TrainingRun, "begin", lambda config, *rest: started.append(config) or begin(config, *rest))  # type: ignore[func-returns-value]
    results.write_text("\n".join([*lines[:-1], lines[-1][:100]]))
    presets.main([str(word) for word in words])
    assert len(started) == 1, "only the run whose line was cut short is repeated"
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["figures"] for record in again] == [record["figures"] for record in (memory, *records)]


def test_a_coreset_always_adds_the_farthest_patch(nearest: ModuleType) -> None:
    patches = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    chosen = nearest.coreset(patches, 12, seed=1)
    assert len(set(chosen.tolist())) == 12
    for count in range(1, 12):
        gaps = torch.cdist(patches, patches[chosen[:count]]).amin(dim=1)
        assert gaps[chosen[count]] == gaps.max()
    assert nearest.coreset(patches, 12, seed=1).tolist() == chosen.tolist()
    wide = torch.randn(40, 300, generator=torch.Generator().manual_seed(2))
    assert len(set(nearest.coreset(wide, 40, seed=0).tolist())) == 40, "no patch twice while others are far"


def test_a_patch_is_as_anomalous_as_it_is_far_from_the_nearest_good_one(nearest: ModuleType) -> None:
    shapes = ((2, 8, 8), (3, 4, 4))
    rows = np.random.default_rng(0).normal(size=(5, 2 * 64 + 3 * 16)).astype(np.float32)
    table = FeatureTable(rows, shapes)
    device = torch.device("cpu")
    whole = nearest.build_memory(table, device, 1.0, seed=0)
    assert whole.shape == (5 * 16, 3), "all levels but the shallowest"
    np.testing.assert_allclose(nearest.score_by_memory(table, whole, (32, 32), device).scores, 0, atol=3e-3)
    changed = rows.copy()
    deepest = changed[2, 128:].reshape(3, 4, 4)
    deepest[:, :3, :3] += 50.0
    seen = nearest.score_by_memory(FeatureTable(changed, shapes), whole, (32, 32), device)
    assert seen.scores.argmax() == 2 and seen.scores[2] > 40 and np.delete(seen.scores, 2).max() < 1
    top, left = np.unravel_index(seen.maps[2].argmax(), (32, 32))
    assert top < 24 and left < 24 and seen.maps.shape == (5, 32, 32)
    inside = np.ones((5, 48, 32), np.bool_)
    inside[:, :40, :30] = False
    part = nearest.score_by_memory(FeatureTable(changed, shapes), whole, (48, 32), device, inside)
    assert part.maps.shape == (5, 48, 32) and not part.maps[~inside].any() and part.maps[2][inside[2]].any()


def test_methods_are_not_compared_on_tiles(presets: ModuleType, tmp_path: Path) -> None:
    options = presets.Options(data=tmp_path, results=tmp_path / "runs.jsonl", set={"tile": "64", "overlap": "32"})
    with pytest.raises(ValueError, match=r"on whole images; tiles are measured by benchmarks/geometry\.py"):
        presets.methods(options)


@pytest.mark.slow
def test_the_benchmark_of_shapes_gives_each_as_much_time_and_continues(
    geometry: ModuleType,
    mvtec_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = tmp_path / "runs.jsonl"
    for path in (mvtec_root / "tile").rglob("*.png"):
        larger = tmp_path / "data" / path.relative_to(mvtec_root)
        larger.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((160, 160), Image.Resampling.NEAREST).save(larger)
    words = [
        "--data", tmp_path / "data", "--results", results, "--categories", "tile", "--side", "32", "--overlap", "0",
        "--seeds", "0", "--tile-epochs", "1", "--clutter-epochs", "1", "--batch-size", "8", "--train-images", "10",
        "--test-images", "3", "--teacher-weights", "random", "--cache-dir", tmp_path / "cache", "--set", "backbone",
        "test_resnet", "levels", "[1, 2]", "level_weights", "[1, 1]", "score_level_weights", "[1, 1]",
        "embedding_depth", "1",
    ]  # fmt: skip
    geometry.main([str(word) for word in words])
    table = capsys.readouterr().out
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["mode"] for record in records] == [
        geometry.TILES, geometry.SQUARE, geometry.LETTERBOX, geometry.WHOLE, geometry.REGION,
    ]  # fmt: skip
    tiles, *others = records[:3]
    assert tiles["epochs"] == 1 and tiles["num_train"] == 8 * 25 and tiles["num_test"] == 6
    assert tiles["seam"] == 0 < tiles["seam_without_tiles"], "a shift by a whole tile gives the same tiles"
    assert all(each["train_seconds"] >= tiles["train_seconds"] and each["num_train"] == 8 for each in others)
    assert all(0 <= value <= 1 for record in records for value in record["figures"].values())
    assert table.count("| tile | ") == 3 and table.count("| flange in clutter | ") == 2

    monkeypatch.setattr(TrainingRun, "begin", lambda *_: pytest.fail("trained a second time"))
    geometry.main([str(word) for word in words])
    again = capsys.readouterr().out
    assert again.split("\n\n")[0] == table.split("\n\n")[0]


def test_figures_against_steps_are_those_of_cut_categories_and_a_killed_benchmark_continues(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)  # as for a script that is started there
    steps = benchmark("steps")
    results = tmp_path / "runs.jsonl"
    words = [
        "--data", mvtec_root, "--results", results, "--categories", "tile", "--images", "6", "12", "--steps", "1", "12",
        "--image-size", "32", "--batch-size", "4", "--teacher-weights", "random", "--cache-dir", tmp_path / "cache",
        "--set", "backbone", "test_resnet", "levels", "[1, 2]", "level_weights", "[1, 1]", "score_level_weights",
        "[1, 1]",
    ]  # fmt: skip
    steps.main([str(word) for word in words])
    table = capsys.readouterr().out
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(record["num_good"], record["num_train"], record["num_steps"]) for record in records] == [
        (6, 5, 1), (6, 5, 12), (12, 10, 1), (12, 10, 12),
    ]  # fmt: skip
    assert {record["num_test"] for record in records} == {8}, "the test split stays whole"
    (row,) = (line for line in table.splitlines() if line.startswith("| tile | stfpm | 6 (5) | "))
    assert f"{records[1]['figures'][0]['image_auroc']:.3f} / " in row.split("|")[5]

    trained: list[object] = []
    begin = TrainingRun.begin
    monkeypatch.setattr(TrainingRun, "begin", lambda config, *rest: trained.append(config) or begin(config, *rest))  # type: ignore[func-returns-value]
    results.write_text("".join(results.read_text().splitlines(keepends=True)[1:]))
    steps.main([str(word) for word in words])
    assert len(trained) == 1, "only the missing run is made"
    with pytest.raises(SystemExit, match="tile has 12 good images, fewer than the 20 of --images"):
        steps.main([str(word) for word in words] + ["--images", "20"])


def test_a_bank_of_candidates_goes_on_and_chooses_by_the_rule_of_the_search(
    nearest: ModuleType, mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    selection, bank = benchmark("selection"), tmp_path / "bank.jsonl"
    words = [
        "--data", mvtec_root, "--results", bank, "--categories", "tile", "--images", "0", "--seeds", "0",
        "--candidates", "2", "--finalists", "1", "--folds", "2", "--steps", "4", "--image-size", "32",
        "--batch-size", "4", "--score-candidates", "4", "--set", "backbone", "test_resnet",
        "--teacher-weights", "random", "--cache-dir", tmp_path / "cache", "--min-gain-errors", "0",
    ]  # fmt: skip
    selection.main([str(word) for word in words])
    first = capsys.readouterr().out
    runs = [json.loads(line) for line in bank.read_text().splitlines()]
    folds = [run["fold"] for run in runs]
    assert folds[:2] == [0, 0] and sorted(folds[2:]) in ([-1, 1], [-1, -1, 1, 1]), (
        "the preset, and a finalist if another"
    )
    assert all(0 <= run["students"][name]["given"]["test"]["aupro"] <= 1 for run in runs for name in run["students"])
    assert "| tile | all |" in first and "| tile | all | d: the first fold's |" in first
    kept = bank.read_text().splitlines()[:-1]
    bank.write_text("\n".join(kept) + '\n{"key": "cut')  # killed in the last
    selection.main([str(word) for word in words])
    assert capsys.readouterr().out == first and len(bank.read_text().splitlines()) == len(runs)
    selection.main([str(word) for word in [*words, "--only-table", "--images", "6"]])
    assert "| tile |" not in capsys.readouterr().out and len(bank.read_text().splitlines()) == len(runs)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_every_part_goes_on_after_a_failure_and_keeps_to_its_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, out = benchmark("gpu"), tmp_path / "gpu.jsonl"
    # Another backend of torch.compile changes nothing here, and its import takes seconds.
    monkeypatch.setattr(torch, "compile", lambda module, backend: module)
    words = ["--smoke", "--device", "cpu", "--out", str(out)]
    assert gpu.main([*words, "--presets", "stfpm"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["part"] for each in found if "took_seconds" in each] == list(gpu.PARTS)
    assert not [each for each in found if "failed" in each]
    needs_gpu = {each["part"] for each in found if each.get("left_out") == "needs a GPU"}
    assert needs_gpu == {"K students at once", "recorded steps", "other ways of a step"}
    checks = [each for each in found if "passed" in each]
    expected = set(list(gpu.PARTS)[:5]) - {"recorded steps"}
    assert {each["part"] for each in checks} >= expected and all(each["passed"] for each in checks)
    together = [each for each in found if each["part"] == "K students at once" and "gain" in each]
    assert {each["method"] for each in together} == {"one after another", "stacked", "grouped"}
    assert all(each["way_apart"] < 1e-3 for each in together)

    def fails(setup: object) -> Iterator[dict[str, object]]:
        yield {"passed": False}
        raise RuntimeError("no memory")

    monkeypatch.setitem(gpu.PARTS, "resume", fails)
    assert gpu.main([*words, "--parts", "resume", "bf16 peak"]) == 1
    failed, after = [json.loads(line) for line in out.read_text().splitlines()][-4:-1:2]
    assert failed["failed"] == "RuntimeError: no memory" and after["tflops"] > 0
    assert gpu.main([*words, "--parts", "bf16 peak", "--budget", "0"]) == 0
    assert json.loads(out.read_text().splitlines()[-1]) == {"part": "bf16 peak", "left_out": "the budget is spent"}


@pytest.mark.cluster
def test_what_a_trial_costs_the_driver_is_told_for_every_window(tmp_path: Path) -> None:
    words = ("--trials", "4", "--window", "2", "--at-once", "2")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scale.py"), *words], cwd=tmp_path, capture_output=True, text=True,
        timeout=300, check=True,
    )  # fmt: skip
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [int(row[0]) for row in rows] == [2, 4]
    assert all(float(row[1]) > 0 and float(row[3]) > 0 for row in rows), "MLflow is a part of it"
    assert "4 trials finished" in done.stdout


@pytest.mark.parametrize("seconds", [600, -600])
@pytest.mark.skipif(
    shutil.which("cc") is None or platform.machine() != "x86_64", reason="needs a C compiler, and this kernel's numbers"
)
def test_a_shifted_clock_shows_another_time_and_leaves_waits_alone(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waits until a time of the wall clock: a semaphore's, as Python waits, and the kernel's, as Ray does."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    faults = importlib.import_module("chaos_faults")
    script = (
        "import ctypes, multiprocessing, threading, time\n"
        "libc, begun = ctypes.CDLL(None, use_errno=True), time.monotonic()\n"
        "class Until(ctypes.Structure): _fields_ = [('seconds', ctypes.c_long), ('nanoseconds', ctypes.c_long)]\n"
        "time.sleep(0.01)\n"
        "threading.Event().wait(0.01)\n"
        "assert not multiprocessing.Semaphore(0).acquire(timeout=0.01)\n"
        "word, until = ctypes.c_int(0), Until(int(time.time()) + 1, 0)\n"
        "assert libc.syscall(202, ctypes.byref(word), 9 | 128 | 256, 0, ctypes.byref(until), None, -1) == -1\n"
        "assert ctypes.get_errno() == 110, 'the time is over'\n"
        "print(time.time(), time.monotonic() - begun)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | faults.shifted_clock(tmp_path, seconds),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    shown, taken = map(float, done.stdout.split())
    assert abs(shown - time.time() - seconds) < 60 and taken < 60


@pytest.mark.cluster
def test_what_a_category_costs_the_driver_is_told_for_its_trials_and_its_champion(tmp_path: Path) -> None:
    words = ("--categories", "2", "--trials", "2", "--window", "1", "--at-once", "2")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scale.py"), *words], cwd=tmp_path, capture_output=True, text=True,
        timeout=500, check=True,
    )  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    head, _, *told = rows
    stages = [("prepared", 2), ("trials", 1), ("trials", 2), ("champions", 1), ("champions", 2), ("reported", 2)]
    assert [(row[0], int(row[1])) for row in told] == stages
    cost_of = {name: [float(row[head.index(name)]) for row in told] for name in head[2:]}
    assert min(cost_of["CPU ms each"]) > 0 and max(cost_of["pictures"]) > 0 and max(cost_of["inputs"]) > 0
    assert max(cost_of["studies"][1:3]) > 0, "in processes of their own"
    assert "2 categories have a champion" in done.stdout
