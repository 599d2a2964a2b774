"""The device: its choice, its precision, and the transfer of images to it."""

import ctypes
import re
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt, from its malloc.h."""
_LARGEST = 1 << 30


def computing_device(wanted: str) -> torch.device:
    """The device for "auto" (a GPU where there is one), "cpu" or "cuda", and full float32 on it from now on.

    TensorFloat-32 is switched off for the whole process: losses, teacher features and scores are then
    float32 on every device, so that a threshold calibrated on a GPU holds on a CPU. The students' training
    itself runs in bfloat16 on a GPU. On Linux freed memory stays with the process, so that large tensors of the next
    step find theirs. Commands call this; users of the library choose for themselves.

    Raises ValueError on another name and where there is no usable GPU.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {wanted!r}.")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.startswith("cuda") and int(wanted.partition(":")[2] or 0) >= num_gpus:
        raise ValueError(f"--device {wanted}: this machine has {num_gpus or 'no'} usable GPUs; use --device cpu.")
    _keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(("cuda" if num_gpus else "cpu") if wanted == "auto" else wanted)


def _keep_freed_memory() -> None:
    """Let glibc give freed memory to the next tensor and not back to the system.

    It would fetch every tensor of more than 32 MiB from the system, page by page: a sixth of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _LARGEST)


def to_device(device: torch.device, array: npt.NDArray[Any], indices: npt.NDArray[np.int64] | slice) -> Tensor:
    """`array[indices]`, copied to `device`.

    A GPU reads them from page-locked memory while the host goes on to the next batch.
    """
    chosen = array[indices]
    # A slice of a read-only file is no memory that torch may own.
    rows = torch.from_numpy(chosen if chosen.flags.writeable else chosen.copy())
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


class WorkerRank(NamedTuple):
    """This process's place among the `world_size` processes that train together."""

    rank: int = 0
    world_size: int = 1


def mean_over_workers(losses: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        total = losses.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()
    return losses
