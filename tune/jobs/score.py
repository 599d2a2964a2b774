"""Batch inspection on the cluster: Ray Data streams images through decoding tasks and the detector's actors."""

import functools
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import ray
import ray.data
import ray.exceptions
import torch

from dskd.checkpoint import RECORD_FILE, WEIGHTS_FILE, DetectorRecord, read_record, sha256_of
from dskd.config import Precision
from dskd.data.depth import PixelScale
from dskd.data.files import IMAGE_SUFFIXES, Walk, is_image_name, is_left_out, walk
from dskd.data.geometry import Geometry
from dskd.data.images import Framed, load_framed
from dskd.detector import (
    UNTRAINED_TEACHER,
    Detector,
    Prediction,
    Unreadable,
    chosen_limit,
    rates_of,
    unreadable_to_dict,
)
from dskd.device import computing_device
from dskd.draw.verdict import OVERLAY_SUFFIX, to_webp
from tune.runtime.cluster import connect, count_workers, resolve_gpus
from tune.settings.entry import say
from tune.settings.score import ScoringSettings
from tune.settings.workers import Workers
from tune.storage.files import Storage, StorageError
from tune.storage.temporary import temporary_folder
from tune.storage.uris import absolute, is_address
from tune.tracking.client import download

VERDICTS, OVERLAYS, SUMMARY = "verdicts", "overlays", "summary.json"
PARTS = "parts.jsonl"
"""A line per part, if the detector was trained with group_by."""
_REGION = pa.struct(
    [
        *((side, pa.int32()) for side in ("left", "top", "right", "bottom")),
        pa.field("peak", pa.float64()),
        pa.field("contour", pa.list_(pa.list_(pa.int32()))),
    ]
)
SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("verdict", pa.string()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
        ("relative_score", pa.float64()),  # in units of the threshold
        ("p_value", pa.float64()),
        ("is_anomalous", pa.bool_()),
        ("regions", pa.list_(_REGION)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("overlay", pa.string()),  # below OUT
        ("num_clipped", pa.int64()),  # values beyond the scale of images of more than 8 bits
        ("category", pa.string()),
        ("detector_version", pa.string()),
        ("teacher", pa.string()),
        ("error", pa.string()),
    ]
)
"""A row per image, as in `Prediction.to_dict`; if an image cannot be read, `error` has the reason and score is null."""
_DECODING_CPUS, _WRITING_CPUS = 0.5, 0.25
"""CPUs that a decoding and a writing task reserve; the detectors leave room for one of each."""
_ROWS_PER_TASK = 256
_CONNECTIONS = 8


class ScoringError(Exception):
    """The inspection was aborted; its output has no summary."""


def score(settings: ScoringSettings) -> int:
    """Inspect all images; returns the exit code: 0 all were read, 1 some were not or the job failed.

    Raises ValueError or OSError on bad input, in one line.
    """
    unfinished = f"{settings.out} is unfinished"
    try:
        summary = _scored(settings)
    except ScoringError as error:
        say(f"score: failed: {error}; {unfinished}, remove it before trying again")
        return 1
    except KeyboardInterrupt:
        say(f"score: {unfinished}")
        raise
    finally:
        if ray.is_initialized():
            ray.shutdown()
    say(
        f"{summary['num_anomalous']} of {summary['num_images']} anomalous, {summary['num_unreadable']} unreadable; "
        f"{summary['note']}; verdicts in {settings.out}/{VERDICTS}"
    )
    if settings.json:
        print(json.dumps(summary, indent=2))  # noqa: T201
    return 1 if summary["num_unreadable"] else 0


