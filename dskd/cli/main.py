"""The command line: `dskd demo-data | check-data | train | evaluate | predict | compare | export | report`.

What people read goes to stderr; stdout carries results, with --json one JSON document and nothing
else. torch is imported only by the commands that compute, so that help comes at once.
"""

import contextlib
import dataclasses
import functools
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from dskd.arguments import ConfigSource, UsageError, given_length, parse, parse_known
from dskd.cli.examples import EXAMPLES
from dskd.cli.output import (
    describe_thresholds,
    evaluation_document,
    interval_document,
    print_evaluation,
    print_json,
    print_report,
    say,
    show,
    training_document,
)
from dskd.config import VERSION, DataSpec, LayoutName, RunConfig, TeacherSource
from dskd.presets import PRESETS, Preset

if TYPE_CHECKING:
    from dskd.detector import Detector, Prediction, Unreadable


def demo_data(out: Positional[Annotated[Path, arg(metavar="OUT")]], /, *, seed: int = 0) -> None:
    """Draw three product categories with good and defective images (MVTec AD layout).

    Args:
        out: Folder to make.
        seed: Another seed draws other images.
    """
    from dskd.demo.dataset import draw_dataset

    draw_dataset(out, seed=seed)
    say(f"drew {out}; train on it with: dskd train --data {out} --category <name> --out detector")


def check_data(
    path: Positional[Path],
    /,
    *,
    image_size: int = 256,
    layout: LayoutName = "auto",
    preset: Preset = "dskd",
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    time: bool = True,
    max_megapixels: float | None = None,
    json: bool = False,
) -> None:
    """Read a data folder as training does and list its problems; exit code 1 if it cannot be trained on.

    It also says how many steps a training of each category has, and measures how long they take here.

    Categories may lie in the layout of MVTec AD, MVTec 3D-AD, BTAD, VisA or MT Defects, or as plain folders
    (good/, optional test/<good or defect>/ and ground_truth/<defect>/), at PATH or up to three levels below.

    Args:
        path: Folder of categories, or one category.
        image_size: Image size of training; a defect whose mask vanishes at this size is reported.
        layout: auto, or classes for a folder of class folders (one-class novelty).
        preset: Method of the training that is forecast.
        steps: Its length; by default the preset's.
        epochs: Its length in passes over the images instead.
        batch_size: Images of one of its steps; by default the preset's.
        time: Measure a step, which takes some seconds; validations, and stage I of aand, are not counted.
        max_megapixels: Larger images are refused as decompression bombs; 512, or $DSKD_MAX_MEGAPIXELS, unless given.
        json: Print one JSON document.
    """
    from dskd.data.check import check_data

    _allow_megapixels(max_megapixels)
    changes = given_length(steps, epochs) | {"image_size": image_size}
    config = PRESETS[preset].with_values(changes if batch_size is None else changes | {"batch_size": batch_size})
    report = check_data(path, image_size, layout, progress=True)
    seconds = _step_seconds(config) if time and report.is_trainable else None
    training = training_document(report, config, seconds)
    if json:
        print_json(report.to_document() | {"training": training})
    else:
        print_report(report, training)
    if not report.is_trainable:
        sys.exit(1)


