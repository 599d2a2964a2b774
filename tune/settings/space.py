"""The search space: the configuration fields that trials vary, and their values.

A dimension has the name of its field, or `field_N` for the N-th weight of a field. In a search over several
presets each preset has its own dimensions, such as `stfpm.learning_rate`, and the preset of a trial is a
dimension too. So it is with teachers: each of several backbones has its own dimensions, such as
`resnet18.tv_in1k.learning_rate` or `stfpm.resnet18.tv_in1k.learning_rate`, and the backbone is a dimension.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol

from dskd.config import RunConfig, ScoreConfig
from dskd.presets import with_backbone

PRESET = "preset"
BACKBONE = "backbone"
_AT = "@"
"""Between preset and backbone in the name of a variant of a preset; no backbone's name contains it."""
_GEOMETRY = frozenset({"image_size", "resize", "tile", "overlap", "group_by"})
_MEASURED = _GEOMETRY | {"validation_fraction", "calibration_fraction", "folds", "fold", "split_seed", "layout"}
_STRUCTURE = frozenset({"levels", "student_encoder", "student_decoder"})
_LENGTH = frozenset({"steps", "epochs", "patience"})
SHARED = _MEASURED | _STRUCTURE | _LENGTH
"""Fields that set the measurement, the length or the network: equal in all trials of a preset."""
_ENCODER = frozenset(("encoder_match", "encoder_hkd_margin"))
_DECODER = frozenset(
    ("decoder_match", "decoder_hkd_margin", "decoder_input", "detach_embedding", "embedding_depth", "decoder_output")
)
_BOTH = frozenset(("decoder_weight", "encoder_score_weight", "decoder_score_weight", "student_fusion"))
_STAGE_ONE = frozenset(name for name in RunConfig().to_dict()["amplification"] if name != "amplification")


class Suggests(Protocol):
    """The methods of an Optuna trial, real or fixed, that the space calls."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


class Range(NamedTuple):
    """All values from `low` to `high`, both included; integers if both ends are `int`."""

    low: float
    high: float
    log: bool = False
    """Sampled uniformly on a logarithmic scale."""

    def holds(self, value: Any) -> bool:
        return not isinstance(value, bool | str) and bool(self.low <= value <= self.high)

    def nearest(self, value: Any) -> Any:
        return min(max(value, self.low), self.high)

    def ends(self) -> tuple[Any, ...]:
        return self.low, self.high


class Choice(NamedTuple):
    """One of several values; a single value is not varied: every trial has it."""

    options: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        return value in self.options

    def nearest(self, value: Any) -> Any:
        return value if value in self.options else self.options[0]

    def ends(self) -> tuple[Any, ...]:
        return self.options


Dimension = Range | Choice


def default_dimensions(base: RunConfig) -> dict[str, Dimension]:
    """Every parameter that affects the students of `base`, in ranges around its values.

    Whether the teacher is amplified is taken from `base`, because stage I is a separate training. A --space file
    can make it a dimension.
    """
    rate = base.train.learning_rate
    found: dict[str, Dimension] = {"learning_rate": Range(rate / 8, rate * 4, log=True)}
    for position in range(1, len(base.model.levels) + 1):
        found[f"level_weights_{position}"] = Range(0.1, 2.0)
        found[f"score_level_weights_{position}"] = Range(0.1, 2.0)
    found["level_fusion"] = Choice(("sum", "product"))
    found["blur_sigma"] = Range(0.0, 8.0)
    found["score_top_fraction"] = Range(0.0, 0.02)
    found["hkd_weight"] = Range(0.0, 2.0)
    found["hkd_hardest"] = Range(1, 100, log=True)
    found["encoder_hkd_margin"] = Range(0.0, 0.5)
    found["decoder_hkd_margin"] = Range(0.0, 0.5)
    found["embedding_depth"] = Range(1, 4)
    found["decoder_weight"] = Range(0.25, 4.0, log=True)
    found["encoder_score_weight"] = Range(0.0, 1.0)
    found["student_fusion"] = Choice(("sum", "product", "max", "noisy-or"))
    return {name: dimension for name, dimension in found.items() if has_effect(name, base)}


def has_effect(name: str, base: RunConfig) -> bool:
    """Whether the field `name` affects any part of the students or the teacher of `base`."""
    encoder, decoder = base.model.student_encoder, base.model.student_decoder
    return not (
        (name in _ENCODER and not encoder)
        or (name in _DECODER and not decoder)
        or (name in _BOTH and not (encoder and decoder))
        or (name in _STAGE_ONE and not base.amplification.amplification)
    )


def field_kind(name: str) -> type:
    """Type of the values of a dimension with this name: bool, int, float or str.

    Raises ValueError if a search cannot vary it.
    """
    fields = RunConfig().flat()
    if name in SHARED:
        raise ValueError(f"all trials share {name}; it is not part of a space.")
    indexed = re.fullmatch(r"(.+)_(\d+)", name)
    if name not in fields and indexed and isinstance(fields.get(indexed[1]), tuple) and indexed[1] not in SHARED:
        return float
    if name not in fields:
        known = ", ".join(sorted(_spelled(field) for field in fields.keys() - SHARED))
        raise ValueError(f"unknown field; known: {known}.")
    if isinstance(fields[name], tuple):
        raise ValueError(f"has an entry for each level: {name}_1, {name}_2, ….")
    return type(fields[name])


def _spelled(field: str) -> str:
    return f"{field}_N" if isinstance(RunConfig().flat()[field], tuple) else field


def with_suggestions(base: RunConfig, suggested: Mapping[str, Any]) -> RunConfig:
    """`base` with the values that its space suggested.

    Raises ValueError on an unknown name or weight number.
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


