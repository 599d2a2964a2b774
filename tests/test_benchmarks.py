import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

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
def presets() -> ModuleType:
    return benchmark("presets")


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
    assert [record["method"] for record in records] == ["stfpm", "dskd", *presets.PARTS]
    assert [record["num_steps"] for record in records] == [3, 22, 22, 22, 22]
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
