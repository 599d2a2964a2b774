"""Faults that a search must outlive, for real: processes and nodes killed, announced to go, and joining."""

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

CHAOS = Path(__file__).resolve().parents[1] / "benchmarks" / "chaos.py"
TINY = ["--teacher-weights", "random", "--image-size", "32", "--batch-size", "4", "--preset", "stfpm"]


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_chaos", CHAOS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Short, for Ray's sockets; and no server of the user's."""
    for name in list(os.environ):
        if name.startswith(("RAY_", "MLFLOW_", "DSKD_", "AWS_")):
            monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as short:
        yield Path(short)


@pytest.mark.cluster
def test_five_kills_cost_a_search_neither_a_trial_nor_its_champion(
    chaos: ModuleType, mvtec_root: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = chaos.Options(
        kills=5, trials=3, epochs=9, workers_per_trial=1, nodes=3, data=mvtec_root, preset="stfpm", longest_pause=3.0
    )
    is_whole = chaos.run(options, folder)
    assert is_whole, capsys.readouterr().out


@pytest.mark.cluster
def test_a_search_outlives_the_last_node_and_uses_those_that_join(
    chaos: ModuleType, mvtec_root: Path, folder: Path
) -> None:
    env = chaos.environment(folder) | {"DSKD_CHECKPOINT_SECONDS": "3600"}
    with chaos.cluster(folder, env, 1, 1) as made:
        words = [
            "--data", str(mvtec_root), "--categories", "tile", "--address", made.address, "--trials", "2",
            "--epochs", "40", "--storage", env["DSKD_STORAGE"], "--json", *TINY,
        ]  # fmt: skip
        search = chaos.Search("shrinks", words, env, folder).start()
        try:
            states = folder / "results" / "shrinks" / "tune"
            chaos.wait_for(lambda: made.find("trial"), "a trial")
            time.sleep(5)
            assert not list(states.rglob("training.pt")), "an hour has not passed"
            made.announce(120)
            chaos.wait_for(lambda: list(states.rglob("training.pt")), "a checkpoint")
            (node,) = made.nodes
            made.kill_node(node)
            time.sleep(5)
            assert not search.has_ended, "a search waits for nodes"
            made.add(1)
            made.add(1)
            chaos.wait_for(
                lambda: {made.node_of(trial) for trial in made.find("trial")} == set(made.nodes), "work for both nodes"
            )
            outcome = search.outcome(300)
        finally:
            search.end()
        found = chaos.account(env, search.name, "tile", 2)
        assert outcome["num_trials"] == 2 and found.doubled == 0 and found.redone <= 2, (outcome, found)
        assert found.statuses["finished"] + found.statuses["pruned"] == 2