class _Draw:
    """A random point of a space, in the part of an Optuna trial."""

    def __init__(self, rng: random.Random, space: "Space") -> None:
        self._rng = rng
        self.values: dict[str, Any] = {}
        space.ask(self)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        value = math.exp(self._rng.uniform(math.log(low), math.log(high))) if log else self._rng.uniform(low, high)
        self.values[name] = min(max(value, low), high)
        return float(self.values[name])

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        self.values[name] = round(self.suggest_float(name, low, high, log=log))
        return int(self.values[name])

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.values[name] = self._rng.choice(choices)
        return self.values[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Search space of one category."""

    bases: Mapping[str, RunConfig]
    """Configuration that the dimensions vary, by preset, or by `preset@backbone` for a preset of several backbones; at
    least one."""
    dimensions: Mapping[str, Mapping[str, Dimension]]
    """Dimensions by the names of `bases`, and by their own."""
    winners: tuple[Mapping[str, Any], ...] = ()
    """Best points of earlier searches, tried after the presets."""
    shared: tuple[Mapping[str, Any], ...] = ()
    """Points that other categories of the search try too, among the first; none in a search of one category."""

    def ask(self, trial: Suggests) -> None:
        """Let `trial` suggest a preset and a backbone, if there are several, and values for all their dimensions."""
        chosen: dict[str, Any] = {}
        if len(presets := self._presets()) > 1:
            chosen[PRESET] = trial.suggest_categorical(PRESET, presets)
        preset = self.preset_of(chosen)
        if len(backbones := self._backbones(preset)) > 1:
            name = self._backbone_name(preset)
            chosen[name] = trial.suggest_categorical(name, backbones)
        variant = self.variant_of(chosen)
        for name, dimension in self.dimensions[variant].items():
            full = self._full_name(variant, name)
            if isinstance(dimension, Choice):
                trial.suggest_categorical(full, list(dimension.options))
            elif isinstance(dimension.low, int) and isinstance(dimension.high, int):
                trial.suggest_int(full, dimension.low, dimension.high, log=dimension.log)
            else:
                trial.suggest_float(full, dimension.low, dimension.high, log=dimension.log)

    def preset_of(self, suggested: Mapping[str, Any]) -> str:
        """The preset of a trial, from its suggested values."""
        return str(suggested.get(PRESET, self._presets()[0]))

    def configuration(self, suggested: Mapping[str, Any]) -> RunConfig:
        """Configuration of the run with a trial's suggested values.

        Raises ValueError on an unknown name.
        """
        variant = self.variant_of(suggested)
        prefix = self._full_name(variant, "")
        choices = {PRESET, self._backbone_name(self.preset_of(suggested))}
        values = {name.removeprefix(prefix): value for name, value in suggested.items() if name not in choices}
        return with_suggestions(self.bases[variant], values)

    def base_of(self, suggested: Mapping[str, Any]) -> RunConfig:
        """The untuned configuration that a trial varies."""
        return self.bases[self.variant_of(suggested)]

    def starting_points(self) -> list[dict[str, Any]]:
        """The points that a search tries first, each once.

        In this order: each preset, each preset with AAND's hard-patch loss, the winners, each preset with its learning
        rate doubled, then halved, then the shared points. All but some of the last are small steps from good values,
        while a sampler without results would draw all dimensions at random. A preset value outside its dimension is
        replaced by the nearest value inside.
        """
        points: list[dict[str, Any]] = []
        first, then = self._small_steps()
        for point in [*first, *map(dict, self.winners), *then, *map(dict, self.shared)]:
            if point not in points:
                points.append(point)
        return points

    def _small_steps(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The presets and points near them, before and after the winners."""
        return (
            [*self._untuned(), *self._changed("hkd_weight", lambda value: 1.0)],
            [
                *self._changed("learning_rate", lambda value: 2 * value),
                *self._changed("learning_rate", lambda value: value / 2),
            ],
        )

    def shareable_points(self, count: int, seed: int) -> list[dict[str, Any]]:
        """At most `count` points that every category with such a space can try: those near the presets, then random
        ones, which depend on `seed` alone.
        """
        first, then = self._small_steps()
        points: list[dict[str, Any]] = []
        for point in [*first, *then]:
            if point not in points:
                points.append(point)
        rng = random.Random(seed)
        drawn = (_Draw(rng, self) for _ in range(count - len(points)))
        return [*points, *(each.values for each in drawn)][:count]

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether a point has a value for each of this space's dimensions, inside of it, and no others."""
        variant = self.variant_of(point)
        if variant not in self.dimensions:
            return False
        wanted = {self._full_name(variant, name): dimension for name, dimension in self.dimensions[variant].items()}
        chosen = self._choices(variant)
        return point.keys() == wanted.keys() | chosen.keys() and all(
            dimension.holds(point[name]) for name, dimension in wanted.items()
        )

    def is_shared(self, suggested: Mapping[str, Any]) -> bool:
        """Whether other categories of the search try this point too."""
        return any(point.items() <= suggested.items() for point in self.shared)

    def _changed(self, name: str, change: Callable[[float], float]) -> list[dict[str, Any]]:
        """Each preset with the value `name` changed, if that is a dimension."""
        return [
            self._point(preset, base.with_values({name: change(base.flat()[name])}), move=True)
            for preset, base in self.bases.items()
            if name in self.dimensions[preset]
        ]

    def is_untuned(self, suggested: Mapping[str, Any]) -> bool:
        """Whether a trial is one of the presets, unchanged."""
        return any(point.items() <= suggested.items() for point in self._untuned())

    def role_of(self, suggested: Mapping[str, Any]) -> Literal["preset", "start-from", "trial"]:
        """Whether a trial is an untuned preset, or the champion of an earlier search."""
        if self.is_untuned(suggested):
            return "preset"
        return "start-from" if any(point.items() <= suggested.items() for point in self.winners) else "trial"

    def point_of(self, config: RunConfig) -> dict[str, Any]:
        """The point with the configuration `config`; length, image size and batch size are ignored.

        Parameters of the score outside of the space are replaced by the nearest inside. Raises ValueError with the
        reason if another lies outside this space.
        """
        obstacles = {preset: list(self._obstacles(preset, config)) for preset in self.bases}
        preset = min(obstacles, key=lambda name: len(obstacles[name]))
        if obstacles[preset]:
            raise ValueError(obstacles[preset][0])
        return self._point(preset, config, move=False)

    def to_plain(self) -> dict[str, Any]:
        """Plain nested values for JSON; two spaces are equal if these are."""
        return {
            "bases": {preset: base.to_dict() for preset, base in self.bases.items()},
            "dimensions": {
                preset: {name: dimension._asdict() for name, dimension in dimensions.items()}
                for preset, dimensions in self.dimensions.items()
            },
        }

    def _presets(self) -> list[str]:
        return list(dict.fromkeys(variant.partition(_AT)[0] for variant in self.bases))

    def _backbones(self, preset: str) -> list[str]:
        """Backbones to choose from with this preset; empty if there is only one."""
        names = [variant.partition(_AT) for variant in self.bases]
        return [backbone for own, _, backbone in names if own == preset and backbone]

    def _backbone_name(self, preset: str) -> str:
        return f"{preset}.{BACKBONE}" if len(self._presets()) > 1 else BACKBONE

    def variant_of(self, suggested: Mapping[str, Any]) -> str:
        """The name in `bases` of a trial's configuration, from its suggested values."""
        preset = self.preset_of(suggested)
        backbone = suggested.get(self._backbone_name(preset))
        return preset if backbone is None else f"{preset}{_AT}{backbone}"

    def _choices(self, variant: str) -> dict[str, Any]:
        """The part of a point that chooses this variant."""
        preset, _, backbone = variant.partition(_AT)
        chosen: dict[str, Any] = {PRESET: preset} if len(self._presets()) > 1 else {}
        return chosen | ({self._backbone_name(preset): backbone} if backbone else {})

    def _full_name(self, variant: str, name: str) -> str:
        preset, _, backbone = variant.partition(_AT)
        return ".".join([*([preset] if len(self._presets()) > 1 else []), *([backbone] if backbone else []), name])

    def describe(self) -> dict[str, str]:
        """Every dimension as readable text, by its full name."""
        found: dict[str, str] = {}
        if len(presets := self._presets()) > 1:
            found[PRESET] = " | ".join(presets)
        for variant, dimensions in self.dimensions.items():
            preset = variant.partition(_AT)[0]
            if backbones := self._backbones(preset):
                found[self._backbone_name(preset)] = " | ".join(backbones)
            for name, dimension in dimensions.items():
                if isinstance(dimension, Range):
                    text = f"{dimension.low:g} … {dimension.high:g}{' (log)' if dimension.log else ''}"
                else:
                    text = " | ".join(map(str, dimension.options))
                found[self._full_name(variant, name)] = text
        return found

    def _untuned(self) -> list[dict[str, Any]]:
        return [self._point(preset, base, move=True) for preset, base in self.bases.items()]

    def _point(self, preset: str, config: RunConfig, *, move: bool) -> dict[str, Any]:
        point = self._choices(preset)
        values = _values(config)
        for name, dimension in self.dimensions[preset].items():
            value = values[name]
            is_moved = move or _is_of_score(name)
            point[self._full_name(preset, name)] = dimension.nearest(value) if is_moved else value
        return point

    def _obstacles(self, preset: str, config: RunConfig) -> Iterator[str]:
        base, dimensions = self.bases[preset], self.dimensions[preset]
        if config.model.levels != base.model.levels:
            yield f"levels are {config.model.levels} there and {base.model.levels} here"
            return
        able = base.with_values({"amplification": True}) if "amplification" in dimensions else base
        ignored = _MEASURED | _LENGTH | {"batch_size"}
        values = _values(config)
        for name, here in _values(base).items():
            there = values[name]
            if name in dimensions:
                if not (dimensions[name].holds(there) or _is_of_score(name)):
                    yield f"{name} {there!r} lies outside {dimensions[name]}"
            elif name not in ignored and here != there and has_effect(name, able):
                yield f"{name} is {there!r} there and {here!r} here"


def _values(config: RunConfig) -> dict[str, Any]:
    """Values by dimension name, each weight separately."""
    values: dict[str, Any] = {}
    for field, value in config.flat().items():
        if isinstance(value, tuple) and field not in SHARED:
            values |= {f"{field}_{position}": weight for position, weight in enumerate(value, 1)}
        else:
            values[field] = value
    return values


def _is_of_score(dimension: str) -> bool:
    """Whether a dimension affects scores and not the students: free trials look for it after training, in wider ranges.

    A champion often has such a value outside of the space; the nearest inside trains the same students.
    """
    known = {field.name for field in fields(ScoreConfig)}
    return dimension in known or re.sub(r"_\d+$", "", dimension) in known


def describe_changes(config: RunConfig, presets: Mapping[str, RunConfig], most: int | None = None) -> str:
    """The fields in which a configuration differs from the closest preset, as text; of more than `most` the number.

    "dskd untuned" if it is that preset.
    """
    found = config.flat()
    differences = {
        preset: [f"{name} {_short(value)}" for name, value in found.items() if value != base.flat()[name]]
        for preset, base in presets.items()
    }
    preset = min(differences, key=lambda name: len(differences[name]))
    changed = differences[preset]
    if most is not None and len(changed) > most:
        changed = [*changed[:most], f"{len(changed) - most} more"]
    return f"{preset} with {', '.join(changed)}" if changed else f"{preset} untuned"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def usual_teacher(base: RunConfig, preset: str, backbone: str) -> RunConfig:
    """The configuration of a preset with another backbone, and with what goes with that backbone's family."""
    return with_backbone(base, backbone)


def build_space(
    bases: Mapping[str, RunConfig],
    entries: Mapping[str, Mapping[str, Dimension]] | None = None,
    with_teacher: Callable[[RunConfig, str, str], RunConfig] = usual_teacher,
) -> Space:
    """The default space around each preset's configuration; `entries`, by preset, replace its dimensions.

    An entry for a part that a preset's network lacks is left out for that preset. An entry `backbone` makes a variant
    of the preset for each backbone, whose configuration `with_teacher` gives from that of the preset, its name and the
    backbone. Raises ValueError if an entry has no effect on any preset, or if entries, alone or together, give an
    invalid configuration.
    """
    asked: list[str] = []
    found: dict[str, RunConfig] = {}
    dimensions: dict[str, dict[str, Dimension]] = {}
    useless: dict[str, int] = {}
    for preset, base, mine in _variants(bases, entries or {}, with_teacher):
        asked += mine
        for name, entry in mine.items():
            for value in entry.ends():
                try:
                    with_suggestions(base, {name: value})
                except ValueError as error:
                    raise ValueError(f"{name} = {value!r} with preset {preset}: {error}") from None
        stage_one = any(mine.get("amplification", Choice((base.amplification.amplification,))).ends())
        able = base.with_values({"amplification": stage_one})
        for name in [name for name in mine if not has_effect(name, able)]:
            del mine[name]
            useless[name] = useless.get(name, 0) + 1
        fixed = {name: entry.ends()[0] for name, entry in mine.items() if len(set(entry.ends())) == 1}
        found[preset] = _checked(preset, base, fixed)
        dimensions[preset] = {**default_dimensions(found[preset]), **mine}
        for name in fixed:
            del dimensions[preset][name]
        _check_corners(preset, found[preset], dimensions[preset])
    if nowhere := [name for name, count in useless.items() if count == asked.count(name)]:
        raise ValueError(f"{nowhere[0]} has no effect with --preset {','.join(bases)}; leave it out.")
    return Space(bases=found, dimensions=dimensions)


def _variants(
    bases: Mapping[str, RunConfig],
    entries: Mapping[str, Mapping[str, Dimension]],
    with_teacher: Callable[[RunConfig, str, str], RunConfig],
) -> Iterator[tuple[str, RunConfig, dict[str, Dimension]]]:
    """Name, configuration and entries of each preset, or of each of its variants if there are several backbones."""
    sizes: dict[tuple[tuple[int, int], int], str] = {}
    for preset, base in bases.items():
        mine = dict(entries.get(preset, {}))
        backbones = mine.pop(BACKBONE, Choice((base.model.backbone,))).ends()
        for backbone in backbones:
            name = preset if len(backbones) == 1 else f"{preset}{_AT}{backbone}"
            try:
                own = base if backbone == base.model.backbone else with_teacher(base, preset, backbone)
            except ValueError as error:
                raise ValueError(f"{BACKBONE} = {backbone!r} with preset {preset}: {error}") from None
            sizes.setdefault((own.data.input_size, own.data.shared(own.model.tile_alignment)), backbone)
            if len(sizes) > 1:
                raise ValueError(_two_sizes(sizes))
            yield name, own, dict(mine)


def _two_sizes(sizes: Mapping[tuple[tuple[int, int], int], str]) -> str:
    """Why teachers with different inputs cannot be compared: input (width, height) and overlap, each with its first."""
    (one, first), (other, second) = sizes.items()
    if one[0] == other[0]:
        return (
            f"trials of one category must have one overlap of tiles, got {one[1]} for {first} and {other[1]} for "
            f"{second}; give an --overlap that suits both, such as 0."
        )
    return (
        f"trials of one category must have one image size, got {one[0][0]} for {first} and {other[0][0]} for {second}; "
        "give an --image-size that suits both, such as 224."
    )


def _check_corners(preset: str, base: RunConfig, dimensions: Mapping[str, Dimension]) -> None:
    """Check the ends of all ranges and every choice: there fields restrict each other most."""
    for end in (0, -1):
        corner = {name: dimension.ends()[end] for name, dimension in dimensions.items()}
        _checked(preset, base, corner)
        for name, dimension in dimensions.items():
            for option in dimension.ends() if isinstance(dimension, Choice) else ():
                _checked(preset, base, corner | {name: option})


def _checked(preset: str, base: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    try:
        return with_suggestions(base, values)
    except ValueError as error:
        raise ValueError(f"with preset {preset}: {error}") from None