def _step_seconds(config: RunConfig) -> float | None:
    """Seconds of a step on this machine's GPU, or on its CPU if it has none; None if it cannot hold a batch.

    Then it says so.
    """
    import torch

    from dskd.device import computing_device
    from dskd.training.speed import untrained_step_speed

    try:
        return untrained_step_speed(config, computing_device("auto")).seconds
    except torch.OutOfMemoryError:
        say("a batch does not fit into the memory of this machine's GPU; lower --batch-size or --image-size")
        return None


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
    exclude: Path | None = None,
    region: str = "",
    teacher_weights: str = "hub",
    device: str = "auto",
    max_megapixels: float | None = None,
    restart: bool = False,
    checkpoint_seconds: float = 60.0,
    cache_dir: Path | None = None,
    cache_gb: float = 20.0,
    json: bool = False,
) -> None:
    """Train a detector on the good images of one category.

    After an interruption the same command resumes the training.

    Args:
        data: Folder of categories, or one category; dskd check-data names the layouts.
        out: Detector folder to write.
        settings: What the run is.
        category: Which category; may be left out where the folder holds one.
        config: TOML file of the fields below, in sections as --print-config writes them; flags override it.
        preset: Method to start from; the file and the other flags change it.
        print_config: Print the configuration as TOML, and train nothing.
        textures: Folder of images, such as DTD, that feed the synthetic defects; else textures are drawn.
        exclude: Text file with the names of good images to leave out, one per line: file names, or ends of paths.
        region: Region of interest in pixels of the original images: LEFT,TOP,RIGHT,BOTTOM, or "X,Y X,Y X,Y …", or a
            mask image, white inside; else region.png or region.txt in the category's folder. Outside nothing counts.
        teacher_weights: hub, lite0 (EfficientNet-Lite0 from an installed package), a .safetensors or .pth file, or
            random (untrained, for wiring tests).
        device: auto, cpu, cuda or cuda:N.
        max_megapixels: Larger images are refused as decompression bombs; 512, or $DSKD_MAX_MEGAPIXELS, unless given.
        restart: Discard the saved state of an interrupted training into the same folder.
        checkpoint_seconds: Seconds between saves of the training state; a save follows a validation, with 0 each.
        cache_dir: Folder of decoded images and teacher features, shared by all runs.
        cache_gb: Size in GB that the cache may reach; 0 turns it off.
        json: Print one JSON document with the validation figures and the losses up to each validation.
    """
    _allow_megapixels(max_megapixels)
    TeacherSource(teacher_weights).check_fits(settings.model.backbone)
    if print_config:
        from dskd.presets import to_toml

        print(to_toml(settings), end="")
        return
    from dskd.data.cache import ArrayCache, default_folder
    from dskd.detector import rates_of
    from dskd.jobs.train import only_category, train_into

    if checkpoint_seconds < 0:
        raise ValueError(f"--checkpoint-seconds must not be negative, got {checkpoint_seconds:g}.")
    category = category or only_category(data, settings)
    teacher = TeacherSource(teacher_weights).of(settings.model.backbone)
    record, history = train_into(
        out,
        settings,
        DataSpec(
            data=data,
            category=category,
            teacher=teacher,
            textures=textures,
            region=region,
            exclude=_exclusions(exclude, data, category, settings),
        ),
        device=device,
        cache=ArrayCache(cache_dir or default_folder(), int(cache_gb * 1e9)) if cache_gb > 0 else None,
        say=say,
        restart=restart,
        checkpoint_seconds=checkpoint_seconds,
    )
    say(f"wrote {out}: step {record.step}, {describe_thresholds(record)}")
    if json:
        print_json(
            {
                "detector": str(out),
                "category": category,
                "teacher": record.teacher,
                "step": record.step,
                **rates_of(record, 0.01, None),
                **record.metrics,
                "history": [interval_document(progress) for progress in history],
            }
        )


def evaluate(
    detector: Positional[Annotated[Path, arg(metavar="DETECTOR")]],
    /,
    *,
    data: Path,
    category: str | None = None,
    false_alarm_rate: float = 0.01,
    threshold: float | None = None,
    device: str = "auto",
    max_megapixels: float | None = None,
    json: bool = False,
) -> None:
    """Measure a detector on the labelled test images of a category.

    Args:
        detector: Detector folder.
        data: Folder of categories, or one category.
        category: Which category; the detector's own unless given.
        false_alarm_rate: Share of good images that may be called anomalous, in (0, 1), for the counts of verdicts.
        threshold: Score above which an image is anomalous, instead of the calibrated one.
        device: auto, cpu, cuda or cuda:N.
        max_megapixels: Larger images are refused as decompression bombs; 512, or $DSKD_MAX_MEGAPIXELS, unless given.
        json: Print one JSON document.
    """
    _allow_megapixels(max_megapixels)
    from dskd.detector import chosen_limit, rates_of

    loaded = _load(detector, device)
    limit, note = chosen_limit(loaded, false_alarm_rate, threshold)
    found = loaded.evaluation(data, category or loaded.record.category, say)
    if json:
        print_json(
            {
                "category": category or loaded.record.category,
                "detector_version": loaded.record.detector_version,
                "teacher": loaded.record.teacher,
                **rates_of(loaded.record, false_alarm_rate, threshold),
                **evaluation_document(found, limit),
            }
        )
    else:
        print_evaluation(found, limit, note)


def _exclusions(file: Path | None, data: Path, category: str, settings: "RunConfig") -> tuple[str, ...]:
    """The names in the file of --exclude, each checked to be one of the category's good images."""
    if file is None:
        return ()
    from dskd.data.datasets import read_category
    from dskd.data.exclusions import check_exclusions, read_exclusions

    names = read_exclusions(file)
    check_exclusions(names, [read_category(data, category, settings.data.layout)])
    return names


