"""The search space as code; a suggested name is a field of the configuration, or `field_N` for its N-th weight."""

import re
from collections.abc import Mapping
from typing import Any, Protocol

from dskd.config import RunConfig


class Suggests(Protocol):
    """What the space asks of an Optuna trial, real or fixed."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


def search_space(trial: Suggests, base: RunConfig) -> None:
    """Ask `trial` for every parameter that matters to the students that `base` trains."""
    trial.suggest_float("learning_rate", base.train.learning_rate / 8, base.train.learning_rate * 4, log=True)
    for position in range(1, len(base.model.levels) + 1):
        trial.suggest_float(f"level_weights_{position}", 0.1, 2.0)
        trial.suggest_float(f"score_level_weights_{position}", 0.1, 2.0)
    trial.suggest_categorical("level_fusion", ["sum", "product"])
    trial.suggest_float("hkd_weight", 0.0, 2.0)
    trial.suggest_int("hkd_hardest", 1, 100, log=True)
    if base.model.student_encoder:
        trial.suggest_float("encoder_hkd_margin", 0.0, 0.5)
    if base.model.student_decoder:
        trial.suggest_float("decoder_hkd_margin", 0.0, 0.5)
        trial.suggest_int("embedding_depth", 1, 4)
    if base.model.student_encoder and base.model.student_decoder:
        trial.suggest_float("decoder_weight", 0.25, 4.0, log=True)
        trial.suggest_float("encoder_score_weight", 0.0, 1.0)


def with_suggestions(base: RunConfig, suggested: Mapping[str, Any]) -> RunConfig:
    """`base` with the values that the space suggested.

    Raises ValueError on a name or a weight's number that the configuration does not have.
    """
    fields = base.flat()
    values: dict[str, Any] = {}
    for name, value in suggested.items():
        indexed = re.fullmatch(r"(.+)_(\d+)", name)
        if name not in fields and indexed and isinstance(fields.get(indexed[1]), tuple):
            weights = list(values.get(indexed[1], fields[indexed[1]]))
            position = int(indexed[2])
            if not 1 <= position <= len(weights):
                raise ValueError(f"{name} names no weight: {indexed[1]} has {len(weights)}, counted from 1.")
            weights[position - 1] = value
            values[indexed[1]] = tuple(weights)
        else:
            values[name] = value
    return base.with_values(values)


def known_good(base: RunConfig) -> list[dict[str, Any]]:
    """Where a search starts: the preset itself, and the preset with AAND's hard-patch loss."""
    plain = _as_suggested(base)
    hard = plain | {"hkd_weight": 1.0}
    return [plain] if hard == plain else [plain, hard]


def _as_suggested(config: RunConfig) -> dict[str, Any]:
    fields = config.flat()
    asked = _Names()
    search_space(asked, config)
    values: dict[str, Any] = {}
    for name in asked.names:
        indexed = re.fullmatch(r"(.+)_(\d+)", name)
        values[name] = fields[name] if name in fields else fields[indexed[1]][int(indexed[2]) - 1]  # type: ignore[index]
    return values


class _Names:
    """Records which names the space asks for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.names.append(name)
        return low

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        self.names.append(name)
        return low

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.names.append(name)
        return choices[0]
