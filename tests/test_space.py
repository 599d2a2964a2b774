import json
import pickle
import random
from pathlib import Path
from typing import Any

import optuna
import pytest

from dskd.config import RunConfig
from dskd.presets import PRESETS, with_backbone
from tune.settings.space import Choice, Dimension, Range, Space, build_space, with_suggestions
from tune.settings.space_file import read_space

TWO_LEVELS = RunConfig().with_values({"levels": (1, 2), "level_weights": (1.0, 0.5), "score_level_weights": (1.0, 1.0)})
BASES = {**PRESETS, "two levels": TWO_LEVELS}
TEACHERS = Choice(("resnet18.tv_in1k", "vit_small_patch16_dinov3.lvd1689m"))
SPACES = {
    **{name: build_space({name: base}) for name, base in BASES.items()},
    "all four": build_space(PRESETS),
    "amplified or not": build_space(
        PRESETS,
        {
            preset: {"amplification": Choice((True, False)), "amplification_margin": Range(0.1, 0.5)}
            for preset in PRESETS
        },
    ),
    "two teachers": build_space({"dskd": PRESETS["dskd"]}, {"dskd": {"backbone": TEACHERS}}),
    "all four, one of them with two teachers": build_space(PRESETS, {"rd4ad": {"backbone": TEACHERS}}),
    "all four with two teachers": build_space(PRESETS, {preset: {"backbone": TEACHERS} for preset in PRESETS}),
}

every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


def names_of(base: RunConfig) -> set[str]:
    (dimensions,) = build_space({"it": base}).dimensions.values()
    return set(dimensions)


def asked(space: Space, seed: int, trials: int = 1) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    found = []
    for _ in range(trials):
        trial = study.ask()
        space.ask(trial)
        found.append(dict(trial.params))
    return found


@every_base
def test_one_preset_gives_the_dimensions_the_names_of_fields_or_of_a_weight_of_one(base: RunConfig) -> None:
    fields = base.flat()
    for name in names_of(base):
        weights, _, position = name.rpartition("_")
        assert name in fields or 1 <= int(position) <= len(fields[weights])


@every_base
def test_the_space_asks_only_for_what_the_students_have(base: RunConfig) -> None:
    names = names_of(base)
    has_both = base.model.student_encoder and base.model.student_decoder
    assert ("encoder_hkd_margin" in names) == base.model.student_encoder
    assert ("embedding_depth" in names) == ("decoder_hkd_margin" in names) == base.model.student_decoder
    assert ("decoder_weight" in names) == ("encoder_score_weight" in names) == ("student_fusion" in names) == has_both
    assert sum(name.startswith("level_weights_") for name in names) == len(base.model.levels)
    assert not any(name.startswith("amplification") for name in names)


@every_space
def test_every_point_of_a_space_is_a_valid_run_that_carries_it(space: Space) -> None:
    seen = set()
    for point in asked(space, seed=0, trials=100):
        run = space.configuration(point)
        seen.add(str(run))
        assert RunConfig.from_dict(run.to_dict()) == run
        assert space.point_of(run) == point
        variant = space.variant_of(point)
        base, flat = space.bases[variant].flat(), run.flat()
        varied = {name if name in flat else name.rpartition("_")[0] for name in space.dimensions[variant]}
        assert {name: flat[name] for name in flat.keys() - varied} == {
            name: base[name] for name in base.keys() - varied
        }
    assert len(seen) == 100


@every_space
def test_the_ends_of_every_dimension_are_valid_runs(space: Space) -> None:
    for preset, dimensions in space.dimensions.items():
        for end in (0, -1):
            with_suggestions(space.bases[preset], {name: each.ends()[end] for name, each in dimensions.items()})


@every_base
def test_a_search_starts_from_the_preset_itself_and_then_its_hard_loss(base: RunConfig) -> None:
    space = build_space({"it": base})
    runs = [space.configuration(point) for point in space.starting_points()]
    rate = base.train.learning_rate
    rates = [base.with_values({"learning_rate": each}) for each in (2 * rate, rate / 2)]
    hard = base.with_values({"hkd_weight": 1.0})
    assert runs == [base, *([hard] if hard != base else []), *rates]
    assert len(runs) == len({str(run) for run in runs}), "no trial twice"


