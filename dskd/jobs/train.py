"""Train a detector from images to its folder, from Python or by `dskd train`."""

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dskd.checkpoint import DetectorRecord, check_replaceable, write_detector
from dskd.config import DataSpec, RunConfig, TeacherSource
from dskd.data.cache import ArrayCache, default_folder
from dskd.data.datasets import find_categories
from dskd.detector import UNTRAINED_TEACHER, Detector
from dskd.device import computing_device
from dskd.presets import PRESETS, with_backbone
from dskd.show.overlays import preview_of
from dskd.show.training_bar import TrainingBar
from dskd.training.inputs import prepare
from dskd.training.loop import Step
from dskd.training.resume import has_state, training_folder
from dskd.training.run import IntervalResult, TrainingRun

Say = Callable[[str], object]


def train(
    data: "str | os.PathLike[str]",
    out: "str | os.PathLike[str]",
    *,
    category: str | None = None,
    preset: str = "dskd",
    config: RunConfig | None = None,
    teacher_weights: "str | os.PathLike[str]" = "hub",
    textures: "str | os.PathLike[str] | None" = None,
    region: str = "",
    device: str = "auto",
    restart: bool = False,
    on_line: Say = print,
    **fields: Any,
) -> Detector:
    """Train a detector on the good images of one category into the folder `out`, and load it.

    As `dskd train`: `data` is a folder of categories or one category; `fields` are those of the configuration, such as
    `steps=120` or `image_size=128`, and change the `preset`, or `config` where that is given. The same call continues a
    training that was interrupted. `on_line` is called with each line of progress.

    Raises ValueError or TypeError, in a sentence, on what cannot be trained on or with.
    """
    for name, given in (("data", data), ("out", out)):
        if not isinstance(given, str | os.PathLike):
            raise TypeError(f"{name} must be a folder's path, got {type(given).__name__} {given!r}.")
    teacher = TeacherSource(str(teacher_weights))
    if config is None:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
        backbone = fields.get("backbone") or teacher.backbone
        config = PRESETS[preset] if backbone is None else with_backbone(PRESETS[preset], backbone)
    settings = config.with_values(fields)
    teacher.check_fits(settings.model.backbone)
    spec = DataSpec(
        data=Path(data),
        category=category or only_category(Path(data), settings),
        teacher=teacher,
        textures=None if textures is None else Path(textures),
        region=region,
    )
    cache = ArrayCache(default_folder(), int(20e9))
    train_into(Path(out), settings, spec, device=device, cache=cache, restart=restart, say=on_line)
    return Detector.load(out, str(computing_device(device)))


def only_category(data: Path, settings: RunConfig) -> str:
    """The category in a folder that holds one; ValueError if it holds several."""
    categories = list(find_categories(data, settings.data.layout))
    if len(categories) > 1:
        raise ValueError(f"{data} holds several categories, choose one with --category: {', '.join(categories)}.")
    return categories[0]


class Trained(NamedTuple):
    """A finished training."""

    record: DetectorRecord
    history: Sequence[IntervalResult]


def train_into(
    out: Path,
    settings: RunConfig,
    spec: DataSpec,
    *,
    device: str,
    cache: ArrayCache | None,
    say: Say,
    restart: bool = False,
    checkpoint_seconds: float = 60.0,
) -> Trained:
    """Train to the end and write the detector folder `out`; continues an interrupted training unless `restart`.

    `say` is called with each line for people; the state is saved every `checkpoint_seconds`.
    """
    check_replaceable(out)
    place = computing_device(device)
    with training_folder(out, restart=restart) as unfinished:
        inputs = prepare(
            settings,
            spec,
            device=place,
            cache=cache,
            progress=True,
            on_amplification=lambda epoch: say(
                f"stage I epoch {epoch.number + 1:3d}/{settings.amplification.amplification_epochs}  "
                f"gate loss {epoch.gate_loss:.4f}  residual loss {epoch.residual_loss:.4f}  {epoch.seconds:.1f} s"
            ),
        )
        for note in inputs.notes:
            say(note)
        if spec.teacher.is_untrained:
            say(UNTRAINED_TEACHER)
        run = TrainingRun.begin(settings, inputs, place)
        if has_state(unfinished):
            run.restore(unfinished)
            say(f"going on after step {run.step} of {run.num_steps}, found in {unfinished}")
        _run_to_end(run, unfinished, checkpoint_seconds, say)
        record, weights = run.detector()
        write_detector(out, record, weights, preview_of(run, record))
    if record.metrics.get("val/score_candidates"):
        say(
            f"{record.metrics['val/score_candidates']:.0f} score configurations tried, the best of them "
            f"{'adopted' if record.metrics['val/score_adopted'] else 'not adopted'}: gain "
            f"{record.metrics['val/score_gain']:+.4f} ± {record.metrics['val/score_gain_error']:.4f} "
            "on validation images that did not choose it"
        )
    return Trained(record, run.history)


def _run_to_end(run: TrainingRun, unfinished: Path, checkpoint_seconds: float, say: Say) -> None:
    saved = time.monotonic()
    with TrainingBar(run, say) as bar:
        for event in run.steps():
            if isinstance(event, Step):
                bar.advance(event)
                continue
            interval, scores = event.interval, event.scores
            bar.say(
                f"step {interval.step:4d}/{run.num_steps}  loss {interval.loss:.4f}  "
                f"{interval.images_per_second:5.1f} images/s  val image AUROC {scores.image_auroc:.3f}"
                + ("" if math.isnan(scores.aupro) else f"  AUPRO {scores.aupro:.3f}")
            )
            if time.monotonic() - saved >= checkpoint_seconds:
                run.save(unfinished)
                saved = time.monotonic()