def _scored(settings: ScoringSettings) -> dict[str, Any]:
    out = Storage(absolute(settings.out), "--out")
    if there := out.names(""):
        finished = "the results of another inspection" if SUMMARY in there else "an unfinished output or other files"
        raise ValueError(f"--out {settings.out} holds {finished}; choose another, results are never overwritten.")
    notes: list[str] = []
    names = image_names(settings.images, notes.append)
    out.probe()
    with temporary_folder() as temporary:
        folder = fetch_detector(settings, temporary)
        detector = Detector.load(folder)
        limit, note = chosen_limit(detector, settings.false_alarm_rate, None)
        if detector.record.is_untrained_teacher:
            say(UNTRAINED_TEACHER)
        connect(settings.address)
        files = ray.put({name: (folder / name).read_bytes() for name in (RECORD_FILE, WEIGHTS_FILE)})
        weights_sha256 = sha256_of(folder / WEIGHTS_FILE)
    workers = choose_workers(settings, len(names))
    for note in notes:
        say(note)
    say(f"inspecting {len(names)} images with {workers.number} workers")
    try:
        _stream(settings, names, detector.record, files, limit, workers)
    except ray.exceptions.RayError as error:
        raise ScoringError(str(error).strip().splitlines()[-1]) from None
    counts = _counts(settings.out)
    if counts["num_images"] != len(names):
        raise ScoringError(f"{len(names)} images were given, {counts['num_images']} rows were written")
    parts = write_parts(settings, out, detector)
    summary = {
        "schema": 1,
        "images": settings.images,
        **counts,
        **parts,
        "detector": settings.detector,
        "category": detector.record.category,
        "detector_version": detector.record.detector_version,
        "weights_sha256": weights_sha256,
        "teacher": detector.record.teacher,
        "threshold": limit,
        **rates_of(detector.record, settings.false_alarm_rate, None),
        "note": note,
    }
    out.write_json(SUMMARY, summary)
    return summary


def fetch_detector(settings: ScoringSettings, temporary: Path) -> Path:
    """The verified folder of the detector; one that is not local is downloaded to `temporary`.

    Raises ValueError or OSError if there is not exactly one.
    """
    if not is_address(settings.detector) and not settings.is_tracked:
        read_record(Path(settings.detector))
        return Path(settings.detector)
    place = temporary / "fetched"
    if settings.is_tracked:
        assert settings.tracking_uri is not None
        download(settings.detector, settings.tracking_uri, place)
    else:
        root, _, name = settings.detector.rstrip("/").rpartition("/")
        Storage(root, "DETECTOR").download(name, place)
    # In a registered model the detector's folder may be a subfolder.
    found = sorted(path.parent for path in place.rglob(RECORD_FILE))
    if len(found) != 1:
        raise ValueError(f"{settings.detector} holds {len(found) or 'no'} detectors ({RECORD_FILE}), expected one.")
    read_record(found[0])
    return found[0]


