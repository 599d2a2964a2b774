import ast
import dataclasses
import inspect
import itertools
import json
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from dskd import config
from dskd.config import (
    AmplificationConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    ScoreConfig,
    TeacherSource,
    TrainConfig,
)
from dskd.presets import PRESETS, Preset
from tune.settings.search import SearchSettings

SECTIONS = (DataConfig, ModelConfig, LossConfig, ScoreConfig, TrainConfig, AmplificationConfig)
ALL_DIFFERENT = RunConfig(
    data=DataConfig(image_size=64, validation_fraction=0.3, split_seed=3),
    model=ModelConfig(
        backbone="resnet34",
        levels=(2, 3),
        student_encoder=False,
        decoder_input="teacher",
        detach_embedding=True,
        embedding_depth=4,
    ),
    loss=LossConfig(level_weights=(0.5, 2.0), encoder_match="flattened", hkd_weight=0.7, hkd_hardest=3),
    score=ScoreConfig(score_level_weights=(0.0, 1.5), level_fusion="max", score_top_fraction=0.01),
    train=TrainConfig(epochs=3, optimizer="sgd", schedule="multistep", seed=9),
    amplification=AmplificationConfig(amplification=True, amplification_margin=0.4, memory_size=7),
)


@pytest.mark.parametrize("run", [*PRESETS.values(), ALL_DIFFERENT])
def test_round_trip_through_json_loses_nothing(run: RunConfig) -> None:
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_missing_fields_take_their_defaults() -> None:
    assert RunConfig.from_dict({}) == RunConfig()
    assert RunConfig.from_dict({"train": {"epochs": 7}}) == RunConfig(train=TrainConfig(epochs=7))


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({"trian": {}}, "amplification, data, loss, model, score, train"),
        ({"train": {"epoch": 3}}, "batch_size, epochs, learning_rate, optimizer, patience, schedule, seed, steps"),
    ],
)
def test_unknown_name_is_answered_with_the_known_ones(values: dict[str, Any], known: str) -> None:
    with pytest.raises(ValueError, match=f"unknown field .*known: {known}") as raised:
        RunConfig.from_dict(values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 0), ("image_size", 100), ("image_size", 64.0), ("image_size", "64"), ("image_size", True),
        ("validation_fraction", 0.0), ("validation_fraction", 1), ("validation_fraction", math.nan),
        ("split_seed", -1), ("backbone", None), ("levels", ()), ("levels", (3, 2, 1)), ("levels", (1, 1, 2)),
        ("levels", (-1, 0, 1)), ("levels", 3), ("levels", ("1", "2", "3")), ("decoder_input", "both"),
        ("student_encoder", 1), ("student_encoder", False), ("embedding_depth", 0), ("level_weights", (1.0, 1.0)),
        ("level_weights", (0.0, 0.0, 0.0)), ("level_weights", (1.0, -1.0, 1.0)), ("level_weights", (1, math.nan, 1)),
        ("decoder_weight", -0.1), ("hkd_weight", -1.0), ("hkd_hardest", 0), ("encoder_hkd_margin", 2.5),
        ("decoder_hkd_margin", -0.1), ("score_level_weights", (1.0,) * 4), ("level_fusion", "mean"),
        ("blur_sigma", -1.0), ("blur_sigma", math.nan), ("score_top_fraction", 1.1), ("epochs", 0), ("epochs", 2.5),
        ("steps", 0), ("steps", -3), ("steps", "100"), ("steps", True), ("patience", -1), ("patience", None),
        ("batch_size", 0), ("optimizer", "adamw"), ("learning_rate", 0.0), ("learning_rate", math.nan),
        ("learning_rate", "0.1"), ("seed", -1), ("seed", None), ("amplification", 1), ("amplification_epochs", 0),
        ("amplification_batch_size", 0), ("amplification_learning_rate", 0.0), ("amplification_margin", -0.1),
        ("amplification_margin", math.nan), ("amplification_weight", -1.0), ("amplification_seed", -1),
        ("memory_size", 0), ("student_fusion", "or"), ("learning_rate", math.inf), ("level_weights", (1, math.inf, 1)),
        ("decoder_weight", math.nan), ("hkd_weight", math.inf), ("backbone", "hf-hub:timm/resnet18.a1_in1k"),
        ("backbone", "hf_hub:someone/net"), ("backbone", "local-dir:net"), ("backbone", "../net"), ("backbone", ""),
        ("image_size", 2**20), ("embedding_depth", 10**6), ("memory_size", 10**9),
    ],
)  # fmt: skip
def test_wrong_type_or_range_is_one_line_naming_the_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as raised:
        RunConfig().with_values({name: value})
    assert "\n" not in str(raised.value)