def predict(
    detector: Positional[Annotated[Path, arg(metavar="DETECTOR")]],
    images: Positional[Annotated[tuple[Path, ...], arg(metavar="IMAGES…", help_behavior_hint="(at least one)")]],
    /,
    *,
    out: Path,
    false_alarm_rate: float = 0.01,
    threshold: float | None = None,
    fdr: float | None = None,
    group_by: str = "",
    device: str = "auto",
    max_megapixels: float | None = None,
    json: bool = False,
) -> None:
    """Inspect images: a verdict for each, with the anomalous regions drawn.

    Exit code 1 means that some images cannot be read.

    Args:
        detector: Detector folder.
        images: Image files, or folders that are searched for them.
        out: Folder for predictions.jsonl, written as the verdicts come, and an overlay per image.
        false_alarm_rate: Share of good images that may be called anomalous, in (0, 1).
        threshold: Score above which an image is anomalous, instead of the calibrated one.
        fdr: Instead of a false-alarm rate: of the images that are called anomalous, the share that may be good, in
            (0, 1). The threshold then depends on all images together, which are inspected twice.
        group_by: Regular expression that finds a part's name in a path, if another than in training; for parts with
            several images, whose verdicts go to parts.jsonl.
        device: auto, cpu, cuda or cuda:N.
        max_megapixels: Larger images are refused as decompression bombs; 512, or $DSKD_MAX_MEGAPIXELS, unless given.
        json: Print one JSON document.
    """
    from dskd.detector import Unreadable, chosen_limit
    from dskd.predict import check_discovery_rate, check_out, describe_prediction, find_images, predict_images

    _allow_megapixels(max_megapixels)
    check_out(out)
    loaded = _load(detector, device)
    found = find_images(images)
    chosen_limit(loaded, false_alarm_rate, threshold)  # what is wrong with it is said before anything else
    check_discovery_rate(loaded.record, fdr, threshold)
    say(f"{len(found.images)} images" + (f"; not read: {found.describe()}" if found.describe() else ""))

    def tell(seen: "Prediction | Unreadable") -> None:
        if isinstance(seen, Unreadable):
            say(f"unreadable: {seen.error}")
        if not json:
            show(describe_prediction(seen))

    summary = predict_images(
        loaded,
        found.images,
        out,
        false_alarm_rate=false_alarm_rate,
        threshold=threshold,
        false_discovery_rate=fdr,
        group_by=group_by,
        on_prediction=tell,
    )
    say(f"{summary.describe()}; overlays in {out / 'overlays'}")
    if json:
        print_json(
            {
                "out": str(out),
                "num_anomalous": summary.num_anomalous,
                "num_unreadable": summary.num_unreadable,
                "num_clipped": summary.num_clipped,
                "not_read": {"others": dict(found.others), "left_out": dict(found.left_out)},
                **summary.rates,
                "predictions": summary.predictions,
                **({"parts": summary.parts} if summary.parts else {}),
            }
        )
    if summary.num_unreadable or found.closed:
        sys.exit(1)


def compare(
    a: Positional[Annotated[Path, arg(metavar="A")]],
    b: Positional[Annotated[Path, arg(metavar="B")]],
    images: Positional[Annotated[tuple[Path, ...], arg(metavar="IMAGES…", help_behavior_hint="(at least one)")]],
    /,
    *,
    out: Path,
    false_alarm_rate: float = 0.01,
    device: str = "auto",
    max_megapixels: float | None = None,
    json: bool = False,
) -> None:
    """Compare two detectors on the same images, each at its own threshold.

    Args:
        a: Detector folder, such as the one in use.
        b: Detector folder, such as a newer one.
        images: Image files, or folders that are searched for them.
        out: Folder for comparison.jsonl, and a picture of both verdicts per image on which they differ.
        false_alarm_rate: Share of good images that may be called anomalous, in (0, 1).
        device: auto, cpu, cuda or cuda:N.
        max_megapixels: Larger images are refused as decompression bombs; 512, or $DSKD_MAX_MEGAPIXELS, unless given.
        json: Print one JSON document.
    """
    from dskd.jobs.compare import compare_images, describe, describe_image
    from dskd.predict import check_out, find_images

    _allow_megapixels(max_megapixels)
    check_out(out)
    found = find_images(images)
    first, second = _load(a, device), _load(b, device)
    if first.record.category != second.record.category:
        say(f"A is a detector of {first.record.category}, B of {second.record.category}")
    comparison = compare_images(
        first,
        second,
        found.images,
        out,
        false_alarm_rate=false_alarm_rate,
        on_image=lambda image: None if json else show(describe_image(image)),
    )
    say(f"{describe(comparison)}; pictures of those that differ in {out / 'overlays'}")
    if json:
        print_json({"out": str(out), **comparison._asdict()})
    if comparison.num_unreadable:
        sys.exit(1)


