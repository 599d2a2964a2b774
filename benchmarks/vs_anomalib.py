"""This project beside anomalib, on one machine in one run: `python benchmarks/vs_anomalib.py --environment DIR`.

anomalib 2.7.0 gets an environment of its own, made in DIR where there is none (with this environment's versions of
torch, onnxruntime and OpenVINO; some gigabytes), and is never a dependency. A process on each side does the same work
on the same drawn pictures, and they take turns, round by round, so that other load meets both; figures are medians.
Weights are random on both sides, which does not change the speed. Both train STFPM with a ResNet18 on 64 pictures in
batches of 32, and validate on as many images.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

VERSION = "2.7.0"
SIDE = 256
NUM_TRAIN, NUM_TEST, BATCH = 64, 32, 32
NUM_MAPS = 83
ROWS = {
    "train": "training epoch, batch 32, 256 px: training part",
    "epoch": "the same with validation",
    "image": "one image from file, torch, 256 px",
    "onnx": "exported graph in ONNX Runtime, 256 px",
    "int8": "anomalib's float32 graph and our int8 one in ONNX Runtime, 256 px",
    "openvino": "exported graph in OpenVINO (float32), 256 px",
    "aupro": "exact AUPRO, 83 maps of 256 px",
    "help": "`train --help`",
}
SLOW = ("train", "aupro", "help")
TASKS = ("train", "image", "onnx", "int8", "openvino", "aupro", "help")
Task = Callable[[], "float | dict[str, float] | None"]
"""Work that a side does once; what it gives are seconds of its own, else it is timed as a whole."""


def session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def openvino_request(path: Path, threads: int) -> Any:
    import openvino

    core = openvino.Core()
    wanted = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(core.read_model(path), "CPU", wanted).create_infer_request()


def drawn_maps() -> tuple[Any, Any]:
    """Maps in which some defects stand out: equal on both sides."""
    import numpy as np

    rng = np.random.default_rng(0)
    maps = rng.random((NUM_MAPS, SIDE, SIDE)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    for index in range(0, NUM_MAPS, 2):
        top, left = rng.integers(0, SIDE - 40, 2)
        masks[index, top : top + 30, left : left + 20] = True
    return maps + 0.3 * masks, masks


def ours(data: Path, work: Path, threads: int) -> dict[str, Task]:
    """This project's side."""
    import numpy as np
    import torch

    from dskd.checkpoint import DetectorRecord
    from dskd.config import DataSpec, TeacherSource
    from dskd.detector import Detector
    from dskd.device import computing_device
    from dskd.export import as_inputs, build_model
    from dskd.jobs.quantize import build_int8_model
    from dskd.metrics import aupro
    from dskd.presets import PRESETS
    from dskd.training.inputs import prepare
    from dskd.training.run import TrainingRun

    torch.set_num_threads(threads)
    device = computing_device("cpu")
    # Of the good pictures 64 are left to train on; the held-out ones are validated with as many synthetic defects.
    config = PRESETS["stfpm"].with_values(
        {"image_size": SIDE, "batch_size": BATCH, "epochs": 1000, "validation_fraction": 0.2, "calibration_fraction": 0}
    )
    spec = DataSpec(data=data, category="flange", teacher=TeacherSource("random"))
    inputs = prepare(config, spec, device=device, cache=None)
    half = [*range(NUM_TEST // 2), *range(-NUM_TEST // 2, 0)]
    truth = inputs.validation
    validation = truth._replace(
        images=truth.images[half], masks=truth.masks[half], labels=truth.labels[half],
        has_mask=truth.has_mask[half], sources=np.arange(NUM_TEST),
    )  # fmt: skip
    rows = inputs.validation_features.rows[half]
    inputs = inputs._replace(
        train_images=inputs.train_images[:NUM_TRAIN],
        train_features=inputs.train_features._replace(rows=inputs.train_features.rows[:NUM_TRAIN]),
        validation=validation,
        validation_features=inputs.validation_features._replace(rows=rows),
    )
    assert len(inputs.train_images) == NUM_TRAIN and len(inputs.validation.images) == NUM_TEST
    run = TrainingRun.begin(config, inputs, device)
    intervals = run.intervals()

    def train() -> dict[str, float]:
        started = time.perf_counter()
        result = next(intervals)
        return {"train": result.interval.seconds, "epoch": time.perf_counter() - started}

    record = DetectorRecord(
        category="none", config=config, teacher="random", teacher_sha256="", data_sha256="", validation_files=(),
        calibration_files=(), step=1, thresholds=(), metrics={},
    )  # fmt: skip
    detector = Detector(record, inputs.teacher, run.students.eval(), device)
    image = sorted((data / "flange/test/good").glob("*.png"))[0]
    graph = work / "ours.onnx"
    graph.write_bytes(build_model(detector).SerializeToString())
    pixels = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    small = work / "int8.onnx"
    small.write_bytes(build_int8_model(detector, as_inputs(inputs.train_images[:32])))
    runtime, int8, request = session(graph, threads), session(small, threads), openvino_request(graph, threads)
    maps, masks = drawn_maps()

    def exact() -> dict[str, float]:
        started = time.perf_counter()
        value = aupro(maps, masks)
        return {"aupro": time.perf_counter() - started, "value": value}

    return {
        "train": train,
        "image": lambda: (detector.predict(image, 1.0), None)[1],
        "onnx": lambda: (runtime.run(None, {"images": pixels}), None)[1],
        "int8": lambda: (int8.run(None, {"images": pixels}), None)[1],
        "openvino": lambda: (request.infer({0: pixels}), None)[1],
        "aupro": exact,
        "help": lambda: quietly([sys.executable, "-m", "dskd", "train", "--help"]),
    }


def theirs(data: Path, work: Path, threads: int) -> dict[str, Task]:
    """anomalib's side."""
    import timm

    create = timm.create_model
    timm.create_model = lambda *words, **values: create(*words, **{**values, "pretrained": False})
    import numpy as np
    import torch
    from anomalib.data import Folder, ImageBatch
    from anomalib.deploy import TorchInferencer
    from anomalib.engine import Engine
    from anomalib.metrics import AUPRO
    from anomalib.models import Stfpm
    from lightning.pytorch import Callback

    torch.set_num_threads(threads)
    pictures = data / "flange"
    defects = sorted(path.name for path in (pictures / "test").iterdir() if path.name != "good")
    module = Folder(
        name="flange", root=pictures, normal_dir="train/good", normal_test_dir="test/good",
        abnormal_dir=[f"test/{name}" for name in defects], mask_dir=[f"ground_truth/{name}" for name in defects],
        train_batch_size=BATCH, eval_batch_size=BATCH, num_workers=0, val_split_mode="same_as_test",
    )  # fmt: skip
    module.setup()
    # The good pictures are more than this project trains on, which holds some out.
    module.train_data = torch.utils.data.Subset(module.train_data, range(NUM_TRAIN))
    module.train_data.collate_fn = module.train_data.dataset.collate_fn
    module.train_data.augmentations = None
    module.setup = lambda stage=None: None
    times: dict[str, float] = {}

    class Timer(Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, *_: Any) -> None:
            self.started = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            times["train"] = time.perf_counter() - self.started

        def on_train_epoch_end(self, *_: Any) -> None:
            times["epoch"] = time.perf_counter() - self.started

    def model() -> Any:
        return Stfpm(pre_processor=Stfpm.configure_pre_processor((SIDE, SIDE)), visualizer=False)

    def train() -> dict[str, float]:
        engine = Engine(
            max_epochs=1, accelerator="cpu", logger=False, callbacks=[Timer()], enable_progress_bar=False,
            default_root_dir=work / "engine", num_sanity_val_steps=0,
        )  # fmt: skip
        engine.fit(model(), datamodule=module)
        return dict(times)

    os.environ["TRUST_REMOTE_CODE"] = "1"
    untrained = model().eval()
    inferencer = TorchInferencer(untrained.to_torch(work / "theirs"), device="cpu")
    graph = untrained.to_onnx(work / "theirs", input_size=(SIDE, SIDE))
    image = str(sorted((pictures / "test/good").glob("*.png"))[0])
    runtime, request = session(graph, threads), openvino_request(graph, threads)
    pixels = np.random.default_rng(0).random((1, 3, SIDE, SIDE), dtype=np.float32)
    name = runtime.get_inputs()[0].name
    maps, masks = (torch.from_numpy(each) for each in drawn_maps())

    batch = ImageBatch(image=torch.zeros(NUM_MAPS, 3, 8, 8), anomaly_map=maps, gt_mask=masks)

    def exact() -> dict[str, float]:
        metric = AUPRO(fields=["anomaly_map", "gt_mask"])
        started = time.perf_counter()
        metric.update(batch)
        value = metric.compute()
        return {"aupro": time.perf_counter() - started, "value": float(value)}

    program = Path(sys.executable).parent / "anomalib"
    return {
        "train": train,
        "image": lambda: (inferencer.predict(image), None)[1],
        "onnx": lambda: (runtime.run(None, {name: pixels}), None)[1],
        "int8": lambda: (runtime.run(None, {name: pixels}), None)[1],
        "openvino": lambda: (request.infer({0: pixels}), None)[1],
        "aupro": exact,
        "help": lambda: quietly([str(program), "train", "--help"]),
    }


def quietly(command: Sequence[str]) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


SIDES = {"ours": ours, "theirs": theirs}


def serve(side: str, data: Path, work: Path, threads: int) -> None:
    """Do each task whose name comes as a line, and answer with its seconds as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    warnings.simplefilter("ignore")
    tasks = SIDES[side](data, work, threads)
    print(json.dumps(sorted(tasks)), file=answers, flush=True)
    for line in sys.stdin:
        name = line.strip()
        started = time.perf_counter()
        told = tasks[name]()
        seconds = time.perf_counter() - started
        print(json.dumps(told if isinstance(told, dict) else {name: seconds}), file=answers, flush=True)


class Side:
    """One side's process."""

    def __init__(self, side: str, python: Path, folder: Path, options: argparse.Namespace) -> None:
        command = [str(python), __file__, "--serve", side, "--data", str(folder / "data"), "--work", str(folder / side),
                   "--threads", str(options.threads)]  # fmt: skip
        (folder / side).mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        if side == "ours":
            environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
        self._log = (folder / f"{side}.log").open("w")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._answer(side, folder)

    def _answer(self, asked: str, folder: Path | None = None) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = Path(self._log.name).read_text()[-1500:]
            raise RuntimeError(f"the process ended at {asked}: {said}")
        return json.loads(line)

    def do(self, name: str) -> dict[str, float]:
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        found: dict[str, float] = self._answer(name)
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self._log.close()


def environment_python(folder: Path) -> Path:
    """anomalib's own Python, installed where it is not."""
    python = folder / "bin/python"
    if not python.exists():
        print(f"installing anomalib {VERSION} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        same = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}"
                for name in ("torch", "onnxruntime", "openvino")]  # fmt: skip
        subprocess.run([str(python), "-m", "pip", "install", "-q", f"anomalib=={VERSION}", *same, "onnxscript"],
                       check=True)  # fmt: skip
    return python


@contextlib.contextmanager
def both(options: argparse.Namespace) -> Iterator[dict[str, Side]]:
    from dskd.demo.dataset import draw_dataset

    pythons = {"ours": Path(sys.executable), "theirs": environment_python(options.environment)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A fifth is held out on our side.
        num_train = NUM_TRAIN * 5 // 4 + 5
        draw_dataset(folder / "data", categories=("flange",), num_train=num_train, num_test=NUM_TEST, image_size=SIDE)
        sides: dict[str, Side] = {}
        try:
            for side, python in pythons.items():
                sides[side] = Side(side, python, folder, options)
            yield sides
        finally:
            for each in sides.values():
                each.close()


def measured(sides: dict[str, Side], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of every row and side; the sides take turns, and after each round so do first and second."""
    found: dict[str, dict[str, list[float]]] = {row: {side: [] for side in sides} for row in (*ROWS, "value")}
    for task in options.tasks:
        for round_ in range(1 + (options.epochs if task in SLOW else options.rounds)):
            order = list(sides.items())
            for side, process in order if round_ % 2 else order[::-1]:
                for row, seconds in process.do(task).items():
                    if round_ > 0:  # the first is a warm-up
                        found[row][side].append(seconds)
    values = [value for side in found.pop("value").values() for value in side]
    if values and max(values) - min(values) > 1e-3:
        raise RuntimeError(f"the two AUPRO differ: {sorted(set(values))}")
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Rows in Markdown: medians in milliseconds, and the ratio with the lowest and highest of the rounds."""
    lines = ["| | anomalib, ms | ours, ms | ratio (lowest to highest round) |", "|---|---|---|---|"]
    for row, name in ROWS.items():
        if not found[row]["ours"]:
            continue
        one, other = found[row]["theirs"], found[row]["ours"]
        ratios = [first / second for first, second in zip(one, other, strict=True)]
        lines.append(
            f"| {name} | {1e3 * median(one):.1f} | {1e3 * median(other):.1f} | "
            f"{median(one) / median(other):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=Path(".venv-anomalib"), help="anomalib's own environment")
    parser.add_argument("--rounds", type=int, default=21, help="of the quick rows")
    parser.add_argument("--epochs", type=int, default=4, help="rounds of the slow rows")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="train measures two rows")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.serve:
        serve(options.serve, options.data, options.work, options.threads)
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "onnxruntime", "openvino"))
    print(
        f"anomalib {VERSION}; python {platform.python_version()}, {versions}; {options.threads} threads\n", flush=True
    )
    with both(options) as sides:
        print(table(measured(sides, options)))


if __name__ == "__main__":
    main()
