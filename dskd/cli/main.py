"""The command line: `dskd demo-data | check-data | train | evaluate | predict | compare | feedback | page | export |
report`.

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
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
from dskd.config import VERSION, DataSpec, LayoutName, Precision, RunConfig, TeacherSource
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
    precision: Precision = "float32",
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
        precision: Of a GPU; float16 is four times as fast as float32 and moves scores by some thousandths.
        max_megapixels: Larger images are refused as decompression bombs; 512, or $DSKD_MAX_MEGAPIXELS, unless given.
        json: Print one JSON document.
    """
    _allow_megapixels(max_megapixels)
    from dskd.detector import chosen_limit, rates_of

    loaded = _load(detector, device, precision)
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
    overlays: Literal["all", "anomalous", "none"] = "all",
    device: str = "auto",
    precision: Precision = "float32",
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
        overlays: Of which images a picture is drawn; of many images it takes as long as the inspection.
        device: auto, cpu, cuda or cuda:N.
        precision: Of a GPU; float16 is four times as fast as float32 and moves scores by some thousandths.
        max_megapixels: Larger images are refused as decompression bombs; 512, or $DSKD_MAX_MEGAPIXELS, unless given.
        json: Print one JSON document.
    """
    from dskd.detector import Unreadable, chosen_limit
    from dskd.predict import check_discovery_rate, check_out, describe_prediction, find_images, predict_images

    _allow_megapixels(max_megapixels)
    check_out(out)
    loaded = _load(detector, device, precision)
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
        overlays=overlays,
        on_prediction=tell,
    )
    say(summary.describe() + ("" if overlays == "none" else f"; overlays in {out / 'overlays'}"))
    if summary.drift is not None and summary.drift.is_found:
        say(summary.drift.describe())
    if json:
        print_json(
            {
                "out": str(out),
                "num_anomalous": summary.num_anomalous,
                "num_unreadable": summary.num_unreadable,
                "num_clipped": summary.num_clipped,
                "not_read": {"others": dict(found.others), "left_out": dict(found.left_out)},
                **summary.rates,
                "drift": summary.drift.to_dict() if summary.drift else None,
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


def feedback(
    detector: Positional[Annotated[Path, arg(metavar="DETECTOR")]],
    /,
    *,
    good: tuple[Path, ...] = (),
    defect: tuple[Path, ...] = (),
    approve: bool = False,
    refuse: bool = False,
    quarantine: Path | None = None,
    data: Path | None = None,
    device: str = "auto",
    max_megapixels: float | None = None,
    json: bool = False,
) -> None:
    """Add images that people judged later; without flags, say what waits in the page's quarantine.

    Good ones recalibrate the thresholds, which gives a new detector version; defects tell how many are found. Nothing
    is trained. All of it stays in the detector's folder (feedback/), and its origin in feedback/log.jsonl. Rates are
    then approximate: images that people chose are no random sample, so add all good ones of a batch, and not those
    alone that were called anomalous.

    Args:
        detector: Detector folder.
        good: Image files or folders of good parts.
        defect: Image files or folders of defective parts.
        approve: Take what is in quarantine too; look at it there first, and remove what is wrong.
        refuse: Empty the quarantine.
        quarantine: Another folder of judged images, such as a cluster's; by default the one in the detector's folder.
        data: Folder of a search: the accepted images are copied into it, so that the next one trains on the good ones
            and validates on the defects.
        device: auto, cpu, cuda or cuda:N.
        max_megapixels: Larger images are refused as decompression bombs; 512, or $DSKD_MAX_MEGAPIXELS, unless given.
        json: Print one JSON document.
    """
    from dskd.jobs.feedback import Quarantine, accept, clear, copy_into_data, entries_of
    from dskd.predict import find_images

    if approve and refuse:
        raise ValueError("--approve and --refuse exclude each other; leave one out.")
    _allow_megapixels(max_megapixels)
    loaded = _load(detector, device)
    held = Quarantine(quarantine) if quarantine is not None else Quarantine.of(detector)
    waiting = list(held.entries())
    entries = [*(waiting if approve else ())]
    if good:
        entries += entries_of(find_images(good).images, "good")
    if defect:
        entries += entries_of(find_images(defect).images, "defect")
    document: dict[str, object] = {"detector": str(detector), "in_quarantine": len(waiting)}
    if approve or good or defect:
        found = accept(loaded, detector, entries)
        say(found.describe())
        document |= {**found._asdict(), "before": found.before._asdict(), "after": found.after._asdict()}
    if approve or refuse:
        clear(held, waiting)
        document["in_quarantine"] = 0
    elif waiting:
        say(f"{len(waiting)} judged images wait in {held.folder}; --approve takes them, --refuse drops them")
    else:
        say(f"no judged image waits in {held.folder}")
    if data is not None:
        document["num_copied"] = count = copy_into_data(detector, data, loaded.record.category)
        say(f"copied {count} images into {data}; the next search uses them")
    if json:
        print_json(document)


def page(
    detectors: Positional[Annotated[tuple[Path, ...], arg(metavar="DETECTOR…", help_behavior_hint="(at least one)")]],
    /,
    *,
    port: int = 8700,
    allowed_host: tuple[str, ...] = (),
    device: str = "auto",
    precision: Precision = "float32",
    max_megapixels: float | None = None,
    requests_per_minute: float = 1200.0,
) -> None:
    """Serve the inspector's page on this machine: drop photos, see verdicts, move the threshold, judge.

    It listens on loopback alone, and asks for the token that is part of the address it prints, or that
    $DSKD_PAGE_TOKEN holds. A detector whose folder is changed (dskd feedback) is read again.

    Args:
        detectors: Detector folders, one per category.
        port: TCP port; 0 takes a free one.
        allowed_host: Name under which a proxy on this machine publishes the page.
        device: auto, cpu, cuda or cuda:N.
        precision: Of a GPU, as for `dskd predict`.
        max_megapixels: Larger images are refused; 100, or $DSKD_MAX_MEGAPIXELS, unless given.
        requests_per_minute: Of one address, at least 1; behind a proxy all clients have one address.
    """
    if not requests_per_minute >= 1:
        raise ValueError(f"--requests-per-minute must be at least 1, got {requests_per_minute:g}.")
    if not detectors:
        raise ValueError("no detector given; name detector folders after the command.")
    if missing := [name for name in ("fastapi", "uvicorn", "python_multipart") if find_spec(name) is None]:
        raise ValueError(f"the page needs {missing[0]}: .ci/setup page, or pip install -e '.[page]'.")
    from dskd.data.images import MAX_MEGAPIXELS
    from dskd.device import computing_device
    from dskd.page.guard import Limits
    from dskd.page.server import MEGAPIXELS, serve_page

    if max_megapixels is None and MAX_MEGAPIXELS not in os.environ:
        max_megapixels = MEGAPIXELS
    _allow_megapixels(max_megapixels)
    limits = Limits(requests_per_minute=requests_per_minute)
    serve_page(
        detectors,
        port=port,
        device=str(computing_device(device)),
        precision=precision,
        hosts=allowed_host,
        limits=limits,
        say=say,
    )


def export(
    detector: Positional[Annotated[Path, arg(metavar="DETECTOR")]],
    /,
    *,
    onnx: Path,
    images: tuple[Path, ...] = (),
    opset: int = 18,
    int8: bool = False,
    json: bool = False,
) -> None:
    """Export a detector to ONNX (RGB bytes in, maps and scores out), and check that both agree.

    Args:
        detector: Detector folder.
        onnx: File to write; an older export of that name is replaced.
        images: Image files or folders for the check; generated ones unless given.
        opset: ONNX operator set, 18 to 25.
        int8: Convolutions of 8-bit integers, whose ranges --images of good products give: twice as fast on processors
            with such instructions, and scores differ by some percent.
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
    if int8 and not images:
        raise UsageError("--int8 chooses its ranges by good images; give some with --images FOLDER.")
    loaded = _load(detector, "cpu")
    width, height = loaded.record.config.data.input_size
    checked = network_inputs(loaded, find_images(images).images) if images else generated_inputs(loaded)
    source = "given" if images else "generated"
    try:
        if int8:
            from dskd.jobs.quantize import export_int8

            parity = export_int8(loaded, onnx, checked, opset)
        else:
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
        same = f"{verdicts.num_differing} other verdicts" if verdicts.num_differing else "same verdicts"
        say(f"threshold {verdicts.threshold:.4g}: {same}, {verdicts.num_anomalous} anomalous{note}")
    takes = f"{'int8, ' if int8 else ''}opset {opset}, {INPUT} uint8 (B, {height}, {width}, 3)"
    say(f"wrote {onnx}: {takes} to {' and '.join(OUTPUTS)}")
    if json:
        print_json(
            {
                "onnx": str(onnx),
                "opset": opset,
                "precision": "int8" if int8 else "float32",
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
            "feedback": feedback,
            "page": page,
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


def _load(folder: Path, device: str, precision: Precision = "float32") -> "Detector":
    from dskd.detector import UNTRAINED_TEACHER, Detector
    from dskd.device import computing_device

    detector = Detector.load(folder, str(computing_device(device)), precision)
    if detector.record.is_untrained_teacher:
        say(UNTRAINED_TEACHER)
    return detector
