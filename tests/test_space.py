from collections.abc import Callable
from typing import Any

import optuna
import pytest

from dskd.config import RunConfig
from dskd.presets import PRESETS
from tune.space import known_good, search_space, with_suggestions

BASES = {
    **PRESETS,
    "two levels": RunConfig().with_values(
        {"levels": (1, 2), "level_weights": (1.0, 0.5), "score_level_weights": (1.0, 1.0)}
    ),
}

every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


class Choosing:
    """Answers each question of the space with one end of its range, and remembers the answers."""

    def __init__(self, pick: Callable[[Any], Any]) -> None:
        self.pick = pick
        self.answers: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        assert low < high and (low > 0 or not log)
        return float(self._answer(name, (low, high)))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        assert low < high and (low > 0 or not log)
        return int(self._answer(name, (low, high)))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._answer(name, choices)

    def _answer(self, name: str, choices: Any) -> Any:
        assert name not in self.answers, f"{name} is asked for twice"
        self.answers[name] = self.pick(choices)
        return self.answers[name]


@every_base
def test_every_suggested_name_is_a_field_or_a_weight_of_one(base: RunConfig) -> None:
    asked = Choosing(min)
    search_space(asked, base)
    fields = base.flat()
    for name in asked.answers:
        weights, _, position = name.rpartition("_")
        assert name in fields or 1 <= int(position) <= len(fields[weights])


@every_base
@pytest.mark.parametrize("pick", [min, max])
def test_both_ends_of_every_range_make_a_valid_run_that_carries_them(
    base: RunConfig, pick: Callable[[Any], Any]
) -> None:
    asked = Choosing(pick)
    search_space(asked, base)
    built = with_suggestions(base, asked.answers)
    flat = built.flat()
    for name, value in asked.answers.items():
        weights, _, position = name.rpartition("_")
        assert (flat[name] if name in flat else flat[weights][int(position) - 1]) == value
    untouched = {
        name for name in flat if name not in asked.answers and not any(n.startswith(f"{name}_") for n in asked.answers)
    }
    assert {name: flat[name] for name in untouched} == {name: base.flat()[name] for name in untouched}
    assert RunConfig.from_dict(built.to_dict()) == built


@every_base
def test_the_space_asks_only_for_what_the_students_have(base: RunConfig) -> None:
    asked = Choosing(min)
    search_space(asked, base)
    has_both = base.model.student_encoder and base.model.student_decoder
    assert ("encoder_hkd_margin" in asked.answers) == base.model.student_encoder
    assert ("embedding_depth" in asked.answers) == ("decoder_hkd_margin" in asked.answers) == base.model.student_decoder
    assert ("decoder_weight" in asked.answers) == ("encoder_score_weight" in asked.answers) == has_both
    assert sum(name.startswith("level_weights_") for name in asked.answers) == len(base.model.levels)


@every_base
def test_a_search_starts_from_the_preset_itself(base: RunConfig) -> None:
    points = [with_suggestions(base, point) for point in known_good(base)]
    assert points[0] == base and points[-1] == base.with_values({"hkd_weight": 1.0})
    assert len(points) == len({str(point) for point in points}), "no trial twice"


@pytest.mark.filterwarnings("error")  # Optuna takes a value beyond its bounds, and warns
@every_base
def test_the_starting_points_lie_within_the_space(base: RunConfig) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for point in known_good(base):
        study.enqueue_trial(point)
    for point in known_good(base):
        trial = study.ask()
        search_space(trial, base)
        assert trial.params == point


@every_base
def test_optunas_fixed_trial_and_random_draws_make_valid_runs(base: RunConfig) -> None:
    fixed = optuna.trial.FixedTrial(known_good(base)[0])
    search_space(fixed, base)
    assert with_suggestions(base, fixed.params) == base
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for _ in range(20):
        trial = study.ask()
        search_space(trial, base)
        drawn.append(with_suggestions(base, trial.params))
    assert len({str(run) for run in drawn}) == 20


@pytest.mark.parametrize("name", ["margin", "level_weights_4", "level_weights_0", "epochs_1", "levels_9"])
def test_a_name_that_is_no_field_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name) as raised:
        with_suggestions(RunConfig(), {name: 1.0})
    assert "\n" not in str(raised.value)
