"""What a GPU does with this project: checks first, then speeds: `python benchmarks/gpu.py --out gpu.jsonl`.

One command, under nine minutes, from a bare copy of the tree on a machine without a network, such as a rented one. It
needs Python 3.11 or newer with torch, torchvision, timm (with its huggingface-hub), scipy, safetensors, pillow and
numpy; what `dskd` imports beside these are small wheels, 1.1 MB in all, to carry along where they are missing:

    pip download --no-deps -d wheels filelock jaxtyping wadler-lindig msgspec platformdirs tifffile tomli-w tqdm
    pip install --no-index --no-deps --target site wheels/*.whl && PYTHONPATH=site:. python benchmarks/gpu.py --out …

(msgspec is compiled: download it with the machine's `--python-version` and `--platform`.) Each result is a line of
JSON in --out, written as it comes: a machine that goes away takes only the unfinished part along. A part that fails is
a line with its error, and the next goes on; when the budget is spent, what is left is written as left out. Images and
weights are random, which does not change the speed. The exit code is 1 if a part or a check failed.

`--smoke` runs all parts with tiny networks, also without a GPU; what needs CUDA is then written as left out.
"""

import argparse
import copy
import gc
import itertools
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast, get_args
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare copy is not installed

from dskd.checkpoint import DetectorRecord
from dskd.config import DataSpec, Precision, RunConfig, TeacherSource
from dskd.demo.dataset import draw_dataset
from dskd.detector import Detector
from dskd.device import computing_device
from dskd.evaluate import AnomalyScores, score_images
from dskd.losses import distillation_loss
from dskd.model import AmplifiedTeacher, Students, Teacher, build_amplifier, build_students, build_teacher, normalize
from dskd.model.batchnorm import share_batchnorm
from dskd.model.features import feature_table
from dskd.presets import PRESETS
from dskd.training.inputs import TrainingData, prepare
from dskd.training.loop import Interval, Step, TakeStep, build_optimizer, fit, plain_step
from dskd.training.recorded import RecordedSteps, quickest_step
from dskd.training.run import TrainingRun

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is measured."""

    image_size: int = 256
    batch_size: int = 16
    num_images: int = 242
    """As many as a category of MVTec AD has in the mean."""
    category_steps: int = 3200
    """200 epochs of 16 images."""
    train_batches: tuple[int, ...] = (16, 32, 64)
    score_batches: tuple[int, ...] = (1, 16, 64, 256)
    students: tuple[int, ...] = (1, 2, 4, 8, 16)
    check_steps: int = 150
    """Of the trainings on drawn pictures that are compared."""
    check_size: int = 128
    repeats: int = 20
    values: tuple[tuple[str, Any], ...] = ()
    """Fields of the configuration that are not the preset's."""


SMOKE = Sizes(
    image_size=64, batch_size=2, num_images=4, category_steps=3, train_batches=(2,), score_batches=(1, 2),
    students=(1, 2), check_steps=2, check_size=64, repeats=1,
    values=(("backbone", "test_resnet"), ("levels", [1, 2]), ("level_weights", [1, 1]),
            ("score_level_weights", [1, 1]), ("embedding_depth", 1)),
)  # fmt: skip


class NeedsCudaError(RuntimeError):
    """A part that only a GPU can do."""


class Clock:
    """The time that is left."""

    def __init__(self, budget: float) -> None:
        self._end = time.monotonic() + budget

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


class Network(NamedTuple):
    config: RunConfig
    teacher: Teacher
    students: Students


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What every part gets."""

    sizes: Sizes
    device: torch.device
    presets: tuple[str, ...]
    clock: Clock
    is_smoke: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def config(self, preset: str, **values: Any) -> RunConfig:
        usual = {"image_size": self.sizes.image_size, "batch_size": self.sizes.batch_size, "learning_rate": 1e-4}
        return PRESETS[preset].with_values({**usual, **dict(self.sizes.values), **values})

    def network(self, preset: str, device: torch.device | None = None, **values: Any) -> Network:
        """Untrained: equal on every device."""
        place, config = device or self.device, self.config(preset, **values)
        teacher = build_teacher(config.model.backbone, config.model.levels, "random")
        if config.amplification.amplification:
            teacher = AmplifiedTeacher(teacher, build_amplifier(teacher, config.amplification.memory_size, seed=0))
        students = build_students(config.model, teacher, seed=0)
        return Network(config, teacher.to(place), students.to(place))

    def images(self, count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
        side = self.sizes.image_size
        return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[], object], repeats: int | None = None, warm_up: int = 3) -> float:
        """Median seconds of an act, the device's work included."""
        for _ in range(1 if self.is_smoke else warm_up):
            act()
        times = []
        for _ in range(repeats or self.sizes.repeats):
            self.wait()
            started = time.perf_counter()
            act()
            self.wait()
            times.append(time.perf_counter() - started)
        return median(times)

    def need_cuda(self) -> None:
        if not self.on_gpu:
            raise NeedsCudaError("needs a GPU")