def export(
    detector: Positional[Annotated[Path, arg(metavar="DETECTOR")]],
    /,
    *,
    onnx: Path,
    images: tuple[Path, ...] = (),
    opset: int = 18,
    json: bool = False,
) -> None:
    """Export a detector to ONNX (RGB bytes in, maps and scores out), and check that both agree.

    Args:
        detector: Detector folder.
        onnx: File to write; an older export of that name is replaced.
        images: Image files or folders for the check; generated ones unless given.
        opset: ONNX operator set, 18 to 25.
        json: Print one JSON document.
    """
    from dskd.export import (
        INPUT,
        OUTPUTS,
        ParityError,
        check_exportable,
        export_onnx,
        generated_inputs,
        network_inputs,
    )
    from dskd.predict import find_images

    check_exportable(onnx, opset)
    loaded = _load(detector, "cpu")
    width, height = loaded.record.config.data.input_size
    checked = network_inputs(loaded, find_images(images).images) if images else generated_inputs(loaded)
    source = "given" if images else "generated"
    try:
        parity = export_onnx(loaded, onnx, checked, opset)
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
    say(f"wrote {onnx}: opset {opset}, {INPUT} uint8 (B, {height}, {width}, 3) to {' and '.join(OUTPUTS)}")
    if json:
        print_json(
            {
                "onnx": str(onnx),
                "opset": opset,
                "category": loaded.record.category,
                "teacher": loaded.record.teacher,
                "width": width,
                "height": height,
                "images": source,
                **parity._asdict(),
                "verdicts": [verdicts._asdict() for verdicts in parity.verdicts],
            }
        )


def report(document: Positional[Annotated[Path, arg(metavar="FILE")]], /, *, out: Path = Path("report.html")) -> None:
    """Draw the report of a search again, from its report.json, as one HTML file that needs no network.

    Args:
        document: The report.json that a search left beside its champions.
        out: File to write; an older one of that name is replaced.
    """
    from dskd.atomic import check_can_be_made, file_in_making
    from dskd.report.document import read_report
    from dskd.report.render import render

    check_can_be_made(out, "--out")
    page = render(read_report(document.read_bytes()))
    with file_in_making(out) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    say(f"wrote {out}, {len(page.encode()) / 1e6:.1f} MB; open it in a browser")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends with one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    # warnings on odd metadata of sound images; a faulty image is an error that names it
    warnings.filterwarnings("ignore", module="PIL")
    try:
        commands: dict[str, Callable[..., None]] = {
            "demo-data": demo_data,
            "check-data": check_data,
            "train": _train_command(given[1:]) if given[:1] == ["train"] else train,
            "evaluate": evaluate,
            "predict": predict,
            "compare": compare,
            "export": export,
            "report": report,
        }
        what = "Visual anomaly detection by knowledge distillation."
        run = parse(commands, given, prog="dskd", description=what, version=VERSION, examples=EXAMPLES)
        with _terminated_cleanly():
            run()
    except UsageError as error:
        say(str(error))
        sys.exit(2)
    except (ValueError, FloatingPointError, OSError) as error:
        say(f"dskd: error: {error}")
        sys.exit(2)
    except _Terminated:
        say("dskd: terminated; what was written so far stays")
        sys.exit(143)
    except KeyboardInterrupt:
        say("dskd: interrupted; what was written so far stays")
        sys.exit(130)


def _allow_megapixels(limit: float | None) -> None:
    """Set the largest image, for this process and those that it starts.

    Raises ValueError on a limit that is no positive number, from the flag or the environment.
    """
    from dskd.data.images import MAX_MEGAPIXELS, max_pixels

    if limit is not None:
        os.environ[MAX_MEGAPIXELS] = str(limit)
    max_pixels()


class _Terminated(KeyboardInterrupt):
    """SIGTERM came, as from a batch system or a service manager."""


@contextlib.contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """SIGTERM as an exception, which lets files be closed and half-made folders be removed."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainDefaults(ConfigSource):
    """The flags of `train` that set the defaults of its other flags."""

    print_config: bool = False


def _train_command(arguments: Sequence[str]) -> Callable[..., None]:
    """`train` with the defaults of the preset and the file that `arguments` name."""
    chosen = parse_known(_TrainDefaults, arguments, prog="dskd train")
    command = functools.partial(train, settings=chosen.read())
    # To print a configuration nothing is read and nothing written: neither folder needs to be named.
    return functools.partial(command, data=Path(), out=Path()) if chosen.print_config else command


def _load(folder: Path, device: str) -> "Detector":
    from dskd.detector import UNTRAINED_TEACHER, Detector
    from dskd.device import computing_device

    detector = Detector.load(folder, str(computing_device(device)))
    if detector.record.is_untrained_teacher:
        say(UNTRAINED_TEACHER)
    return detector
