"""The command line: `dskd demo-data | check-data | train | evaluate | predict | export`.

What people read goes to stderr; stdout carries results, with --json one JSON document and nothing
else. torch is imported only by the commands that compute, so that help comes at once.
"""

import functools
import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from dskd.arguments import UsageError, default_config, parse
from dskd.cli.output import (
    describe_thresholds,
    epoch_document,
    print_json,
    print_report,
    print_scores,
    say,
    to_json_line,
)
from dskd.config import RunConfig
from dskd.presets import Preset

if TYPE_CHECKING:
    from dskd.detector import Detector
    from dskd.training.run import TrainingRun


def demo_data(out: Positional[Annotated[Path, arg(metavar="OUT")]], /, *, seed: int = 0) -> None:
    """Draw three product categories with good and defective images (MVTec AD layout).

    Args:
        out: Folder to make.
        seed: Another seed draws other images.
    """
    from dskd.demo.dataset import draw_dataset

    draw_dataset(out, seed=seed)
    say(f"drew {out}; train on it with: dskd train --data {out} --category <name> --out detector")


def check_data(path: Positional[Path], /, *, image_size: int = 256, json: bool = False) -> None:
    """Read a data folder as training would, and name everything that is wrong with it; exit code 1 if that stops it.

    Categories may lie in the layout of MVTec AD, MVTec 3D-AD, BTAD, VisA or MT Defects, or as plain folders
    (good/, optional test/<good or defect>/ and ground_truth/<defect>/), at PATH or up to three levels below.

    Args:
        path: Folder of categories, or one category.
        image_size: Size at which to look for defects that vanish when their mask is resized.
        json: Print one JSON document.
    """
    from dskd.data.check import check_data

    report = check_data(path, image_size, progress=True)
    if json:
        print_json(report.to_document())
    else:
        print_report(report)
    if not report.is_trainable:
        sys.exit(1)


def train(
    *,
    data: Path,
    out: Path,
    settings: Annotated[RunConfig, OmitArgPrefixes],
    category: str | None = None,
    config: Path | None = None,
    preset: Preset = "dskd",
    print_config: bool = False,
    textures: Path | None = None,
    teacher_weights: str = "hub",
    device: str = "auto",
    restart: bool = False,
    checkpoint_seconds: float = 60.0,
    cache_dir: Path | None = None,
    cache_gb: float = 20.0,
    json: bool = False,
) -> None:
    """Train a detector on the good images of one category.

    The same command again goes on where a killed one stopped.

    Args:
        data: Folder of categories, or one category; dskd check-data names the layouts.
        out: Detector folder to write.
        settings: What the run is.
        category: Which category; may be left out where the folder holds one.
        config: TOML file of the fields below, in sections as --print-config writes them; flags stand above it.
        preset: Method whose configuration the file and the other flags change.
        print_config: Print the configuration as TOML, and train nothing.
        textures: Folder of images, such as DTD, that feed the synthetic defects; else textures are drawn.
        teacher_weights: hub, a .safetensors or .pth file, or random (untrained, for wiring tests).
        device: auto, cpu, cuda or cuda:N.
        restart: Throw away what an interrupted training into the same folder had reached.
        checkpoint_seconds: Training that a kill may cost, or one epoch where that takes longer; 0: save every epoch.
        cache_dir: Folder of decoded images and teacher features, shared by all runs.
        cache_gb: Size in GB that the cache may reach; 0 turns it off.
        json: Print one JSON document with the validation figures and every epoch's losses.
    """
    if print_config:
        from dskd.presets import to_toml

        print(to_toml(settings), end="")
        return
    from dskd.checkpoint import check_replaceable, write_detector
    from dskd.data.cache import ArrayCache, default_folder
    from dskd.data.datasets import find_categories
    from dskd.detector import UNTRAINED_TEACHER
    from dskd.device import computing_device
    from dskd.show.overlays import preview_of
    from dskd.training.inputs import prepare
    from dskd.training.resume import has_state, training_folder
    from dskd.training.run import TrainingRun

    check_replaceable(out)
    if checkpoint_seconds < 0:
        raise ValueError(f"--checkpoint-seconds must not be negative, got {checkpoint_seconds:g}.")
    if category is None:
        categories = list(find_categories(data))
        if len(categories) > 1:
            raise ValueError(f"{data} holds several categories, choose one with --category: {', '.join(categories)}.")
        category = categories[0]
    place = computing_device(device)
    cache = ArrayCache(cache_dir or default_folder(), int(cache_gb * 1e9)) if cache_gb > 0 else None
    with training_folder(out, restart=restart) as unfinished:
        inputs = prepare(
            settings.data,
            settings.model.backbone,
            settings.model.levels,
            data=data,
            category=category,
            teacher_weights=teacher_weights,
            device=place,
            cache=cache,
            textures=textures,
            progress=True,
            amplification=settings.amplification,
            on_amplification=lambda epoch: say(
                f"stage I epoch {epoch.number + 1:3d}/{settings.amplification.amplification_epochs}  "
                f"gate loss {epoch.gate_loss:.4f}  residual loss {epoch.residual_loss:.4f}  {epoch.seconds:.1f} s"
            ),
        )
        for note in inputs.notes:
            say(note)
        if inputs.teacher_source == "random":
            say(UNTRAINED_TEACHER)
        run = TrainingRun.begin(settings, inputs, place)
        if has_state(unfinished):
            run.restore(unfinished)
            say(f"going on after epoch {run.next_epoch} of {settings.train.epochs}, found in {unfinished}")
        _train(run, unfinished, checkpoint_seconds)
        record, weights = run.detector()
        write_detector(out, record, weights, preview_of(run, record))
    if record.metrics.get("val/score_candidates"):
        say(
            f"{record.metrics['val/score_candidates']:.0f} score configurations tried, the best of them "
            f"{'adopted' if record.metrics['val/score_adopted'] else 'not adopted'}: gain "
            f"{record.metrics['val/score_gain']:+.4f} ± {record.metrics['val/score_gain_error']:.4f} "
            "on validation images that did not choose it"
        )
    say(f"wrote {out}: epoch {record.epoch + 1}, {describe_thresholds(record)}")
    if json:
        print_json(
            {
                "detector": str(out),
                "category": category,
                "teacher": record.teacher,
                "epoch": record.epoch,
                "false_alarm_rates": record.guarantee,
                **record.metrics,
                "history": [epoch_document(progress) for progress in run.history],
            }
        )


