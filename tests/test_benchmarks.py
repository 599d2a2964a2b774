import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dskd.training.run import TrainingRun

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def presets() -> ModuleType:
    return benchmark("presets")


@pytest.fixture(scope="module")
def geometry() -> ModuleType:
    return benchmark("geometry")


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
        "--image-size", "32", "--epochs", "2", "--epochs-of", "stfpm", "1", "--batch-size", "4", "--teacher-weights",
        "random", "--cache-dir", tmp_path / "cache", "--set", "backbone", "test_resnet", "levels", "[1, 2]",
        "level_weights", "[1, 1]", "score_level_weights", "[1, 1]", "embedding_depth", "1",
    ]  # fmt: skip
    presets.main([str(word) for word in words])
    table = capsys.readouterr().out
    lines = results.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["method"] for record in records] == ["stfpm", "dskd", *presets.PARTS]
    assert [record["config"]["train"]["epochs"] for record in records] == [1, 2, 2, 2, 2]
    for record in records:
        pair = record["method"] in ("dskd", "dskd: embedding detached")
        assert [entry["scored_by"] for entry in record["figures"]] == 2 * (
            list(presets.SCORED_BY) if pair else ["its own map"]
        )
        assert all(0 <= entry[name] <= 1 for entry in record["figures"] for name in presets.FIGURES)
    # The parts of a pair say other things than the pair, or the weights did not reach the scoring.
    assert len({entry["pixel_auroc"] for entry in records[1]["figures"][:3]}) == 3
    assert table.count("| tile | ") == 1 + 3 + 1 + 1 + 3

    started: list[str] = []
    begin = TrainingRun.begin
    monkeypatch.setattr(TrainingRun, "begin", lambda config, *rest: started.append(config) or begin(config, *rest))  # type: ignore[func-returns-value]
    results.write_text("\n".join([*lines[:-1], lines[-1][:100]]))
    presets.main([str(word) for word in words])
    assert len(started) == 1, "only the run whose line was cut short is repeated"
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["figures"] for record in again] == [record["figures"] for record in records]


def test_the_benchmark_of_shapes_gives_each_as_much_time_and_continues(
    geometry: ModuleType,
    mvtec_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = tmp_path / "runs.jsonl"
    words = [
        "--data", mvtec_root, "--results", results, "--categories", "tile", "--side", "32", "--overlap", "0",
        "--seeds", "0", "--tile-epochs", "1", "--clutter-epochs", "1", "--batch-size", "4", "--train-images", "10",
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
    assert tiles["epochs"] == 1 and tiles["num_train"] == 8 * 4 and tiles["num_test"] == 6
    assert all(each["train_seconds"] >= tiles["train_seconds"] and each["num_train"] == 8 for each in others)
    assert all(0 <= value <= 1 for record in records for value in record["figures"].values())
    assert table.count("| tile | ") == 3 and table.count("| flange in clutter | ") == 2

    monkeypatch.setattr(TrainingRun, "begin", lambda *_: pytest.fail("trained a second time"))
    geometry.main([str(word) for word in words])
    again = capsys.readouterr().out
    assert again.split("\n\n")[0] == table.split("\n\n")[0]