def test_a_search_of_all_presets_starts_from_each_untuned() -> None:
    space = SPACES["all four"]
    runs = [space.configuration(point) for point in space.starting_points()]
    assert runs[:4] == list(PRESETS.values())
    hard = [PRESETS[name].with_values({"hkd_weight": 1.0}) for name in ("dskd", "stfpm", "rd4ad")]
    assert runs[4:7] == hard, "aand has that loss already"
    assert [run.train.learning_rate for run in runs[7:]] == [
        factor * PRESETS[name].train.learning_rate for factor in (2, 0.5) for name in PRESETS
    ]
    assert [space.is_untuned(point) for point in space.starting_points()] == [True] * 4 + [False] * 11


@pytest.mark.filterwarnings("error")  # Optuna takes a value beyond its bounds, and warns
@every_space
def test_the_starting_points_lie_within_the_space_and_come_back_from_a_database(space: Space) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), storage="sqlite:///:memory:")
    for point in space.starting_points():
        study.enqueue_trial(point)
    for point in space.starting_points():
        trial = study.ask()
        space.ask(trial)
        assert trial.params == point
        fixed = optuna.trial.FixedTrial(point)
        space.ask(fixed)
        assert fixed.params == point


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # TPE's group
def test_tpe_learns_on_a_conditional_space_which_preset_and_which_of_its_values_are_good() -> None:
    space = SPACES["all four"]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, multivariate=True, group=True)
    )

    def value(trial: optuna.Trial) -> float:
        space.ask(trial)
        run = space.configuration(trial.params)
        return (not run.model.student_encoder) + run.amplification.amplification - abs(run.loss.hkd_weight - 1.5)

    study.optimize(value, n_trials=45)
    late = [trial.params for trial in study.trials[30:]]
    assert sum(params["preset"] == "aand" for params in late) > 9
    assert all(name == "preset" or name.startswith(f"{params['preset']}.") for params in late for name in params)


def test_each_of_several_backbones_has_its_own_configuration_and_its_own_dimensions() -> None:
    resnet, dinov3 = TEACHERS.options
    space = SPACES["two teachers"]
    first, second = (space.configuration(point) for point in space.starting_points()[:2])
    assert first == PRESETS["dskd"] and space.is_untuned(space.starting_points()[1])
    assert second == with_backbone(PRESETS["dskd"], dinov3) and not second.model.student_encoder
    for point in asked(space, 3, 30):
        backbone = point["backbone"]
        assert all(name == "backbone" or name.startswith(f"{backbone}.") for name in point)
        assert (f"{backbone}.encoder_score_weight" in point) == (backbone == resnet)
        assert space.configuration(point).model.backbone == backbone and space.preset_of(point) == "dskd"
    several = SPACES["all four, one of them with two teachers"]
    assert len(several.bases) == 5
    points = asked(several, 0, 40)
    assert {point["rd4ad.backbone"] for point in points if point["preset"] == "rd4ad"} == {resnet, dinov3}
    assert not any("rd4ad.backbone" in point for point in points if point["preset"] != "rd4ad")
    described = SPACES["all four with two teachers"].describe()
    assert described["preset"] == "dskd | stfpm | rd4ad | aand" and described["aand.backbone"] == f"{resnet} | {dinov3}"
    assert described[f"stfpm.{dinov3}.level_fusion"] == "sum | product"


