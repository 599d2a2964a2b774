"""What a search prints at its end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dskd.checkpoint import RECORD_FILE
from dskd.config import RunConfig
from tune.jobs.outcome import compared_with_earlier, describe_champion, show_outcome
from tune.storage.champions import Champion
from tune.study.categories import CategoryResult

METRICS = {
    "val/objective": 0.9132,
    "gain/objective": 0.0234,
    "gain/error": 0.0091,
    "test/image_auroc": 0.75,
    "test/num_good": 12.0,
    "test/num_false_alarms": 1.0,
    "test/num_defective": 16.0,
    "test/num_missed": 3.0,
}


@pytest.fixture
def champion(tmp_path: Path, detector_folder: Path) -> Champion:
    folder = tmp_path / "champions/tile/a"
    folder.mkdir(parents=True)
    (folder / RECORD_FILE).write_text((detector_folder / RECORD_FILE).read_text())
    return Champion("tile", "a", "champions/tile/a", METRICS, "")


def plan_of(home: Path, base: RunConfig) -> Any:
    return SimpleNamespace(
        config=base,
        configs={"dskd": base},
        teacher=SimpleNamespace(is_untrained=False),
        teachers={base.model.backbone: base},
        addresses=SimpleNamespace(home=str(home), tracking="http://mlflow:5000", storage=str(home.parent)),
        name="parts",
    )


def test_the_table_has_what_a_user_decides_by(
    champion: Champion, tmp_path: Path, tiny: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [
        CategoryResult("tile", 6, 2, 1, champion, "", 1, "tuning gained"),
        CategoryResult("wood", 2, 0, 2, None, "ValueError: too hot"),
    ]
    settings = cast(Any, SimpleNamespace(name="parts", storage="results", selection="val"))
    show_outcome(results, plan_of(tmp_path, tiny), settings, None, {"tile": 90.0}, "open http://mlflow/#/experiments/1")
    lines = capsys.readouterr().err.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]
    assert rows == [
        ["tile", "6, 2 pruned, 1 failed, 1 interrupted", "0.9132", "+0.023 ± 0.009", "0.7500", "–", "–", "3 of 16",
         "1 of 12", "2 min"],
        ["wood", "2, 2 failed", *("–",) * 8],
    ]  # fmt: skip
    assert "  tuning gained" in lines
    assert "wood: no champion: ValueError: too hot" in lines


def test_a_champion_is_told_by_its_changes_and_its_threshold(
    champion: Champion, tmp_path: Path, tiny: RunConfig
) -> None:
    document = json.loads((tmp_path / "champions/tile/a" / RECORD_FILE).read_text())
    limit = document["thresholds"][-1]
    found, worst = describe_champion(champion, plan_of(tmp_path, RunConfig.from_dict(document["config"])))
    assert worst.startswith("good images that look worst") and "1.0 × the median" in worst
    assert found == (
        f"dskd untuned; threshold {limit['value']:.4g} for at most {limit['false_alarm_rate']:.1%} false alarms "
        "(proven)"
    )
    other = RunConfig.from_dict(document["config"]).with_values({"learning_rate": 0.5})
    assert describe_champion(champion, plan_of(tmp_path, other))[0].startswith("dskd with learning_rate 0.00")


def test_what_got_better_and_worse_since_the_earlier_search(champion: Champion) -> None:
    before = METRICS | {"test/image_auroc": 0.7, "test/num_missed": 5.0, "test/num_false_alarms": 0.0}
    result = CategoryResult("tile", 6, champion=champion, earlier_search="parts", earlier_figures=before)
    assert compared_with_earlier(result) == (
        "tile, against the champion of parts: better: image AUROC 0.7000 → 0.7500, missed 5 → 3; worse: false alarms "
        "0 → 1"
    )
    same = result._replace(earlier_figures=METRICS)
    assert compared_with_earlier(same) == "tile, against the champion of parts: no change"