# Checks


def check_equal_to_cpu(setup: Setup) -> Iterator[Result]:
    """Maps and scores of one untrained network on the CPU and on the device, in full float32."""
    images = setup.images(4)
    for preset in setup.presets:
        found = []
        for device in (torch.device("cpu"), setup.device):
            network = setup.network(preset, device)
            found.append(score_images(network.teacher, network.students, images, network.config, device))
        here, there = found
        error = float(np.abs(here.maps - there.maps).max() / np.abs(here.maps).max())
        score = float(np.abs(here.scores - there.scores).max() / np.abs(here.scores).max())
        yield {"preset": preset, "map_error": error, "score_error": score, "passed": max(error, score) < 1e-3}


def losses_of(
    setup: Setup, network: Network, students: nn.Module, images: npt.NDArray[np.uint8], take_step: TakeStep = plain_step
) -> list[float]:
    """Loss of each step of a training by `fit`."""
    table = feature_table(network.teacher, images, setup.device)
    optimizer = build_optimizer(students, network.config.train)
    steps = fit(students, optimizer, images, table, network.config, device=setup.device, take_step=take_step)
    return [each.loss.item() for each in steps if isinstance(each, Step)]


def check_recorded(setup: Setup) -> Iterator[Result]:
    """Training by recorded steps against the same one kernel by kernel."""
    setup.need_cuda()
    for preset in setup.presets:
        images, length, found = setup.images(setup.sizes.batch_size * 2), 12, []
        for take_step in (plain_step, RecordedSteps()):
            network = setup.network(preset, steps=length)
            found.append(losses_of(setup, network, network.students, images, take_step))
        error = max(abs(one - other) / abs(one) for one, other in zip(*found, strict=True))
        yield {"preset": preset, "loss_error": error, "losses": found[1], "passed": error < 0.02}


def check_ddp(setup: Setup) -> Iterator[Result]:
    """One process of DDP with shared BatchNorm (NCCL and SyncBatchNorm on a GPU) against plain training."""
    images, length = setup.images(setup.sizes.batch_size * 2), 6
    plain = setup.network("dskd", steps=length)
    expected = losses_of(setup, plain, plain.students, images)
    backend = "nccl" if setup.on_gpu else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            network = setup.network("dskd", steps=length)
            shared = share_batchnorm(network.students, setup.device)
            wrapped = DistributedDataParallel(shared, device_ids=[setup.device.index or 0] if setup.on_gpu else None)
            found = losses_of(setup, network, wrapped, images)
        finally:
            dist.destroy_process_group()
    error = max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))
    yield {"backend": backend, "loss_error": error, "losses": found, "passed": error < 0.02}


def without_autocast() -> AbstractContextManager[object]:
    """The students' training in float32."""
    return mock.patch("dskd.training.loop.torch.autocast", lambda *_, **__: nullcontext())


def drawn(setup: Setup, folder: Path) -> tuple[RunConfig, TrainingData]:
    """A small category of drawn pictures, and a training on it that takes seconds."""
    side = setup.sizes.check_size
    draw_dataset(folder, categories=("flange",), num_train=8 if setup.is_smoke else 24, num_test=4, image_size=side)
    values = {"image_size": side, "steps": setup.sizes.check_steps, "learning_rate": 5e-3}
    config = setup.config("dskd", **values)
    spec = DataSpec(data=folder, category="flange", teacher=TeacherSource("random"))
    return config, prepare(config, spec, device=setup.device, cache=None)