def _train(run: "TrainingRun", unfinished: Path, checkpoint_seconds: float) -> None:
    """Train to the last epoch, telling how it goes, and now and then saving how far it is."""
    from dskd.show.training_bar import TrainingBar
    from dskd.training.loop import Step

    saved = time.monotonic()
    with TrainingBar(run) as bar:
        for event in run.steps():
            if isinstance(event, Step):
                bar.advance(event)
                continue
            epoch, scores = event.epoch, event.scores
            bar.say(
                f"epoch {epoch.number + 1:3d}/{run.config.train.epochs}  loss {epoch.loss:.4f}  "
                f"{epoch.images_per_second:5.1f} images/s  val image AUROC {scores.image_auroc:.3f}  "
                f"AUPRO {scores.aupro:.3f}"
            )
            if time.monotonic() - saved >= checkpoint_seconds:
                run.save(unfinished)
                saved = time.monotonic()


def evaluate(
    detector: Positional[Annotated[Path, arg(metavar="DETECTOR")]],
    /,
    *,
    data: Path,
    category: str | None = None,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Measure a detector on the labelled test images of a category.

    Args:
        detector: Detector folder.
        data: Folder of categories, or one category.
        category: Which category; the detector's own unless given.
        device: auto, cpu, cuda or cuda:N.
        json: Print one JSON document.
    """
    loaded = _load(detector, device)
    scores = loaded.evaluate(data, category or loaded.record.category, say)
    if json:
        print_json(
            {
                "category": category or loaded.record.category,
                "teacher": loaded.record.teacher,
                # JSON has no NaN, which the pixel figures are where no mask has a defect pixel.
                **{name: value if math.isfinite(value) else None for name, value in scores._asdict().items()},
            }
        )
    else:
        print_scores(scores)


def predict(
    detector: Positional[Annotated[Path, arg(metavar="DETECTOR")]],
    images: Positional[Annotated[tuple[Path, ...], arg(metavar="IMAGES…")]],
    /,
    *,
    out: Path,
    false_alarm_rate: float = 0.01,
    threshold: float | None = None,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Inspect images: a verdict for each, with the anomalous regions drawn.

    Args:
        detector: Detector folder.
        images: Image files, or folders that are searched for them.
        out: Folder for predictions.jsonl and an overlay per image.
        false_alarm_rate: Share of good images that may be called anomalous, in (0, 1).
        threshold: Score above which an image is anomalous, instead of the calibrated one.
        device: auto, cpu, cuda or cuda:N.
        json: Print one JSON document.
    """
    from dskd.atomic import folder_in_making
    from dskd.detector import UNTRAINED_TEACHER, chosen_limit
    from dskd.show.overlays import overlay

    if out.exists():
        raise ValueError(f"{out} exists; choose another --out, results are never overwritten.")
    loaded = _load(detector, device)
    paths = _image_files(images)
    limit, note = chosen_limit(loaded, false_alarm_rate, threshold)
    verdicts: list[dict[str, Any]] = []
    with folder_in_making(out) as folder:
        for index, seen in enumerate(loaded.predict(paths, limit)):
            picture = f"overlays/{index:05d}_{seen.path.parent.name}_{seen.path.stem}.png"
            (folder / "overlays").mkdir(exist_ok=True)
            overlay(seen, UNTRAINED_TEACHER if loaded.record.is_untrained_teacher else "").save(folder / picture)
            verdict = "anomalous" if seen.is_anomalous else "good"
            verdicts.append(
                {
                    "image": str(seen.path),
                    "score": seen.score,
                    "threshold": seen.threshold,
                    "verdict": verdict,
                    "regions": [region._asdict() for region in seen.regions] if seen.is_anomalous else [],
                    "map_size": loaded.record.config.data.image_size,
                    "overlay": picture,
                    "teacher": loaded.record.teacher,
                }
            )
            if not json:
                print(f"{verdict:9}  {seen.score:10.4g}  {seen.path}")
        lines = "".join(to_json_line(verdict) + "\n" for verdict in verdicts)
        (folder / "predictions.jsonl").write_text(lines)
    num_anomalous = sum(verdict["verdict"] == "anomalous" for verdict in verdicts)
    say(f"{num_anomalous} of {len(verdicts)} anomalous; {note}; overlays in {out / 'overlays'}")
    if json:
        print_json(
            {
                "out": str(out),
                "num_anomalous": num_anomalous,
                "false_alarm_rates": loaded.record.guarantee,
                "predictions": verdicts,
            }
        )


def export(
    detector: Positional[Annotated[Path, arg(metavar="DETECTOR")]],
    /,
    *,
    onnx: Path,
    images: tuple[Path, ...] = (),
    opset: int = 18,
    json: bool = False,
) -> None:
    """Write a detector as an ONNX graph, from RGB bytes to maps and scores, that agrees with it.

    Args:
        detector: Detector folder.
        onnx: File to write; an older export of that name is replaced.
        images: Image files or folders on which both must agree; generated ones unless given.
        opset: ONNX operator set, 18 to 25.
        json: Print one JSON document.
    """
    from dskd.data.images import load_images
    from dskd.export import INPUT, OUTPUTS, ParityError, check_exportable, export_onnx, generated_images

    check_exportable(onnx, opset)
    loaded = _load(detector, "cpu")
    size = loaded.record.config.data.image_size
    pixels = load_images(_image_files(images), size) if images else generated_images(size)
    source = "given" if images else "generated"
    try:
        parity = export_onnx(loaded, onnx, pixels, opset)
    except ParityError as error:
        say(f"dskd: export failed, nothing was written: {error}")
        sys.exit(1)
    say(
        f"compared on {parity.num_images} {source} images, in batches of {', '.join(map(str, parity.batch_sizes))}: "
        f"maps differ by at most {parity.map_error:.1e} of their highest value, scores by {parity.score_error:.1e}"
    )
    for verdicts in parity.verdicts:
        note = f", {verdicts.num_undecided} too close to call" if verdicts.num_undecided else ""
        say(f"threshold {verdicts.threshold:.4g}: same verdicts, {verdicts.num_anomalous} anomalous{note}")
    say(f"wrote {onnx}: opset {opset}, {INPUT} uint8 (B, {size}, {size}, 3) to {' and '.join(OUTPUTS)}")
    if json:
        print_json(
            {
                "onnx": str(onnx),
                "opset": opset,
                "category": loaded.record.category,
                "teacher": loaded.record.teacher,
                "image_size": size,
                "images": source,
                **parity._asdict(),
                "verdicts": [verdicts._asdict() for verdicts in parity.verdicts],
            }
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends with one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the names of files need not be text
    try:
        if given[:1] == ["train"] and {"--print-config", "--print_config"} & set(given):
            # Nothing is read and nothing written: neither folder needs to be named.
            given[1:1] = ["--data", ".", "--out", "."]
        commands: dict[str, Callable[..., None]] = {
            "demo-data": demo_data,
            "check-data": check_data,
            "train": functools.partial(train, settings=default_config(given)),
            "evaluate": evaluate,
            "predict": predict,
            "export": export,
        }
        run = parse(commands, given, prog="dskd", description="Visual anomaly detection by knowledge distillation.")
        run()
    except UsageError as error:
        say(str(error))
        sys.exit(2)
    except (ValueError, FloatingPointError, OSError) as error:
        say(f"dskd: error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("dskd: interrupted")
        sys.exit(130)


def _load(folder: Path, device: str) -> "Detector":
    from dskd.detector import UNTRAINED_TEACHER, Detector
    from dskd.device import computing_device

    detector = Detector.load(folder, str(computing_device(device)))
    if detector.record.is_untrained_teacher:
        say(UNTRAINED_TEACHER)
    return detector


def _image_files(given: Sequence[Path]) -> list[Path]:
    from dskd.data.files import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"image {path} does not exist.")
    if not files:
        raise ValueError("no image given; name image files or folders after the detector.")
    return files