def image_names(images: str, on_note: Callable[[str], object] = say) -> list[str]:
    """Sorted names of all image files below a folder or an address; `on_note` is called with what is not read there.

    Raises ValueError if there are none, or if a name is not valid text.
    """
    if is_address(images):
        given = [PurePosixPath(file.name) for file in Storage(images, "--images").files("")]
        kept = [name for name in given if not is_left_out(name)]
        names = sorted(name.as_posix() for name in kept if is_image_name(name))
        others = Counter(name.suffix.lower() for name in kept if not is_image_name(name))
        unread = Walk((), others, {"hidden or service": len(given) - len(kept)} if len(kept) < len(given) else {}, ())
    elif Path(images).is_dir():
        unread = walk(Path(images))
        names = [path.relative_to(images).as_posix() for path in unread.images]
    else:
        raise ValueError(f"--images {images} is no folder; give a folder or s3://bucket/path.")
    if not names:
        raise ValueError(f"--images {images} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    if unread.describe():
        on_note(f"not read: {unread.describe()}")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the file name {name!r} in {images} is no UTF-8; rename it.") from None
    return names


def choose_workers(settings: ScoringSettings, num_images: int) -> Workers:
    """Workers as given, or as many as the cluster can hold and the images can occupy.

    Raises ValueError if a cluster started for this inspection cannot hold them.
    """
    have: dict[str, float] = ray.cluster_resources()
    gpus = resolve_gpus(settings.gpus_per_worker, [have])
    if settings.precision != "float32" and not gpus:
        raise ValueError(
            f"--precision {settings.precision} needs GPUs, and the workers have none; on CPUs use float32."
        )
    # Ray Data's tasks that read and write need CPUs too, on any node.
    left = [have | {"CPU": have.get("CPU", 0) - _DECODING_CPUS - _WRITING_CPUS}]
    room = count_workers(left, Workers(1, settings.cpus_per_worker, gpus))
    number = settings.concurrency or max(1, min(room, math.ceil(num_images / settings.batch_size)))
    workers = Workers(number, settings.cpus_per_worker, gpus)
    if number > room:
        lacks = (
            f"{number} workers of {workers.cpus:g} CPUs and {gpus:g} GPUs, and "
            f"{_DECODING_CPUS + _WRITING_CPUS:g} CPUs to read and write, are more than the cluster's "
            f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
        )
        if settings.address is None:
            raise ValueError(f"{lacks}; lower --concurrency, --cpus-per-worker or --gpus-per-worker.")
        say(f"{lacks}: waiting for the cluster to grow")
    return workers


def _stream(
    settings: ScoringSettings,
    names: Sequence[str],
    record: DetectorRecord,
    detector: "ray.ObjectRef[dict[str, bytes]]",
    limit: float,
    workers: Workers,
) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    images, out = absolute(settings.images), absolute(settings.out)
    files, root = Storage(f"{out}/{VERDICTS}", "--out").location()
    num_blocks = max(math.ceil(len(names) / _ROWS_PER_TASK), min(len(names), 2 * workers.number))
    rows: ray.data.Dataset = ray.data.from_items([{"name": name} for name in names], override_num_blocks=num_blocks)
    geometry = Geometry.of(record.config.data, record.region, record.config.model.tile_alignment)
    if not geometry.tile:  # images that are cut into tiles are large: each is read where it is inspected
        rows = rows.map_batches(
            functools.partial(decode, images=images, geometry=geometry, scale=record.scale),
            batch_size=settings.batch_size,
            batch_format="numpy",
            num_cpus=_DECODING_CPUS,
        )
    rows.map_batches(
        Inspector,
        fn_constructor_kwargs={
            "detector": detector,
            "limit": limit,
            "images": settings.images,
            "out": out,
            "overlays": settings.overlays,
            "workers": workers,
            "precision": settings.precision,
        },
        compute=ray.data.ActorPoolStrategy(size=workers.number),
        batch_size=settings.batch_size,
        batch_format="numpy",
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
    ).write_parquet(root, filesystem=files, ray_remote_args={"num_cpus": _WRITING_CPUS})


def decode(
    batch: dict[str, np.ndarray], images: str, geometry: Geometry, scale: PixelScale | None = None
) -> dict[str, np.ndarray]:
    """The files `name` below `images`, ready for the network, and `error`: why a file cannot be read, or empty.

    `pixels` (B, H, W, 3) are the canvases, `size` (B, 2) the images' widths and heights, `picture` the bytes of the
    reduced images, whose heights and widths are `picture_size` (B, 2).
    """
    is_remote = is_address(images)
    with ThreadPoolExecutor(_CONNECTIONS if is_remote else 1) as pool:
        found = list(pool.map(lambda name: read_image(images, str(name), geometry, scale), batch["name"]))
    pixels = np.zeros((len(found), geometry.height, geometry.width, 3), np.uint8)
    sizes, picture_sizes = np.ones((len(found), 2), np.int64), np.zeros((len(found), 2), np.int64)
    num_clipped = np.zeros(len(found), np.int64)
    errors, pictures = np.full(len(found), "", object), np.full(len(found), b"", object)
    for index, framed in enumerate(found):
        if isinstance(framed, str):
            errors[index] = framed
            continue
        pixels[index], num_clipped[index] = framed.rgb, framed.num_clipped
        sizes[index] = framed.frame.width, framed.frame.height
        pictures[index], picture_sizes[index] = framed.picture.tobytes(), framed.picture.shape[:2]
    return {
        "name": batch["name"],
        "error": errors,
        "pixels": pixels,
        "size": sizes,
        "picture": pictures,
        "picture_size": picture_sizes,
        "num_clipped": num_clipped,
    }


def decoded(batch: dict[str, np.ndarray], geometry: Geometry) -> list[Framed | str]:
    """What `decode` read: an image, or one line that says why it cannot be read."""
    found: list[Framed | str] = []
    for index, error in enumerate(batch["error"]):
        if error:
            found.append(str(error))
            continue
        height, width = batch["picture_size"][index].tolist()
        picture = np.frombuffer(batch["picture"][index], np.uint8).reshape(height, width, 3)
        frame = geometry.frame(*batch["size"][index].tolist())
        found.append(Framed(batch["pixels"][index], frame, picture, int(batch["num_clipped"][index])))
    return found


def read_image(images: str, name: str, geometry: Geometry, scale: PixelScale | None) -> Framed | str:
    """An image below a folder or an address, or one line that says why it cannot be read."""
    try:
        if not is_address(images):
            return load_framed(Path(images) / name, geometry, scale)
        with temporary_folder() as temporary:
            file = temporary / PurePosixPath(name).name
            Storage(images, "--images").fetch(name, file)
            try:
                return load_framed(file, geometry, scale)
            except ValueError as error:
                return str(error).replace(str(file), f"{images}/{name}")
    except (ValueError, StorageError) as error:
        return str(error)


class Inspector:
    """A detector in its own process, on its GPU if it has one."""

    def __init__(
        self,
        detector: "ray.ObjectRef[dict[str, bytes]]",
        limit: float,
        images: str,
        out: str,
        overlays: str,
        workers: Workers,
        precision: Precision = "float32",
    ) -> None:
        torch.set_num_threads(max(1, int(workers.cpus)))
        with temporary_folder() as temporary:
            for name, data in ray.get(detector).items():
                (temporary / name).write_bytes(data)
            device = str(computing_device("cuda" if workers.gpus else "cpu"))
            self._detector = Detector.load(temporary, device, precision)
        self._limit, self._images, self._overlays = limit, images.rstrip("/"), overlays
        self._source = absolute(images)
        self._out = Storage(out, "--out")

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """A row of `SCHEMA` per image; also writes the overlays."""
        detector, record = self._detector, self._detector.record
        names = [str(name) for name in batch["name"]]
        if detector.geometry.tile:
            rows = [self._row(name, read_image(self._source, name, detector.geometry, record.scale)) for name in names]
        else:
            loaded = decoded(batch, detector.geometry)
            sound = [each for each in loaded if not isinstance(each, str)]
            paths = [Path(name) for name, each in zip(names, loaded, strict=True) if not isinstance(each, str)]
            seen = detector.predict_framed(paths, sound, self._limit)
            rows = [
                self._row(name, each if isinstance(each, str) else next(seen))
                for name, each in zip(names, loaded, strict=True)
            ]
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def _row(self, name: str, found: Framed | Prediction | Unreadable | str) -> dict[str, Any]:
        """The row of one image, which is inspected now if it was not yet; also writes its overlay."""
        image = f"{self._images}/{name}"
        if isinstance(found, Framed):
            (found,) = self._detector.predict_framed([Path(name)], [found], self._limit)
        if not isinstance(found, Prediction):
            error = found if isinstance(found, str) else found.error
            return unreadable_to_dict(self._detector.record.origin, image, self._limit, error)
        is_drawn = self._overlays == "all" or (self._overlays == "anomalous" and found.is_anomalous)
        picture = self._draw(name, found) if is_drawn else None
        return found.to_dict(overlay=picture) | {"image": image}

    def _draw(self, name: str, prediction: Prediction) -> str:
        target = f"{OVERLAYS}/{name}" if name.endswith(OVERLAY_SUFFIX) else f"{OVERLAYS}/{name}{OVERLAY_SUFFIX}"
        self._out.write(target, to_webp(prediction.plot()))
        return target


def write_parts(settings: ScoringSettings, out: Storage, detector: Detector) -> dict[str, int]:
    """Write a verdict per part, if the detector knows parts that several images show; how many there are."""
    if not detector.record.part_thresholds:
        return {}
    files, root = Storage(f"{absolute(settings.out)}/{VERDICTS}", "--out").location()
    rows = pyarrow.dataset.dataset(root, filesystem=files, format="parquet", schema=SCHEMA)
    table = rows.to_table(columns=["image", "score"]).sort_by("image")
    seen = zip(table["image"].to_pylist(), table["score"].to_pylist(), strict=True)
    verdicts = detector.judge_parts(seen, settings.false_alarm_rate)
    lines = "".join(json.dumps(verdict.to_dict()) + "\n" for verdict in verdicts)
    out.write(PARTS, lines.encode())
    return {
        "num_parts": len(verdicts),
        "num_anomalous_parts": sum(verdict.verdict == "anomalous" for verdict in verdicts),
    }


def _counts(out: str) -> dict[str, int]:
    """Numbers of images by verdict, counted in the written files."""
    files, root = Storage(f"{absolute(out)}/{VERDICTS}", "--out").location()
    rows = pyarrow.dataset.dataset(root, filesystem=files, format="parquet", schema=SCHEMA)
    return {
        "num_images": rows.count_rows(),
        "num_anomalous": rows.count_rows(filter=pc.field("is_anomalous")),
        "num_unreadable": rows.count_rows(filter=pc.field("error").is_valid()),
    }
