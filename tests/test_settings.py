import dataclasses
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dskd.config import RunConfig
from dskd.presets import PRESETS
from tune import pull, search
from tune.settings.demo import DemoSettings
from tune.settings.plan import SearchPlan, plan_search, resolve_addresses, resolve_studies
from tune.settings.score import ScoringSettings
from tune.settings.search import FIXED, SearchSettings
from tune.settings.space import SHARED
from tune.settings.train import TrainingSettings
from tune.storage.uris import LOCAL_RESULTS


def settings(**values: Any) -> SearchSettings:
    return SearchSettings(**{"data": "data", **values})


def plan_of(asked: SearchSettings) -> SearchPlan:
    return plan_search(asked, resolve_addresses(asked), Path(asked.data))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": 0}, "--trials must be at least 1 and at most 100,000, got 0"),
        ({"workers_per_trial": 0}, "--workers-per-trial must be at least 1"),
        ({"max_concurrent": 0}, "--max-concurrent must be at least 1"),
        ({"cpus_per_worker": 0.0}, "--cpus-per-worker must be above 0 and at most"),
        ({"gpus_per_worker": -1.0}, "--gpus-per-worker must be at least 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"patience": -1}, "patience must not be negative"),
        ({"steps": 10, "epochs": 10}, "--steps and --epochs exclude each other"),
        ({"image_size": 100}, "image_size must be a positive multiple of 32"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"preset": "dskd,stpfm"}, "--preset takes dskd, stfpm, rd4ad, aand or all, got 'stpfm'"),
        ({"preset": ","}, "--preset takes .*, got ','"),
        ({"preset": "all", "trials": 3}, "--trials 3 cannot hold the 4 presets untuned"),
        ({"preset": "dskd,aand", "sampler": "gp"}, "--sampler gp cannot search several presets"),
        ({"start_from": "a,try", "name": "try"}, "--start-from names this search itself, 'try'"),
        ({"time_budget": "2 hours"}, "--time-budget must be a time such as 2h, 1h30m or 90s, .*got '2 hours'"),
        ({"time_budget": "0m"}, "--time-budget must be a time"),
        ({"time_budget": ""}, "--time-budget must be a time"),
        ({"workers_per_trial": 2, "min_workers_per_trial": 2}, "--min-workers-per-trial must be at least 1 and below"),
        ({"workers_per_trial": 2, "min_workers_per_trial": 0}, "--min-workers-per-trial must be at least 1"),
        ({"study_storage": "postgres://p/o"}, "--study-storage begins with postgres://.*; write postgresql://"),
        ({"tracking_uri": "postgres://p/o"}, "--tracking-uri begins with postgres://.*; write postgresql://"),
        ({"trials_per_gpu": 0}, "--trials-per-gpu must be at least 1 and at most 64, got 0"),
        ({"trials_per_gpu": 2, "workers_per_trial": 3}, "--trials-per-gpu 2 lets trials share .*--workers-per-trial 3"),
        ({"name": ""}, "--name"),
        ({"name": "a/b"}, "--name"),
        ({"name": "a\\b"}, "--name"),
        ({"name": "a b"}, "--name"),
        ({"name": ".."}, "--name"),
        ({"name": ".hidden"}, "--name"),
    ],
)
def test_bad_values_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        settings(**values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"tracking_uri": "http://m"},
        {"study_storage": "postgresql://p"},
        {"tracking_uri": "http://m", "study_storage": ""},
    ],
)
def test_remote_storage_needs_a_tracking_server_and_a_study_storage(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="--storage s3://b/p give --tracking-uri and --study-storage too"):
        settings(storage="s3://b/p", **given)


def test_remote_addresses_are_taken_as_they_are() -> None:
    asked = settings(storage="s3://b/p/", tracking_uri="http://m", study_storage="postgresql://p", name="spring")
    found = resolve_addresses(asked)
    assert found.storage == "s3://b/p" and found.home == "s3://b/p/spring" and found.is_remote
    assert resolve_studies(asked, found) == "postgresql+psycopg2://p"
    assert (found.tracking, found.artifacts) == ("http://m", None)


def test_by_default_everything_lies_in_one_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = resolve_addresses(settings())
    root = f"{tmp_path}/{LOCAL_RESULTS}"
    assert found.storage == root and found.home == f"{root}/search"
    assert found.tracking == f"sqlite:///{root}/mlflow.db"
    assert resolve_studies(settings(), found) == f"sqlite:///{root}/optuna.db"
    assert found.artifacts == f"file://{root}/mlflow-artifacts"
    assert settings().address is None