def test_teachers_of_one_space_see_the_same_tiles() -> None:
    asked_for = {"rd4ad": {"backbone": Choice(("resnet18.tv_in1k", "vit_small_patch14_dinov2.lvd142m"))}}
    tiled = PRESETS["rd4ad"].with_values({"tile": 224})
    with pytest.raises(ValueError, match=r"must have one overlap of tiles, got 96 for resnet18\S* and 84 for vit_"):
        build_space({"rd4ad": tiled}, asked_for)
    space = build_space({"rd4ad": tiled.with_values({"overlap": 0})}, asked_for)
    assert {base.data.input_size for base in space.bases.values()} == {(224, 224)}
    wide = build_space({"rd4ad": PRESETS["rd4ad"].with_values({"resize": "448x224"})}, asked_for)
    assert {base.data.input_size for base in wide.bases.values()} == {(448, 224)}


def test_a_champion_of_a_teacher_starts_a_search_that_has_it() -> None:
    space = SPACES["two teachers"]
    won = with_backbone(PRESETS["dskd"], TEACHERS.options[1]).with_values({"hkd_weight": 0.7})
    assert space.point_of(won)["backbone"] == TEACHERS.options[1] and space.configuration(space.point_of(won)) == won
    with pytest.raises(ValueError, match="backbone is 'resnet50' there"):
        space.point_of(PRESETS["dskd"].with_values({"backbone": "resnet50"}))


def test_a_space_survives_the_way_to_another_process_and_is_known_again() -> None:
    for space in SPACES.values():
        assert pickle.loads(pickle.dumps(space)) == space
        plain = json.loads(json.dumps(space.to_plain()))
        assert plain == json.loads(json.dumps(pickle.loads(pickle.dumps(space)).to_plain()))
    assert SPACES["all four"].to_plain() != SPACES["amplified or not"].to_plain()


@pytest.mark.parametrize("name", ["margin", "level_weights_4", "level_weights_0", "epochs_1", "levels_9"])
def test_a_name_that_is_no_field_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name) as raised:
        with_suggestions(RunConfig(), {name: 1.0})
    assert "\n" not in str(raised.value)


def test_a_champion_of_another_search_is_found_in_the_space_or_the_obstacle_is_named() -> None:
    space = SPACES["all four"]
    won = PRESETS["aand"].with_values(
        {"hkd_weight": 0.3, "level_weights": (0.5, 1.5, 2.0), "epochs": 7, "image_size": 64, "batch_size": 3}
    )
    point = space.point_of(won)
    assert point["preset"] == "aand" and point["aand.level_weights_2"] == 1.5
    found = space.configuration(point)
    assert found == won.with_values({"steps": 1920, "image_size": 256, "batch_size": 16})
    for change, obstacle in (
        ({"hkd_weight": 2.5}, "hkd_weight 2.5 lies outside"),
        ({"amplification_margin": 0.7}, "amplification_margin is 0.7 there and 0.3 here"),
        ({"backbone": "resnet50"}, "backbone is 'resnet50' there"),
    ):
        with pytest.raises(ValueError, match=obstacle):
            space.point_of(won.with_values(change))
    with pytest.raises(ValueError, match="levels are"):
        space.point_of(TWO_LEVELS)


def test_a_file_chooses_teachers_for_all_a_preset_or_a_category(tmp_path: Path) -> None:
    text = (
        'backbone = ["resnet18.tv_in1k", "resnet34.tv_in1k"]\n'
        '[preset.aand]\nbackbone = "wide_resnet50_2.tv_in1k"\n'
        '[category.screw]\nbackbone = "resnet50.tv_in1k"\n'
    )
    file = read_space(written(tmp_path, text))
    bases = {name: PRESETS[name] for name in ("dskd", "aand")}
    bolt, screw = file.space(bases, "bolt"), file.space(bases, "screw")
    assert list(bolt.bases) == ["dskd@resnet18.tv_in1k", "dskd@resnet34.tv_in1k", "aand"]
    assert bolt.bases["aand"].model.backbone == "wide_resnet50_2.tv_in1k"
    assert {base.model.backbone for base in screw.bases.values()} == {"resnet50.tv_in1k"} and len(screw.bases) == 2
    assert not any("backbone" in name for name in screw.describe())


