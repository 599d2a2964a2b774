"""The device: its choice, its precision, and the transfer of images to it."""

import ctypes
import functools
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt, from its malloc.h."""
_LARGEST_TENSOR, _MOST_KEPT = 1 << 28, 1 << 29
"""Bytes. 32 images of 256 px give tensors of 134 MB; larger ones, such as tables of features, go back to the system."""
_SHARE = 4
_CHUNK_BYTES = 1 << 26
"""Bytes that are moved to a GPU at once."""


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
        mallopt(_MMAP_THRESHOLD, _LARGEST_TENSOR)
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


def to_device(device: torch.device, array: npt.NDArray[Any] | Tensor, indices: npt.NDArray[np.int64] | slice) -> Tensor:
    """`array[indices]` on `device`; of an array that is there already (`resident`) the indices alone are moved.

    A GPU reads what is moved from page-locked memory while the host goes on to the next batch.
    """
    if isinstance(array, Tensor):
        chosen = indices if isinstance(indices, slice) else to_device(array.device, indices, slice(None))
        return array[chosen].to(device)
    rows = array[indices]
    # A slice of a read-only file is no memory that torch may own.
    found = torch.from_numpy(rows if rows.flags.writeable else rows.copy())
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def to_host(tensor: Tensor) -> Callable[[], npt.NDArray[Any]]:
    """Begin to copy a tensor to the host; the call waits for it. A GPU goes on with other work meanwhile."""
    if not tensor.is_cuda:
        return tensor.numpy
    copy = tensor.to("cpu", non_blocking=True)  # page-locked
    is_there = torch.cuda.Event()
    is_there.record(torch.cuda.current_stream(tensor.device))

    def wait() -> npt.NDArray[Any]:
        is_there.synchronize()
        return np.asarray(copy.numpy())

    return wait


def resident(device: torch.device, array: npt.NDArray[Any]) -> npt.NDArray[Any] | Tensor:
    """`array` in a GPU's memory where it takes at most a quarter of what is free there; else as it is.

    Batches for `to_device` are then chosen there: gathering them on the host takes longer than a step.
    """
    if device.type != "cuda" or array.nbytes * _SHARE > torch.cuda.mem_get_info(device)[0]:
        return array
    rows = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
    found = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, device=device)
    for start in range(0, len(array), rows):
        part = slice(start, start + rows)
        found[part] = to_device(device, array, part)
    return found


def constant(device: torch.device, build: Callable[..., Any], *given: Any) -> Tensor:
    """The tensor of what `build` gives for hashable arguments: on a GPU the same every time.

    The host would wait at every copy until the GPU has done all that it was asked for before.
    """
    if device.type != "cuda":  # nothing is kept that an export has made in a mode of its own
        return torch.tensor(build(*given), device=device)
    return _kept(device, build, *given)


@functools.lru_cache(maxsize=128)
def _kept(device: torch.device, build: Callable[..., Any], *given: Any) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(build(*given), device=device)


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