def test_the_environment_fills_in_what_is_not_given_and_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    monkeypatch.setenv("DSKD_STUDY_STORAGE", "postgresql://env")
    found = settings(storage="s3://b/p")
    assert settings(tracking_uri="http://flag").tracking_uri == "http://flag"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://changed")
    assert (found.tracking_uri, found.study_storage) == ("http://env", "postgresql+psycopg2://env")
    revived = pickle.loads(pickle.dumps(found))
    assert (revived.tracking_uri, revived.study_storage) == ("http://env", "postgresql+psycopg2://env")


def test_a_study_password_does_not_show_in_a_printed_setting_or_plan(mvtec_root: Path) -> None:
    asked = settings(data=str(mvtec_root), study_storage="postgresql://user:secret@host/db")
    assert "secret" not in repr(asked) and "secret" in plan_of(asked).studies
    assert "secret" not in repr(plan_of(asked))


def test_an_address_goes_before_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert settings().address == "auto"
    assert settings(address="ray://head:10001").address == "ray://head:10001"


@pytest.mark.parametrize("preset", PRESETS)
def test_trials_vary_the_preset_with_the_flags_on_top(preset: Any) -> None:
    (run,) = settings(preset=preset, epochs=7, image_size=64, score_candidates=9).run_configs().values()
    assert run == PRESETS[preset].with_values({"epochs": 7, "image_size": 64, "score_candidates": 9, "folds": 5})
    (run,) = settings(preset=preset, batch_size=5, patience=4).run_configs().values()
    assert (run.train.batch_size, run.train.patience) == (5, 4)


def test_images_are_cut_into_folds_unless_a_held_out_share_is_asked_for(tmp_path: Path) -> None:
    def folds(**given: Any) -> int:
        (run,) = settings(**given).run_configs().values()
        return run.data.folds

    file = tmp_path / "run.toml"
    file.write_text("[data]\nvalidation_fraction = 0.3\n")
    assert folds() == folds(config=None) == 5
    assert folds(validation_fraction=0.3) == folds(calibration_fraction=0.0) == folds(config=file) == 0
    assert folds(selection="oracle") == 0
    assert folds(validation_fraction=0.3, folds=4) == 4
    file.write_text("[data]\nfolds = 3\n")
    assert folds(config=file) == 3 and folds(config=file, folds=0) == 0


def test_finalists_need_folds(mvtec_root: Path) -> None:
    def finalists(**given: Any) -> int:
        return plan_of(settings(data=str(mvtec_root), **given)).finalists

    assert (finalists(), finalists(finalists=1), finalists(folds=0)) == (3, 1, 0)
    for wrong in ({"finalists": -1}, {"min_gain_errors": -0.1}, {"min_gain_errors": float("nan")}):
        with pytest.raises(ValueError, match=r"--(finalists|min-gain-errors) must"):
            settings(**wrong)


