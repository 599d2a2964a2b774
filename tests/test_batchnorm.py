"""Two gloo workers with half a batch each, against one process with all of it."""

import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from dskd.config import DataConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from dskd.device import WorkerRank
from dskd.model.batchnorm import SharedBatchNorm2d, share_batchnorm
from dskd.model.features import feature_table
from dskd.model.network import build_students
from dskd.model.teacher import build_teacher
from dskd.training.loop import Interval, build_optimizer, fit

CPU = torch.device("cpu")
RUN = RunConfig(
    data=DataConfig(image_size=64),
    model=ModelConfig(backbone="resnet10t"),
    loss=LossConfig(hkd_weight=1.0),
    train=TrainConfig(epochs=2, batch_size=4, optimizer="sgd", learning_rate=0.01),
)


def normalised(layer: nn.BatchNorm2d, images: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that a layer makes of its share of a batch; `weights` make the loss tell positions apart."""
    inputs = images.clone().requires_grad_()
    output = layer(inputs)
    (output * weights).sum().backward()
    assert inputs.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    state = {f"state {name}": value for name, value in layer.state_dict().items()}
    gradients = {"input": inputs.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    return {"output": output.detach(), **gradients, **state}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3, 5, 5)
    return 3 + 2 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def losses(worker: WorkerRank) -> list[float]:
    teacher = build_teacher(RUN.model.backbone, RUN.model.levels, "random")
    images = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    students: nn.Module = build_students(RUN.model, teacher, seed=0)
    optimizer_of = students
    if worker.world_size > 1:
        share_batchnorm(students, CPU)
        students = nn.parallel.DistributedDataParallel(students)
    optimizer = build_optimizer(optimizer_of, RUN.train)
    table = feature_table(teacher, images, CPU)
    taken = fit(students, optimizer, images, table, RUN, device=CPU, worker=worker)
    return [each.loss for each in taken if isinstance(each, Interval)]


def work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    images, weights = batch()
    layer = normalised(SharedBatchNorm2d(3), images[rank::2], weights[rank::2])
    torch.save({"layer": layer, "losses": losses(WorkerRank(rank, 2))}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(work, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_shares_are_normalised_as_the_whole_batch_is(pair: list[dict[str, Any]]) -> None:
    images, weights = batch()
    whole = normalised(nn.BatchNorm2d(3), images, weights)
    for rank, result in enumerate(pair):
        layer = result["layer"]
        for name in ("output", "input"):
            torch.testing.assert_close(layer[name], whole[name][rank::2], rtol=1e-5, atol=1e-5)
        for name in (name for name in whole if name.startswith("state")):
            torch.testing.assert_close(layer[name], whole[name], rtol=1e-5, atol=1e-6)
    for name in ("weight", "bias"):  # DDP adds these up
        summed = pair[0]["layer"][name] + pair[1]["layer"][name]
        torch.testing.assert_close(summed, whole[name], rtol=1e-5, atol=1e-5)


def test_two_workers_train_the_students_of_one(pair: list[dict[str, Any]]) -> None:
    alone = losses(WorkerRank())
    assert alone[1] < 0.99 * alone[0], "a loss that stands still would show nothing"
    for result in pair:
        # float32 sums in another order, through four steps of some forty normalisations each
        np.testing.assert_allclose(result["losses"], alone, rtol=1e-3)


def test_alone_and_in_eval_mode_it_is_plain_batchnorm() -> None:
    images, weights = batch()
    plain, shared = nn.BatchNorm2d(3), SharedBatchNorm2d(3)
    for name, value in normalised(plain, images, weights).items():
        if name == "output":
            torch.testing.assert_close(shared(images), value)
    torch.testing.assert_close(shared.eval()(images), plain.eval()(images))
