"""What a search would find wrong before its first worker, in full and without a trace."""

import dataclasses
import json
import shutil
import socket
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dskd.model import teacher
from tune import search
from tune.preflight import dry_run
from tune.preflight.checks import check_inputs, read_categories
from tune.preflight.draft import drafted
from tune.preflight.room import Cluster, PreflightError, check_cluster, wait_for_room
from tune.runtime.cluster import count_trials, resolve_gpus
from tune.runtime.ray_internals import cpus_of_this_machine
from tune.settings.plan import SearchPlan, plan_search, resolve_addresses
from tune.settings.search import SearchSettings
from tune.settings.workers import Workers


@pytest.fixture
def data(mvtec_root: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "data"
    shutil.copytree(mvtec_root, copy)
    return copy


def settings(data: Path, storage: Path, **changes: Any) -> SearchSettings:
    values: dict[str, Any] = {
        "trials": 2, "epochs": 3, "image_size": 32, "batch_size": 4, "teacher_weights": "random",
    }  # fmt: skip
    return SearchSettings(data=str(data), storage=str(storage), **(values | changes))


def plan_of(asked: SearchSettings) -> SearchPlan:
    return plan_search(asked, resolve_addresses(asked), Path(asked.data))


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_every_bad_category_and_file_is_named(data: Path, tmp_path: Path) -> None:
    images = sorted((data / "tile" / "train" / "good").iterdir())
    for image in images[:5]:
        image.write_bytes(image.read_bytes()[:200])
    shutil.rmtree(data / "wood" / "train")
    (data / "wood" / "train" / "good").mkdir(parents=True)
    with pytest.raises(PreflightError) as raised:
        read_categories(plan_of(settings(data, tmp_path / "results")), data)
    lines = str(raised.value).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("wood: ") and "holds 0 images" in lines[0]
    assert [str(image) in line for image, line in zip(images, lines[1:4], strict=False)] == [True] * 3
    assert lines[4].startswith("tile: 2 more images cannot be read")


def test_faults_of_test_masks_stop_only_a_search_that_selects_by_them(data: Path, tmp_path: Path) -> None:
    (data / "tile" / "test" / "scratch" / "000.png").unlink()
    honest = plan_of(settings(data, tmp_path / "results"))
    assert set(read_categories(honest, data)) == {"tile", "wood"}
    with pytest.raises(PreflightError, match=r"tile: .*mask.* has no image"):
        read_categories(dataclasses.replace(honest, selection="oracle"), data)


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_made(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "wood" / "train" / "good" / "000.png").write_bytes(b"")
    (tmp_path / "file").write_text("no folder")
    before = tree(tmp_path)
    monkeypatch.setattr(dry_run, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nothing listens
        port = taken.getsockname()[1]
        flags = {
            "--data": data, "--storage": tmp_path / "file" / "results", "--tracking-uri": f"http://127.0.0.1:{port}",
            "--study-storage": f"postgresql://user:secret@127.0.0.1:{port}/x", "--teacher-weights": "/none.pth",
            "--image-size": 32, "--cpus-per-worker": 1000,
        }  # fmt: skip
        words = [str(word) for pair in flags.items() for word in pair]
        monkeypatch.setattr(sys, "argv", ["search.py", *words, "--dry-run"])
        with pytest.raises(SystemExit) as end:
            search.main()
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert end.value.code == 2 and said.out == ""
    assert all(line.startswith("search: error: ") for line in lines), said.err
    for expected in ("wood: ", "--storage", "MLflow at", "--study-storage", "/none.pth", "1000 CPUs"):
        assert sum(expected in line for line in lines) == 1, (expected, said.err)
    assert len(lines) == 6 and "secret" not in said.err
    assert tree(tmp_path) == before


def test_a_dry_run_prints_plan_and_forecast_and_leaves_no_trace(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (data / "tile" / "train" / "good" / "notes.txt").write_text("no image")
    before = tree(tmp_path)
    assert dry_run.dry_run(settings(data, tmp_path / "a" / "results", json=True)) == 0
    assert tree(tmp_path) == before
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert [each["category"] for each in document["categories"]] == ["tile", "wood"]
    assert (
        document["config"]["data"]["image_size"] == 32 and document["varied"]["tile"]["level_fusion"] == "sum | product"
    )
    found = document["forecast"]
    assert 0 < found["wall_seconds_pruned"] <= found["wall_seconds_full"] and found["steps_full"] == 24
    assert [each["num_steps"] for each in document["categories"]] == [6, 6], "3 epochs of 2 full batches"
    assert "2 categories × 2 trials × 3 epochs" in said.err and "untrained teacher" in said.err
    assert "not read: " in said.err and "1 .txt" in said.err
    assert str(tmp_path / "a" / "results" / "search") in said.err and "forecast:" in said.err


@pytest.mark.slow
def test_a_dry_run_counts_the_steps_on_tiles_and_the_trials_that_share_a_worker(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dry_run.dry_run(settings(data, tmp_path / "results", json=True, tile=32, overlap=0, trials_per_gpu=2)) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    for each in document["categories"]:  # 4 tiles of an image of 64 pixels, and 4 of them in a batch
        assert each["num_steps"] == 3 * each["num_train"]
    assert document["forecast"]["steps_full"] == 2 * sum(each["num_steps"] for each in document["categories"])
    assert "tiles of 32 pixels" in said.err
    assert document["trials_per_gpu"] == 2 and "2 trials share 1 × (1 CPUs, " in said.err
    assert document["slots"]["concurrency"] == int(cpus_of_this_machine()), "two of each CPU, half for each category"
    assert "s for 2 trials at once, " in said.err


@pytest.mark.slow
def test_a_dry_run_measures_and_forecasts_each_teacher_that_a_trial_may_have(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.toml").write_text('[category.wood]\nbackbone = ["test_resnet", "test_convnext"]\n')
    asked = settings(
        data, tmp_path / "a", json=True, space=tmp_path / "space.toml", image_size=64, preset="rd4ad", levels=(1, 2),
        backbone="test_resnet",
    )  # fmt: skip
    before = tree(tmp_path)
    assert dry_run.dry_run(asked) == 0
    assert tree(tmp_path) == before
    said = capsys.readouterr()
    document = json.loads(said.out)
    resnet, convnext = document["teachers"]
    assert (resnet["backbone"], convnext["backbone"]) == ("test_resnet", "test_convnext")
    assert resnet["levels"] == convnext["levels"] == [1, 2]
    # 64 pixels: each of 2 categories reads 10 + 2 images, and sees 44 with the synthetic ones
    # five times, since the finalists are trained without each of five folds
    pixels, seen = (
        5 * 2 * 12 * 3 * 64**2,
        5 * sum(each["num_train"] + each["num_validation"] for each in document["categories"]),
    )
    for each in (resnet, convnext):
        assert each["forecast"]["wall_seconds_full"] > 0
        assert each["cache_bytes"] == pixels + seen * each["speed"]["feature_bytes"] and each["speed"]["feature_bytes"]
    slowest = max(document["teachers"], key=lambda each: each["forecast"]["wall_seconds_full"])
    assert document["forecast"] == slowest["forecast"]
    assert document["varied"]["wood"]["backbone"] == "test_resnet | test_convnext"
    assert "backbone" not in document["varied"]["tile"]
    assert said.err.count("forecast:") == said.err.count("measured:") == 2 and "if all trials had test_conv" in said.err
    assert "cache:" in said.err


def test_each_teacher_is_loaded_before_the_first_trial(data: Path, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text('backbone = ["test_resnet", "resnet0", "resnet00"]\n')
    asked = settings(data, tmp_path / "results", space=tmp_path / "space.toml", trials=3, levels=(1, 2))
    with drafted(asked) as draft:
        errors = check_inputs(draft).errors
    assert len(errors) == 2 and "'resnet0'" in errors[0] and "'resnet00'" in errors[1]


def test_a_teacher_that_takes_squares_only_is_found_before_the_first_trial(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert images.shape[-2] == images.shape[-1], "Input width doesn't match model."
            return (images,)

    monkeypatch.setattr(teacher, "build_teacher", lambda *_: teacher.Teacher(Fixed()))
    for resize, expected in (("letterbox", []), ("64x32", ["takes no images of 64 x 32 pixels"])):
        with drafted(settings(data, tmp_path / "results", resize=resize)) as draft:
            errors = check_inputs(draft).errors
        assert len(errors) == len(expected) and all(text in error for text, error in zip(expected, errors, strict=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trials": 1}, "--trials 1 cannot hold the 2 presets and backbones untuned"),
        ({"sampler": "cmaes"}, "--sampler cmaes cannot search several backbones"),
        ({"teacher_weights": "lite0", "levels": None}, "lite0 are the weights of backbone tf_efficientnet_lite0"),
    ],
)
def test_several_teachers_ask_for_what_they_need(
    changes: dict[str, Any], expected: str, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "space.toml").write_text('backbone = ["test_resnet", "test_convnext"]\n')
    values: dict[str, Any] = {"space": tmp_path / "space.toml", "levels": (1, 2)}
    with pytest.raises(ValueError, match=expected):
        plan_of(settings(data, tmp_path, **values | changes))


def test_an_existing_study_file_that_is_none_is_a_fault(data: Path, tmp_path: Path) -> None:
    (tmp_path / "optuna.db").write_text("this is no database, whatever its name says" * 50)
    with drafted(settings(data, tmp_path)) as draft:
        (fault,) = check_inputs(draft, leave_no_trace=True).errors
    assert "--study-storage" in fault and "not a database" in fault


@pytest.mark.parametrize(
    ("flags", "nodes", "expected"),
    [
        ({}, [{"CPU": 2.0}], None),
        ({"gpus_per_worker": 4.0}, [{"CPU": 8.0, "GPU": 2.0}], "asks for 4 GPUs (1 workers), the cluster has 2"),
        ({"workers_per_trial": 3}, [{"CPU": 2.0}], "3 CPUs (3 workers), the cluster has 2"),
        ({"cpus_per_worker": 8.0}, [{"CPU": 4.0}] * 3, "8 CPUs on one node, the largest has 4 CPUs and 0 GPUs"),
        ({"workers_per_trial": 3, "cpus_per_worker": 3.0}, [{"CPU": 4.0}] * 2 + [{"CPU": 2.0}], "2 of a trial's 3 wor"),
        ({"gpus_per_worker": 1.0, "cpus_per_worker": 8.0}, [{"CPU": 16.0}, {"GPU": 1.0}], "8 CPUs and 1 GPUs on one"),
        ({"gpus_per_worker": 4.0, "max_concurrent": 1}, [{"CPU": 1.0}], None),
    ],
)  # fmt: skip
def test_a_trial_must_find_its_place(
    flags: Mapping[str, Any], nodes: list[dict[str, float]], expected: str | None, mvtec_root: Path
) -> None:
    plan = plan_of(settings(mvtec_root, mvtec_root, **flags))
    if expected is None:
        check_cluster(plan, nodes)
        return
    with pytest.raises(PreflightError) as raised:
        check_cluster(plan, nodes)
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_slots_count_whole_workers_on_whole_nodes() -> None:
    nodes = [{"CPU": 7.0, "GPU": 2.0}, {"CPU": 3.0}]
    assert count_trials(nodes, Workers(1, cpus=2.0, gpus=0.0)) == 4
    assert count_trials(nodes, Workers(1, cpus=2.0, gpus=resolve_gpus(None, nodes))) == 2, "one GPU each"
    assert count_trials(nodes, Workers(2, cpus=1.0, gpus=0.5)) == 2
    assert count_trials(nodes, Workers(1, cpus=1.0, gpus=0.5, trials=3)) == 12, "three share a worker"
    assert count_trials([], Workers(1, cpus=1.0, gpus=0.0)) == 1, "a cluster may grow once something waits"
    assert resolve_gpus(0.5, nodes) == 0.5 and resolve_gpus(None, [{"CPU": 3.0}]) == 0.0


class Growing:
    """A cluster whose nodes come at given seconds, and whose time passes while one waits."""

    def __init__(self, nodes: Mapping[float, list[dict[str, float]]], can_help: Mapping[float, bool | None]) -> None:
        self._nodes, self._can_help, self._now = nodes, can_help, 0.0
        self.asked = Cluster(self.nodes, self.can_help, lambda: self._now, self.sleep)

    def sleep(self, seconds: float) -> None:
        self._now += seconds
        assert self._now < 4000, "it waits for ever"

    def nodes(self) -> list[dict[str, float]]:
        return self._nodes[max(begin for begin in self._nodes if begin <= self._now)]

    def can_help(self) -> bool | None:
        return self._can_help[max(begin for begin in self._can_help if begin <= self._now)]


ONE, TWO = [{"CPU": 1.0}], [{"CPU": 1.0}] * 2


@pytest.mark.parametrize(
    ("nodes", "can_help", "ends_after"),
    [
        ({0: TWO}, {0: None}, 0),  # there is room
        ({0: ONE}, {0: None}, -600),  # no autoscaler: nothing will ever come
        ({0: []}, {0: False}, -600),  # beyond the limits of the autoscaler
        ({0: ONE, 300: TWO}, {0: None}, 300),  # somebody joins a node by hand
        ({0: [], 500: ONE, 1000: TWO}, {0: None}, 1000),  # a node that came is hope
        ({0: ONE, 2000: TWO}, {0: True}, 2000),  # spot nodes that take their time
        ({0: ONE}, {0: True, 1000: False}, -1599),  # somebody lowers the limits
    ],
)
def test_a_demand_that_no_node_will_meet_ends_and_others_wait(
    nodes: Mapping[float, list[dict[str, float]]], can_help: Mapping[float, bool | None], ends_after: float
) -> None:
    cluster, said = Growing(nodes, can_help), list[str]()
    workers = Workers(2, cpus=1.0, gpus=0.0)
    if ends_after < 0:
        with pytest.raises(
            PreflightError, match=r"a trial asks for 2 CPUs .*no node came within 600 s; lower"
        ) as raised:
            wait_for_room(workers, 600.0, said.append, cluster.asked)
        assert "\n" not in str(raised.value)
    else:
        wait_for_room(workers, 600.0, said.append, cluster.asked)
    assert cluster.asked.clock() == abs(ends_after)
    lines = [line for line in said if "waiting for the cluster to grow" in line]
    assert len(lines) == (abs(ends_after) + 29) // 30, "at once, then every 30 s"
    assert all("asks for 2 CPUs (2 workers), the cluster has" in line for line in lines)
    assert len(said) == len(lines) + (ends_after > 0)