def check_bf16(setup: Setup) -> Iterator[Result]:
    """Loss curve and validation of a training in bfloat16, as on any GPU, against float32."""
    with tempfile.TemporaryDirectory() as folder:
        config, inputs = drawn(setup, Path(folder) / "drawn")
        curves, figures = [], []
        for way in (nullcontext, without_autocast):
            with way():
                history = list(TrainingRun.begin(config, inputs, setup.device).intervals())
            curves.append([each.interval.loss for each in history])
            figures.append(history[-1])
    error = abs(curves[0][-1] - curves[1][-1]) / curves[1][-1]
    apart = abs(figures[0].best_objective - figures[1].best_objective)
    yield {
        "losses_bf16": curves[0],
        "losses_fp32": curves[1],
        "image_auroc_bf16": figures[0].scores.image_auroc,
        "image_auroc_fp32": figures[1].scores.image_auroc,
        "objective_bf16": figures[0].best_objective,
        "objective_fp32": figures[1].best_objective,
        "passed": error < 0.1 and apart < 0.05,
    }


def check_resume(setup: Setup) -> Iterator[Result]:
    """A training that is stored after an interval and goes on in another object, against one that is not."""
    with tempfile.TemporaryDirectory() as folder:
        config, inputs = drawn(setup, Path(folder) / "drawn")
        config = config.with_values({"steps": max(20, setup.sizes.check_steps // 5)})
        whole = [each.interval.loss for each in TrainingRun.begin(config, inputs, setup.device).intervals()]
        first = TrainingRun.begin(config, inputs, setup.device)
        next(first.intervals())
        first.save(Path(folder))
        second = TrainingRun.begin(config, inputs, setup.device)
        second.restore(Path(folder))
        rest = [each.interval.loss for each in second.intervals()]
    error = max(abs(one - other) / abs(other) for one, other in zip(rest, whole[1:], strict=True))
    yield {"loss_error": error, "losses": whole, "passed": error < 0.02}


# Measurements


def peak(setup: Setup) -> Iterator[Result]:
    """Products of large matrices: what bf16 can reach here."""
    side = 256 if setup.is_smoke else 8192
    first, second = (torch.randn(side, side, device=setup.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = setup.seconds(lambda: first @ second)
    yield {"side": side, "tflops": 2 * side**3 / seconds / 1e12}


def category(setup: Setup) -> Iterator[Result]:
    """A dskd category of 200 epochs at 256 px by the project's own loop, validation left out."""
    take_step = quickest_step(setup.device)
    sizes = setup.sizes
    network = setup.network("dskd", steps=sizes.category_steps)
    images = setup.images(sizes.num_images)
    started = time.perf_counter()
    table = feature_table(network.teacher, images, setup.device)
    setup.wait()
    prepared = time.perf_counter() - started
    optimizer = build_optimizer(network.students, network.config.train)
    limit = min(120.0, setup.clock.left / 3)
    started, done = time.perf_counter(), 0
    for each in fit(
        network.students, optimizer, images, table, network.config, device=setup.device, take_step=take_step
    ):
        if isinstance(each, Interval):  # its losses were read, so the device is done with it
            done = each.step
            if time.perf_counter() - started > limit:
                break
    seconds = time.perf_counter() - started
    yield {
        "steps": done,
        "seconds": seconds,
        "seconds_of_200_epochs": seconds * sizes.category_steps / done,
        "images_per_second": done * sizes.batch_size / seconds,
        "features_seconds": prepared,
        "goal": "below 20 s",
    }


def training_speed(setup: Setup) -> Iterator[Result]:
    """`fit` with cached features per preset and batch size, and its share of the bf16 peak."""
    ceiling = next(peak(setup))["tflops"]
    ways = ("recorded", "kernel by kernel") if setup.on_gpu else ("kernel by kernel",)
    for batch, preset, way in itertools.product(setup.sizes.train_batches, setup.presets, ways):
        if setup.clock.left < 10:
            return
        steps = 3 if setup.is_smoke else 24
        take_step = RecordedSteps() if way == "recorded" else plain_step
        network = setup.network(preset, batch_size=batch, steps=1000)
        images = setup.images(min(batch * 2, setup.sizes.num_images))
        table = feature_table(network.teacher, images, setup.device)
        optimizer = build_optimizer(network.students, network.config.train)
        taken = fit(
            network.students, optimizer, images, table, network.config, device=setup.device, take_step=take_step
        )
        only = (each for each in taken if isinstance(each, Step))
        for _ in range(6):
            next(only).loss.item()
        started = time.perf_counter()
        for _ in range(steps):
            last = next(only)
        last.loss.item()
        seconds = (time.perf_counter() - started) / steps
        pixels = normalize(torch.from_numpy(images[:batch]).to(setup.device))
        targets = network.teacher(pixels)
        with FlopCounterMode(display=False) as counter:
            outputs = network.students(pixels, targets)
            distillation_loss(targets, outputs.encoder, outputs.decoder, network.config.loss).total.backward()
        tflops = counter.get_total_flops() / seconds / 1e12
        yield {
            "preset": preset,
            "batch": batch,
            "way": way,
            "step_milliseconds": 1e3 * seconds,
            "images_per_second": min(batch, len(images)) / seconds,
            "tflops": tflops,
            "share_of_bf16_peak": tflops / ceiling,
        }


def detector_of(network: Network, device: torch.device, precision: Precision = "float32") -> Detector:
    record = DetectorRecord(
        category="none", config=network.config, teacher="random", teacher_sha256="", data_sha256="",
        validation_files=(), calibration_files=(), step=1, thresholds=(), metrics={},
    )  # fmt: skip
    return Detector(record, network.teacher, network.students.eval(), device, precision)


def inference(setup: Setup) -> Iterator[Result]:
    """`Detector.score_images` from bytes in the host's memory to maps and scores there, per preset and batch.

    `kernel by kernel` is the same network without recorded graphs, one batch alone, maps left on the device.
    """
    precisions = get_args(Precision) if setup.on_gpu else ("float32",)
    for batch, preset in itertools.product(setup.sizes.score_batches, setup.presets):
        exact: AnomalyScores | None = None
        for precision in precisions:
            if setup.clock.left < 10:
                return
            detector, images = detector_of(setup.network(preset), setup.device, precision), setup.images(batch)
            found = detector.score_images(images)
            exact = exact or found
            seconds = setup.seconds(lambda: detector.score_images(images), warm_up=1)  # noqa: B023 - called at once
            there = torch.from_numpy(images).to(setup.device)
            bare = setup.seconds(lambda: detector.frozen.compare_plainly(there), warm_up=1)  # noqa: B023
            yield {
                "preset": preset,
                "batch": batch,
                "precision": precision,
                "images_per_second": batch / seconds,
                "milliseconds": 1e3 * seconds,
                "kernel_by_kernel_milliseconds": 1e3 * bare,
                "map_error": float(np.abs(found.maps - exact.maps).max() / exact.maps.max()),
                "score_error": float(np.abs(found.scores - exact.scores).max() / exact.scores.max()),
                "goal": "5,000 images/s; below 1 ms for one",
            }
            free(setup)


def captured(act: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """An act as a CUDA graph, after three rounds on a side stream that allocate what it keeps."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            act()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        act()
    return graph


class Batch(NamedTuple):
    """One batch on the device with its pyramid."""

    pixels: Tensor
    targets: tuple[Tensor, ...]


class Solo:
    """One student with its optimiser, as a step to be repeated; `is_captured` makes the step a CUDA graph."""

    def __init__(self, setup: Setup, preset: str, batch: Batch, seed: int, *, is_captured: bool = False, **ways: Any):
        network = setup.network(preset)
        config = network.config
        self.batch, self.on_gpu, self.loss_config = batch, setup.on_gpu, config.loss
        self.students = build_students(config.model, network.teacher, seed).to(setup.device).train()
        if not ways.get("channels_last", True):
            self.students = self.students.to(memory_format=torch.contiguous_format)
            self.batch = Batch(batch.pixels.contiguous(), tuple(level.contiguous() for level in batch.targets))
        self.optimizer = build_optimizer(self.students, config.train)
        if isinstance(self.optimizer, torch.optim.Adam) and (is_captured or not ways.get("fused", True)):
            rate, betas = config.train.learning_rate, (0.5, 0.999)
            fused = setup.on_gpu and ways.get("fused", True)
            self.optimizer = torch.optim.Adam(
                self.students.parameters(), lr=rate, betas=betas, fused=fused, capturable=is_captured
            )
        self.forward: Callable[..., Any] = self.students
        if "compiled" in ways:
            self.forward = torch.compile(self.students, backend=ways["compiled"])
        self.step: Callable[[], object] = self.eager_step
        if is_captured:
            start = copy.deepcopy(self.students.state_dict())
            self.step = captured(self.eager_step).replay
            for name, value in self.students.state_dict().items():
                value.copy_(start[name])
            clear(self.optimizer)

    def eager_step(self) -> None:
        # Autocast keeps casts of weights from one use to the next, which a graph must not.
        with torch.autocast(self.batch.pixels.device.type, torch.bfloat16, self.on_gpu, cache_enabled=False):
            outputs = self.forward(self.batch.pixels, self.batch.targets)
        loss = distillation_loss(self.batch.targets, outputs.encoder, outputs.decoder, self.loss_config).total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def clear(optimizer: torch.optim.Optimizer) -> None:
    """An optimiser as before its first step, in the memory that a graph knows."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


class Group(NamedTuple):
    """K students on one batch and one pyramid."""

    step: Callable[[], object]
    """One step of each."""
    weights: Callable[[], list[dict[str, Tensor]]]


def one_after_another(setup: Setup, preset: str, batch: Batch, count: int) -> Group:
    solos = [Solo(setup, preset, batch, seed) for seed in range(count)]
    return Group(lambda: [each.step() for each in solos], lambda: [each.students.state_dict() for each in solos])


def on_streams(setup: Setup, preset: str, batch: Batch, count: int, *, is_captured: bool = False) -> Group:
    setup.need_cuda()
    solos = [Solo(setup, preset, batch, seed, is_captured=is_captured) for seed in range(count)]
    streams = [torch.cuda.Stream() for _ in solos]

    def step() -> None:
        here = torch.cuda.current_stream()
        for each, stream in zip(solos, streams, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                each.step()
        for stream in streams:
            here.wait_stream(stream)

    return Group(step, lambda: [each.students.state_dict() for each in solos])


def graphs_one_after_another(setup: Setup, preset: str, batch: Batch, count: int) -> Group:
    setup.need_cuda()
    solos = [Solo(setup, preset, batch, seed, is_captured=True) for seed in range(count)]
    return Group(lambda: [each.step() for each in solos], lambda: [each.students.state_dict() for each in solos])


def as_graphs(setup: Setup, preset: str, batch: Batch, count: int) -> Group:
    return on_streams(setup, preset, batch, count, is_captured=True)


def stacked(setup: Setup, preset: str, batch: Batch, count: int, *, is_captured: bool = False) -> Group:
    """torch.func.vmap over the stacked weights of the students, which one optimiser updates."""
    network = setup.network(preset)
    config = network.config
    students = [build_students(config.model, network.teacher, seed).to(setup.device).train() for seed in range(count)]
    weights, buffers = stack_module_state(cast(list[nn.Module], students))
    base = students[0]
    optimizer = build_optimizer(nn.ParameterList(weights.values()), config.train)
    if is_captured and isinstance(optimizer, torch.optim.Adam):
        optimizer.param_groups[0]["capturable"] = True

    def one(own: dict[str, Tensor], kept: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        found = functional_call(base, (own, kept), (batch.pixels, batch.targets))
        return tuple(pyramid or () for pyramid in found)

    def step() -> None:
        with torch.autocast(setup.device.type, torch.bfloat16, setup.on_gpu, cache_enabled=False):
            pyramids = vmap(one)(weights, buffers)
        losses = []
        for k in range(count):
            encoder, decoder = (tuple(level[k] for level in pyramid) or None for pyramid in pyramids)
            losses.append(distillation_loss(batch.targets, encoder, decoder, config.loss).total)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()

    act: Callable[[], object] = step
    if is_captured:
        start = {name: value.detach().clone() for name, value in (*weights.items(), *buffers.items())}
        act = captured(step).replay
        with torch.no_grad():
            for name, value in (*weights.items(), *buffers.items()):
                value.copy_(start[name])
        clear(optimizer)
    held = {**weights, **buffers}
    return Group(act, lambda: [{name: value[k].detach() for name, value in held.items()} for k in range(count)])


def stacked_as_graph(setup: Setup, preset: str, batch: Batch, count: int) -> Group:
    setup.need_cuda()
    return stacked(setup, preset, batch, count, is_captured=True)


def grouped(setup: Setup, preset: str, batch: Batch, count: int) -> Group:
    """K encoders as one network of grouped convolutions; students with a decoder join levels, which mixes groups."""
    solos = [Solo(setup, preset, batch, seed) for seed in range(count)]
    if solos[0].students.decoder is not None:
        raise NotImplementedError("grouped convolutions are measured without a decoder alone")
    wide = copy.deepcopy(solos[0].students)
    widen(wide, [each.students for each in solos])
    assert wide.encoder is not None
    encoder = wide.encoder.features
    config = setup.config(preset)
    optimizer = build_optimizer(wide, config.train)
    pixels = batch.pixels.repeat(1, count, 1, 1).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(pixels.device.type, torch.bfloat16, setup.on_gpu):
            levels = encoder(pixels)
        parts = zip(*(level.chunk(count, dim=1) for level in levels), strict=True)
        losses = [distillation_loss(batch.targets, tuple(part), None, config.loss).total for part in parts]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()

    def weights() -> list[dict[str, Tensor]]:
        shares: list[dict[str, Tensor]] = [{} for _ in solos]
        for name, value in wide.state_dict().items():
            for share, part in zip(shares, value.chunk(count) if value.ndim else [value] * count, strict=True):
                share[name] = part
        return shares

    return Group(step, weights)


@torch.no_grad()
def widen(wide: nn.Module, others: Sequence[nn.Module]) -> None:
    """Make every layer of `wide` one of all `others`' layers side by side, channels of one after those of another."""
    count = len(others)
    for name, child in wide.named_modules():
        same = [other.get_submodule(name) for other in others]
        if isinstance(child, nn.Conv2d):
            child.groups, child.in_channels, child.out_channels = (
                child.groups * count, child.in_channels * count, child.out_channels * count)  # fmt: skip
        elif isinstance(child, nn.BatchNorm2d):
            child.num_features *= count
        for key, value in list(child.named_parameters(recurse=False)):
            joined = torch.cat([getattr(each, key) for each in same])
            setattr(child, key, nn.Parameter(joined, requires_grad=value.requires_grad))
        for key, value in list(child.named_buffers(recurse=False)):
            setattr(child, key, torch.cat([getattr(each, key) for each in same]) if value.ndim else value.clone())


METHODS: dict[str, Callable[[Setup, str, Batch, int], Group]] = {
    "one after another": one_after_another,
    "graphs one after another": graphs_one_after_another,
    "streams": on_streams,
    "graphs on streams": as_graphs,
    "stacked": stacked,
    "stacked as a graph": stacked_as_graph,
    "grouped": grouped,
}


def shared_batch(setup: Setup, preset: str) -> Batch:
    network = setup.network(preset)
    pixels = normalize(torch.from_numpy(setup.images(setup.sizes.batch_size)).to(setup.device))
    return Batch(pixels, network.teacher(pixels))


def students_at_once(setup: Setup) -> Iterator[Result]:
    """K students on one batch and pyramid in several ways: each equal to one alone, then how much faster."""
    for preset in (name for name in ("stfpm", "dskd") if name in setup.presets):
        batch = shared_batch(setup, preset)
        alone: dict[int, float] = {}
        # The most promising number first, in case the time runs out.
        for count in sorted(setup.sizes.students, key=lambda number: abs(number - 8)):
            for name, method in METHODS.items():
                if setup.clock.left < 20:
                    return
                told = {"preset": preset, "students": count, "method": name}
                try:
                    error = way_apart(setup, preset, batch, min(count, 2), method)
                    group = method(setup, preset, batch, count)
                    seconds = setup.seconds(group.step)
                except (NeedsCudaError, NotImplementedError) as reason:
                    yield told | {"left_out": str(reason)}
                    continue
                except torch.OutOfMemoryError as reason:
                    yield told | {"left_out": str(reason).splitlines()[0]}
                    continue
                if method is one_after_another:
                    alone[count] = seconds
                yield told | {
                    "seconds": seconds,
                    "gain": alone[count] / seconds,
                    "images_per_second": count * setup.sizes.batch_size / seconds,
                    "way_apart": error,
                    "passed": error < (0.25 if setup.on_gpu else 0.05),  # bf16 rounds each sum to 1 part in 256
                    "goal": "a gain of 3",
                }
                del group
                free(setup)


def way_apart(
    setup: Setup, preset: str, batch: Batch, count: int, method: Callable[[Setup, str, Batch, int], Group]
) -> float:
    """How far students of a group end from those trained alone, as a share of the way that these went in 3 steps."""
    start = one_after_another(setup, preset, batch, count)
    before = [{name: value.clone() for name, value in each.items()} for each in start.weights()]
    found = method(setup, preset, batch, count)
    for _ in range(3):
        start.step()
        found.step()
    apart = way = 0.0
    for first, expected, seen in zip(before, start.weights(), found.weights(), strict=True):
        for name, value in expected.items():
            if value.is_floating_point():
                apart += (value - seen[name]).double().square().sum().item()
                way += (value - first[name]).double().square().sum().item()
    return float((apart / way) ** 0.5)


def variants(setup: Setup) -> Iterator[Result]:
    """One training step in other ways: memory order, optimiser, CUDA graph, compiled."""
    ways: dict[str, dict[str, Any]] = {
        "as it is": {},
        "contiguous instead of channels_last": {"channels_last": False},
        "Adam not fused": {"fused": False},
        "CUDA graph": {"is_captured": True},
        "compiled": {"compiled": "eager" if setup.is_smoke else "inductor"},
    }
    for preset in (name for name in ("dskd", "stfpm") if name in setup.presets):
        batch = shared_batch(setup, preset)
        usual = 0.0
        for name, way in ways.items():
            if setup.clock.left < (60 if "compiled" in way and not setup.is_smoke else 10):
                return
            told = {"preset": preset, "way": name}
            if way.get("is_captured") and not setup.on_gpu:
                yield told | {"left_out": "needs a GPU"}
                continue
            solo = Solo(setup, preset, batch, 0, **way)
            seconds = setup.seconds(solo.step)
            usual = usual or seconds
            rate = setup.sizes.batch_size / seconds
            yield told | {"seconds": seconds, "gain": usual / seconds, "images_per_second": rate}
            del solo
            free(setup)


PARTS: dict[str, Callable[[Setup], Iterator[Result]]] = {
    "equal to the CPU": check_equal_to_cpu,
    "recorded steps": check_recorded,
    "DDP of one process": check_ddp,
    "resume": check_resume,
    "bf16 against float32": check_bf16,
    "bf16 peak": peak,
    "category of 200 epochs": category,
    "inference": inference,
    "K students at once": students_at_once,
    "training speed": training_speed,
    "other ways of a step": variants,
}
"""Checks, then measurements, the most wanted first."""


def free(setup: Setup) -> None:
    if setup.on_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def machine(setup: Setup) -> Result:
    told: Result = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(setup.device) if setup.on_gpu else "cpu",
        "cpus": os.cpu_count(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if setup.on_gpu:
        told |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return told


def run(setup: Setup, out: Path, parts: Sequence[str]) -> int:
    """Write every part's results as they come; the number of parts and checks that failed."""
    num_failed = 0
    with out.open("a", encoding="utf-8") as file:

        def write(**result: Any) -> None:
            line = json.dumps(result, default=str)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

        write(part="machine", **machine(setup))
        for name in parts:
            started = time.perf_counter()
            if setup.clock.left < 5:
                write(part=name, left_out="the budget is spent")
                continue
            try:
                for result in PARTS[name](setup):
                    num_failed += not result.get("passed", True)
                    write(part=name, **result)
            except NeedsCudaError as reason:
                write(part=name, left_out=str(reason))
            except Exception as error:  # whatever one part runs into, the others are still worth their time
                num_failed += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                write(part=name, failed=f"{type(error).__name__}: {error}", at=f"{place.filename}:{place.lineno}")
            free(setup)
            write(part=name, took_seconds=time.perf_counter() - started)
    return num_failed


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file that each result is added to, as a line of JSON")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all parts together")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--smoke", action="store_true", help="tiny networks, to see that every part runs")
    options = parser.parse_args(words)
    setup = Setup(
        sizes=SMOKE if options.smoke else Sizes(),
        device=computing_device(options.device),
        presets=tuple(options.presets),
        clock=Clock(options.budget),
        is_smoke=options.smoke,
    )
    return 1 if run(setup, options.out, options.parts) else 0


if __name__ == "__main__":
    sys.exit(main())