def test_a_run_without_students_or_with_an_unfed_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        ModelConfig(student_encoder=False, student_decoder=False)
    for decoder_input in ("student", "student+teacher"):
        with pytest.raises(ValueError, match=f"decoder_input '{re.escape(decoder_input)}' needs student_encoder"):
            ModelConfig(student_encoder=False, decoder_input=decoder_input)
    assert RunConfig().with_values({"encoder_score_weight": 0.0}).score.encoder_score_weight == 0
    with pytest.raises(ValueError, match="score weights"):
        RunConfig().with_values({"encoder_score_weight": 0.0, "decoder_score_weight": 0.0})
    with pytest.raises(ValueError, match=r"'noisy-or' needs .* in \[0, 1\], got \(1.0, 1.5\)"):
        ScoreConfig(student_fusion="noisy-or", decoder_score_weight=1.5)


def test_with_values_replaces_by_name_and_leaves_the_original() -> None:
    base = RunConfig()
    changed = base.with_values(
        {"hkd_weight": 1, "levels": [1, 2], "level_weights": [1, 2], "score_level_weights": [3, 4]}
    )
    assert base == RunConfig()
    assert changed.flat() == base.flat() | {
        "hkd_weight": 1.0,
        "levels": (1, 2),
        "level_weights": (1.0, 2.0),
        "score_level_weights": (3.0, 4.0),
    }
    assert type(changed.loss.hkd_weight) is float
    with pytest.raises(ValueError, match=r"'lr'; known: .*learning_rate"):
        base.with_values({"lr": 0.1})


def test_field_names_are_unique_over_all_sections() -> None:
    names = [field.name for section in SECTIONS for field in dataclasses.fields(section)]
    assert len(names) == len(set(names))
    assert set(RunConfig().flat()) == set(names)
    assert {type(getattr(RunConfig(), field.name)) for field in dataclasses.fields(RunConfig)} == set(SECTIONS)


def test_every_field_says_what_it_means() -> None:
    classes = {node.name: node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef)}
    for section in SECTIONS:
        body = classes[section.__name__].body
        documented = {
            field.target.id
            for field, below in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and str(below.value.value).strip().endswith((".", ")"))
        }
        assert documented == {field.name for field in dataclasses.fields(section)}


def test_both_commands_offer_exactly_the_presets() -> None:
    assert set(typing.get_args(Preset)) == set(PRESETS)
    assert set(SearchSettings(data="data", preset="all").run_configs()) == set(PRESETS)


def test_presets_are_the_published_wirings() -> None:
    students = {name: (run.model.student_encoder, run.model.student_decoder) for name, run in PRESETS.items()}
    assert students == {"dskd": (True, True), "stfpm": (True, False), "rd4ad": (False, True), "aand": (False, True)}
    assert PRESETS["rd4ad"].model.decoder_input == "teacher"
    assert PRESETS["dskd"].model.decoder_input == "student"
    # STFPM (arXiv 2103.04257): product of the levels, SGD at 0.4; RD4AD (arXiv 2201.10703): sum, Adam at 0.005.
    assert (PRESETS["stfpm"].score.level_fusion, PRESETS["stfpm"].train.learning_rate) == ("product", 0.4)
    assert (PRESETS["rd4ad"].score.level_fusion, PRESETS["rd4ad"].train.learning_rate) == ("sum", 0.005)
    # AAND (arXiv 2405.02068): RD4AD's wiring on the amplified teacher, the ten hardest patches without margin.
    aand = PRESETS["aand"]
    assert [name for name, run in PRESETS.items() if run.amplification.amplification] == ["aand"]
    assert (aand.model, aand.score) == (PRESETS["rd4ad"].model, PRESETS["rd4ad"].score)
    assert (aand.loss.hkd_weight, aand.loss.hkd_hardest, aand.loss.decoder_hkd_margin) == (1.0, 10, 0.0)
    assert (aand.amplification.amplification_epochs, aand.train.schedule) == (100, "multistep")