def test_categories_try_common_points_first_where_their_spaces_hold_them(mvtec_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text("[category.wood]\nlearning_rate = {low = 0.001, high = 0.006}\n")
    spaces = plan_of(settings(data=str(mvtec_root), space=file, trials=16)).spaces
    tile, wood = spaces["tile"], spaces["wood"]
    assert len(tile.shared) == 8 and {len(point) for point in tile.shared} == {len(tile.dimensions["dskd"])}
    assert 1 <= len(wood.shared) < 8 and all(point in tile.shared and wood.holds(point) for point in wood.shared)
    for space in (tile, wood):
        assert all(point in space.starting_points() for point in space.shared)
        assert all(space.is_shared(point) for point in space.shared)
    again = plan_of(settings(data=str(mvtec_root), space=file, trials=20)).spaces["tile"].shared
    assert again[:8] == tile.shared, "more trials add points and change none"
    alone = plan_of(settings(data=str(mvtec_root), categories="tile", trials=16)).spaces["tile"]
    assert alone.shared == () == plan_of(settings(data=str(mvtec_root), finalists=0)).spaces["tile"].shared


def test_several_presets_share_what_is_measured_and_how_long() -> None:
    runs = settings(preset="stfpm, aand,stfpm", epochs=7, image_size=64).run_configs()
    assert list(runs) == ["stfpm", "aand"]
    assert {(run.train.epochs, run.data.image_size, run.train.batch_size) for run in runs.values()} == {(7, 64, 32)}
    shared = {"epochs": 7, "image_size": 64, "batch_size": 32, "score_candidates": 500, "folds": 5}
    assert runs["aand"] == PRESETS["aand"].with_values(shared)
    assert list(settings(preset="all").run_configs()) == list(PRESETS)


def test_without_a_length_each_preset_has_its_own_and_all_report_equally_often() -> None:
    runs = settings(preset="all").run_configs()
    assert {name: run.train.steps for name, run in runs.items()} == {
        name: preset.train.steps for name, preset in PRESETS.items()
    }
    assert {run.train.num_validations for run in runs.values()} == {30} == {settings(preset="all").num_reports}
    runs = settings(preset="all", steps=90).run_configs()
    assert {run.train.steps for run in runs.values()} == {90} and settings(steps=90).num_reports == 9
    assert settings(epochs=90).num_reports == 90


@pytest.mark.parametrize(("words", "seconds"), [("2h", 7200), ("1h30m", 5400), ("90s", 90), ("1h1s", 3601)])
def test_a_time_budget_is_read(words: str, seconds: float) -> None:
    assert settings(time_budget=words).budget_seconds() == seconds and settings().budget_seconds() is None


def test_the_space_file_speaks_of_every_category_of_the_data(mvtec_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text("[category.wood]\nhkd_weight = 1.0\n")
    found = plan_of(settings(data=str(mvtec_root), space=file, categories="tile")).spaces
    assert "hkd_weight" in found["tile"].dimensions["dskd"], "wood's section is another search's"
    found = plan_of(settings(data=str(mvtec_root), space=file)).spaces
    assert "hkd_weight" not in found["wood"].dimensions["dskd"]
    file.write_text("[category.screw]\nhkd_weight = 1.0\n")
    with pytest.raises(ValueError, match=r"\[category.screw\] names no category .* known: tile, wood"):
        plan_of(settings(data=str(mvtec_root), space=file, categories="tile"))
    with pytest.raises(ValueError, match=r"--space none\.toml cannot be read"):
        plan_of(settings(data=str(mvtec_root), space=Path("none.toml")))


def test_categories_are_checked_and_keep_their_order(mvtec_root: Path) -> None:
    def chosen(words: str) -> tuple[str, ...]:
        return plan_of(settings(data=str(mvtec_root), categories=words)).categories

    assert chosen("all") == ("tile", "wood")
    assert chosen(" wood, tile ,wood") == ("wood", "tile")
    with pytest.raises(ValueError, match=r"no category 'screw' in .*; it holds: tile, wood"):
        chosen("tile,screw")
    with pytest.raises(ValueError, match="names none"):
        chosen(" , ")


@pytest.mark.parametrize(
    ("entry", "line", "expected"),
    [
        (search, "", "tune/search.py: error: missing --data STR; see tune/search.py --help"),
        (search, "--data d --epoch 3", "unknown flag --epoch, did you mean --epochs?"),
        (search, "--data d --trials two", "error: --trials: invalid literal for int()"),
        (search, "--data d --preset nn", "--preset takes dskd, stfpm, rd4ad, aand or all, got 'nn'"),
        (search, "--data d --image-size 50", "error: image_size must be a positive multiple of 32"),
        (pull, "bolt", "tune/pull.py: error: missing --out PATH; see tune/pull.py --help"),
        (pull, "bolt --out d --storage /none/of/it", "pull: error: no search 'search' in /none/of/it"),
    ],
)
def test_bad_usage_of_the_entries_is_one_line(
    entry: ModuleType, line: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [entry.__name__, *line.split()])
    with pytest.raises(SystemExit) as end:
        entry.main()
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and expected in said.err


def test_what_a_search_keeps_fixed_comes_from_flags_above_the_file_above_the_presets(tmp_path: Path) -> None:
    assert settings().run_configs() == {
        "dskd": PRESETS["dskd"].with_values({"score_candidates": 500, "batch_size": 16, "folds": 5})
    }
    file = tmp_path / "run.toml"
    file.write_text(
        'preset = "rd4ad"\n[data]\nimage_size = 64\n[model]\nbackbone = "wide_resnet50_2.tv_in1k"\n'
        "embedding_depth = 3\n[train]\nepochs = 7\nschedule = 'cosine'\n"
    )
    (run,) = settings(config=file).run_configs().values()
    assert run == PRESETS["rd4ad"].with_values(
        {
            "image_size": 64, "backbone": "wide_resnet50_2.tv_in1k", "embedding_depth": 3, "epochs": 7,
            "schedule": "cosine", "score_candidates": 500, "folds": 5,
        }
    )  # fmt: skip
    flags = {"epochs": 9, "backbone": "resnet34.tv_in1k", "levels": (2, 3), "split_seed": 4, "preset": "dskd,aand"}
    both = settings(config=file, **flags).run_configs()
    assert list(both) == ["dskd", "aand"]
    for run in both.values():
        assert (run.train.epochs, run.model.backbone, run.model.levels) == (9, "resnet34.tv_in1k", (2, 3))
        assert (run.data.split_seed, run.data.image_size, run.model.embedding_depth) == (4, 64, 3)
        assert run.loss.level_weights == run.score.score_level_weights == (1.0, 1.0)
    assert both["aand"].amplification.amplification and not both["dskd"].amplification.amplification


def test_a_length_by_flag_replaces_that_of_the_file_and_the_file_that_of_the_presets(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"

    def lengths(content: str, **flags: Any) -> list[tuple[int | None, int | None, int]]:
        file.write_text(f"[train]\n{content}\n")
        runs = settings(config=file, preset="dskd,stfpm", **flags).run_configs().values()
        return [(run.train.steps, run.train.epochs, run.train.patience) for run in runs]

    assert lengths("") == [(3200, None, 0), (800, None, 0)]
    assert lengths("steps = 50\npatience = 3") == [(50, None, 3)] * 2
    assert lengths("epochs = 6") == [(None, 6, 0)] * 2
    assert lengths("epochs = 6\npatience = 3", steps=40, patience=0) == [(40, None, 0)] * 2
    assert lengths("steps = 50", epochs=2) == [(None, 2, 0)] * 2
    assert settings(config=file, epochs=2).num_reports == 2


def test_every_shared_field_of_a_space_is_a_flag_of_the_search() -> None:
    names = {each.name for each in dataclasses.fields(SearchSettings)}
    assert set(FIXED) <= names
    assert SHARED - set(FIXED) == {"student_encoder", "student_decoder", "fold"}, "the preset's, or of --config"


def test_a_backbone_brings_what_goes_with_it_to_a_search() -> None:
    dinov3 = settings(backbone="vit_small_patch16_dinov3.lvd1689m", preset="dskd")
    (run,) = dinov3.run_configs().values()
    assert run.model.levels == (3, 7, 11) and not run.model.student_encoder
    (run,) = settings(teacher_weights="lite0").run_configs().values()
    assert run.model.backbone == "tf_efficientnet_lite0.in1k"
    with pytest.raises(
        ValueError, match=r"lite0 are the weights of backbone tf_efficientnet_lite0\.in1k, got resnet50"
    ):
        settings(teacher_weights="lite0", backbone="resnet50.tv_in1k")


NUMBERS = [
    (kind, field.name, value)
    for kind in (SearchSettings, TrainingSettings, ScoringSettings)
    for field in dataclasses.fields(kind)
    if "Range(" in str(field.type)
    for value in (float("nan"), float("inf"), -1, 10**12)
]


def test_every_number_of_the_cluster_s_flags_has_a_range() -> None:
    assert len(NUMBERS) >= 4 * 14
    plain = [
        f"{kind.__name__}.{field.name}"
        for kind in (SearchSettings, TrainingSettings, ScoringSettings, DemoSettings)
        for field in dataclasses.fields(kind)
        if str(field.type).removesuffix(" | None") in ("int", "float", "<class 'int'>", "<class 'float'>")
    ]
    of_the_configuration = {*RunConfig().flat(), "false_alarm_rate", "trials"}  # ranges of their own
    assert [name for name in plain if name.rpartition(".")[2] not in of_the_configuration] == []


@pytest.mark.parametrize(("kind", "name", "value"), NUMBERS)
def test_a_number_out_of_range_is_refused_before_anything_starts(kind: Any, name: str, value: float) -> None:
    required: dict[Any, dict[str, Any]] = {
        SearchSettings: {"data": "data"},
        TrainingSettings: {"data": "data", "out": Path("out"), "config": RunConfig()},
        ScoringSettings: {"detector": "d", "images": "i", "out": "o"},
    }
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"^{flag} must be (at least|above) .* and at most .*, got {value}") as raised:
        kind(**required[kind] | {name: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("budget", ["99999h", "9999999999999h", "1" * 5000 + "h"])
def test_a_time_budget_has_an_end(budget: str) -> None:
    with pytest.raises(ValueError, match="--time-budget must be a time such as 2h"):
        settings(time_budget=budget)