FILE = """
learning_rate = {low = 0.001, high = 0.02, log = true}
level_fusion = ["sum", "product", "max"]
embedding_depth = 2
level_weights_3 = 1.5
amplification = [true, false]
hkd_hardest = {low = 2, high = 9}
[preset.stfpm]
learning_rate = {low = 0.1, high = 1}
[category.screw]
hkd_weight = {low = 0.5, high = 2.0}
blur_sigma = 0
[category."it's"]
learning_rate = 0.01
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "space.toml"
    path.write_text(text)
    return path


def test_a_file_stands_above_the_default_space_and_a_category_above_all(tmp_path: Path) -> None:
    file = read_space(written(tmp_path, FILE))
    file.check_names(("dskd", "stfpm"), ("screw", "it's", "bolt"))
    bases = {name: PRESETS[name] for name in ("dskd", "stfpm")}
    bolt, screw, quoted = (file.space(bases, category) for category in ("bolt", "screw", "it's"))
    assert bolt.dimensions["dskd"]["learning_rate"] == Range(0.001, 0.02, True)
    assert bolt.dimensions["stfpm"]["learning_rate"] == Range(0.1, 1.0)
    assert bolt.dimensions["dskd"]["level_fusion"] == Choice(("sum", "product", "max"))
    assert bolt.dimensions["dskd"]["hkd_weight"] == Range(0.0, 2.0), "what the file leaves out is the default"
    assert screw.dimensions["dskd"]["hkd_weight"] == Range(0.5, 2.0)
    assert "embedding_depth" not in bolt.dimensions["dskd"], "a single value is no dimension"
    assert bolt.bases["dskd"].model.embedding_depth == 2
    assert bolt.bases["dskd"].loss.level_weights == (1.0, 1.0, 1.5)
    assert screw.bases["stfpm"].score.blur_sigma == 0.0 and "blur_sigma" not in screw.dimensions["stfpm"]
    assert quoted.bases["stfpm"].train.learning_rate == 0.01 and "learning_rate" not in quoted.dimensions["stfpm"]
    assert all(isinstance(params["dskd.hkd_hardest"], int) for params in asked(bolt, 0, 9) if len(params) > 14
               and params["preset"] == "dskd")  # fmt: skip
    # The preset's 0 lies below screw's range, stfpm's step size below bolt's: moved to the nearest there is.
    assert screw.starting_points()[0]["dskd.hkd_weight"] == 0.5
    for space in (bolt, screw, quoted):
        for point in [*space.starting_points(), *asked(space, 1, 20)]:
            assert space.point_of(space.configuration(point)) == point


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert read_space(written(tmp_path, "")).space(PRESETS, "screw") == SPACES["all four"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("depth = 2", "depth: unknown field; known: amplification, "),
        ("[category.screw]\ndepth = 2", r"\[category.screw\]: depth: unknown field"),
        ("epochs = [5, 10]", "epochs: all trials share epochs"),
        ("steps = [500, 1000]", "steps: all trials share steps"),
        ("image_size = 64", "all trials share image_size"),
        ("tile = [0, 256]", "all trials share tile"),
        ("levels_1 = 1.0", "levels_1: unknown field"),
        ("backbone = ['a/b']", "backbone = 'a/b' with preset dskd: backbone must be the plain name"),
        ("backbone = [3]", "backbone: expected values of type str, got 3"),
        (
            "backbone = ['resnet18.tv_in1k', 'vit_small_patch14_dinov2.lvd142m']",
            "must have one image size, got 256 for resnet18.tv_in1k and 252 for vit_small_.* such as 224",
        ),
        ("level_weights = [1.0, 2.0]", "level_weights: has an entry for each level: level_weights_1"),
        ("level_weights_4 = 1.0", "level_weights_4 names no weight: level_weights has 3"),
        ("embedding_depth = {low = 1.0, high = 2}", "embedding_depth: expected values of type int, got 1.0"),
        ("embedding_depth = [true]", "expected values of type int, got True"),
        ("learning_rate = '0.1'", "learning_rate: expected values of type float, got '0.1'"),
        ("learning_rate = {low = 0.1, high = inf}", "expected values of type float, got inf"),
        ("amplification = {low = 0, high = 1}", "values of type bool have no range"),
        ("level_fusion = 3", "level_fusion: expected values of type str, got 3"),
        ("level_fusion = ['sum', 'mean']", "level_fusion = 'mean' .*must be one of"),
        ("level_fusion = []", "level_fusion: an empty list"),
        ("hkd_hardest = [5, 5]", "hkd_hardest: a value is repeated"),
        ("hkd_weight = {low = 1.0, high = 1.0}", "hkd_weight: the range is empty: low 1.0 must be below high 1.0"),
        ("hkd_weight = {low = 0, high = 1, log = true}", "a logarithmic range needs a positive low"),
        ("hkd_weight = {low = 0, high = 1, log = 1}", "log must be true or false"),
        ("hkd_weight = {low = 0}", "needs low and high, high is missing"),
        ("hkd_weight = {low = 0, high = 1, step = 1}", "a range has low, high and log, got 'step'"),
        ("hkd_weight = {low = -1, high = 1}", "hkd_weight = -1.0 .*must not be negative"),
        ("encoder_score_weight = {low = 0, high = 2}", "student_fusion 'noisy-or' needs"),
        ("amplification_margin = 0.2", "amplification_margin has no effect with --preset dskd"),
        ("category = 3", r"category must be sections such as \[category.NAME\]"),
        ("[preset]\ndskd = 3", r"preset must be sections such as \[preset.NAME\]"),
        ("[category.bolt]\n", r"\[category.bolt\] names no category of this search; known: screw"),
        ("[preset.aand]\n", r"\[preset.aand\] names no preset of this search; known: dskd"),
        ("hkd_weight = ", "is not TOML"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line_that_names_file_and_entry(
    text: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected) as raised:
        file = read_space(written(tmp_path, text))
        file.check_names(("dskd",), ("screw",))
        file.space({"dskd": PRESETS["dskd"]}, "screw")
    assert "\n" not in str(raised.value) and str(tmp_path / "space.toml") in str(raised.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_space(tmp_path / "none.toml")


def test_whatever_a_file_may_narrow_every_point_stays_a_valid_run() -> None:
    """Entries drawn at random over every dimension there is: refused in one line, or valid everywhere."""
    draw = random.Random(0)
    (defaults,) = build_space({"dskd": PRESETS["dskd"]}).dimensions.values()
    num_refused = 0
    for _ in range(40):
        entries: dict[str, Dimension] = {}
        for name, dimension in draw.sample(sorted(defaults.items()), 4):
            if isinstance(dimension, Choice):
                entries[name] = Choice(tuple(draw.sample(dimension.options, draw.randint(1, len(dimension.options)))))
            else:
                low, high = sorted(draw.uniform(dimension.low, 3 * dimension.high) for _ in range(2))
                whole = isinstance(dimension.low, int)
                entries[name] = Range(round(low), round(high) + 1) if whole else Range(low, high)
        try:
            space = build_space({"dskd": PRESETS["dskd"]}, {"dskd": entries})
        except ValueError as error:
            num_refused += 1
            assert "\n" not in str(error)
            continue
        for point in [*space.starting_points(), *asked(space, 0, 3)]:
            assert space.point_of(space.configuration(point)) == point
    assert 0 < num_refused < 20


def test_a_champion_whose_score_was_found_outside_of_the_space_is_tried_with_the_nearest() -> None:
    """Free trials look for score parameters after training, in wider ranges than the space's."""
    space = build_space({"dskd": PRESETS["dskd"]})
    won = PRESETS["dskd"].with_values({"score_level_weights": (0.01, 1.0, 1.5), "learning_rate": 0.004})
    tried = space.configuration(space.point_of(won))
    assert tried.score.score_level_weights == (0.1, 1.0, 1.5) and tried.train.learning_rate == 0.004
    with pytest.raises(ValueError, match=r"learning_rate 9\.0 lies outside"):
        space.point_of(PRESETS["dskd"].with_values({"learning_rate": 9}))
