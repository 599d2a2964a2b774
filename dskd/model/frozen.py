"""The networks of a finished detector as they inspect images: frozen, and as quick as the device allows."""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn

from dskd.config import Precision
from dskd.model.distances import Discrepancies, discrepancies
from dskd.model.folding import folded_pair
from dskd.model.recording import Recorded
from dskd.model.teacher import Teacher, normalize

_BATCH_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Of a batch. On a CPU a ResNet's first layer then stays below the 32 MiB from which on glibc fetches memory from the
system at every call, which takes longer than what larger batches gain."""
_MOST_IMAGES = {"cpu": 16, "cuda": 64}


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise ValueError for another precision than float32 where there is no GPU."""
    if precision not in get_args(Precision):
        raise ValueError(f"--precision must be one of {', '.join(get_args(Precision))}, got {precision!r}.")
    if precision != "float32" and device.type != "cuda":
        raise ValueError(f"--precision {precision} needs a GPU, got the device {device}; use float32.")


class FrozenNetworks:
    """Teacher and students that do not change any more.

    On a GPU each batch is one replay of a recorded graph, one for every power of two of images.
    """

    def __init__(self, teacher: Teacher, students: nn.Module, precision: Precision = "float32") -> None:
        """The networks as they are, in evaluation mode; `folded` gives quicker ones."""
        self.teacher = teacher
        self.students = students.eval()
        self._precision = precision
        self._device = next(teacher.parameters()).device
        self._recorded = Recorded(self._levels) if self._device.type == "cuda" else None

    @classmethod
    def folded(
        cls, teacher: Teacher, students: nn.Module, side: int, precision: Precision = "float32"
    ) -> "FrozenNetworks":
        """Those of `folded_pair`: the same outputs up to rounding."""
        return cls(*folded_pair(teacher, students, side), precision)

    def batch_size(self, height: int, width: int) -> int:
        """Images of that size that are best seen together."""
        kind = self._device.type if self._device.type in _MOST_IMAGES else "cpu"
        return max(1, min(_MOST_IMAGES[kind], _BATCH_PIXELS[kind] // (height * width)))

    @torch.inference_mode()
    def compare(self, images: UInt8[Tensor, "b height width 3"]) -> Discrepancies:
        """How far the students are from the teacher on images that lie on the networks' device."""
        if self._recorded is None:
            return self.compare_plainly(images)
        count = len(images)
        missing = (1 << (count - 1).bit_length()) - count  # else every number of images would need a graph
        found = iter(self._recorded(F.pad(images, (0, 0) * 3 + (0, missing)) if missing else images))
        encoder, decoder = (
            tuple(level[:count] for level in self._next_levels(found)) if exists else None for exists in self._parts
        )
        return Discrepancies(encoder, decoder)

    @functools.cached_property
    def _parts(self) -> tuple[bool, bool]:
        return self.students.encoder is not None, self.students.decoder is not None

    def _next_levels(self, found: Iterator[Tensor]) -> Iterator[Tensor]:
        return (next(found) for _ in self.teacher.channels)

    def _levels(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.compare_plainly(images)
        return *(found.encoder or ()), *(found.decoder or ())

    def compare_plainly(self, images: UInt8[Tensor, "b height width 3"]) -> Discrepancies:
        """As `compare`, kernel by kernel."""
        pixels = normalize(images)
        with self._rounding():
            targets = self.teacher(pixels)
            outputs = self.students(pixels, targets)
        return discrepancies(targets, outputs.encoder, outputs.decoder)

    def _rounding(self) -> AbstractContextManager[object]:
        if self._precision == "float32":
            return contextlib.nullcontext()
        if self._precision == "tf32":
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
        kind = torch.float16 if self._precision == "float16" else torch.bfloat16
        return torch.autocast(self._device.type, dtype=kind, cache_enabled=False)