@pytest.mark.parametrize(("preset", "epochs"), [("stfpm", 100), ("rd4ad", 200), ("aand", 120)])
def test_a_presets_length_is_its_papers_on_the_papers_data(preset: str, epochs: int) -> None:
    """MVTec AD: 3,629 training images in 15 categories."""
    train = PRESETS[preset].train
    assert train.num_steps(20) == train.num_steps(2000) == epochs * math.ceil(3629 / 15 / train.batch_size)
    assert PRESETS["dskd"].train.steps == PRESETS["rd4ad"].train.steps, "whose optimiser and batch it has"


def test_a_length_is_in_steps_or_in_epochs() -> None:
    assert (TrainConfig().steps, TrainConfig().epochs) == (3200, None)
    assert (TrainConfig(epochs=5).steps, TrainConfig(epochs=5).epochs) == (None, 5)
    with pytest.raises(ValueError, match="either steps or epochs, got steps 3 and epochs 5; leave one out") as raised:
        TrainConfig(steps=3, epochs=5)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="either steps or epochs"):
        RunConfig().with_values({"steps": 3, "epochs": 5})
    run = RunConfig()
    for changes, length in (({"epochs": 5}, "5 epochs"), ({"steps": 7}, "7 steps"), ({"epochs": 9}, "9 epochs")):
        run = run.with_values(changes)
        assert run.train.length == length and RunConfig.from_dict(run.to_dict()) == run
        assert run.with_values(run.flat()) == run
    assert run.with_values({"seed": 4}).train.length == "9 epochs"


@pytest.mark.parametrize("steps", [1, 9, 10, 19, 20, 32, 100, 299, 300, 301, 800, 3200])
def test_a_length_in_steps_is_validated_at_equal_distances(steps: int) -> None:
    train = TrainConfig(steps=steps)
    ends = train.interval_ends(12)
    assert ends == train.interval_ends(12345) and ends[-1] == steps and len(ends) == train.num_validations <= 30
    distances = [end - start for start, end in itertools.pairwise((0, *ends))]
    assert max(distances) - min(distances) <= 1 and (len(ends) == 1 or min(distances) >= 10)


def test_a_length_in_epochs_is_validated_after_each() -> None:
    train = TrainConfig(epochs=100, batch_size=16)
    assert train.interval_ends(40) == tuple(range(2, 201, 2)), "an epoch is as many steps as there are full batches"
    assert train.num_steps(9) == 100, "or one that is not full"


@pytest.mark.parametrize(
    ("weights", "name", "is_file", "is_untrained"),
    [
        ("hub", "hub", False, False),
        ("random", "random", False, True),
        ("lite0", "lite0", False, False),
        ("weights/mine.pth", "mine.pth", True, False),
        ("./hub", "hub", True, False),
    ],
)
def test_a_teacher_source_knows_what_it_is(weights: str, name: str, is_file: bool, is_untrained: bool) -> None:
    source = TeacherSource(weights)
    assert (source.name, source.is_file, source.is_untrained) == (name, is_file, is_untrained)
    assert str(source) == weights and hash(source) == hash(TeacherSource(weights))
    assert source.absolute() == (TeacherSource(f"{Path.cwd() / weights}") if is_file else source)


def test_a_teacher_source_that_is_no_file_is_told_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.pth").touch()
    for weights in ("hub", "lite0", "random", str(tmp_path / "mine.pth")):
        TeacherSource(weights).check_exists()
    with pytest.raises(
        ValueError, match=r"--teacher-weights must be hub, lite0, random or an existing file, got '.*none.pth'"
    ):
        TeacherSource(str(tmp_path / "none.pth")).check_exists()


def test_runs_that_differ_in_their_students_alone_share_their_inputs() -> None:
    run = RunConfig(model=ModelConfig(levels=(1, 2)), loss=LossConfig(level_weights=(1.0, 2.0)),
                    score=ScoreConfig(score_level_weights=(1.0, 3.0)))  # fmt: skip
    same = run.with_values({"learning_rate": 0.1, "student_decoder": False, "hkd_weight": 1.0, "blur_sigma": 0.0})
    assert hash(same.for_inputs()) == hash(run.for_inputs()) and same.for_inputs() == run.for_inputs()
    for name, value in (
        ("image_size", 64), ("split_seed", 1), ("backbone", "resnet34"), ("levels", (2, 3)), ("amplification", True),
    ):  # fmt: skip
        assert run.with_values({name: value}).for_inputs() != run.for_inputs(), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_no_number_of_any_section_may_be_other_than_finite(section: type, value: float) -> None:
    for field in dataclasses.fields(section):
        if field.type in (float, "float"):
            with pytest.raises(ValueError, match=field.name):
                section(**{field.name: value})
