"""Optimiser steps on a GPU whose gradients are recorded once as a CUDA graph and then replayed.

A step of these small networks is some hundred short kernels: the host takes several times as long to start them as the
GPU to run them.
"""

import logging

import torch
from torch import Tensor, nn

from dskd.config import LossConfig
from dskd.losses import LossTerms
from dskd.model.distances import Pyramid
from dskd.model.recording import record, rehearse
from dskd.training.loop import TakeStep, gradients, plain_step

logger = logging.getLogger(__name__)

NUM_REHEARSALS = 3
"""Steps before the recording: in the first ones libraries choose their algorithms and allocate what they keep."""


def quickest_step(device: torch.device, num_workers: int = 1) -> TakeStep:
    """How one training takes its steps there: recorded on a GPU, unless it is wrapped for DDP."""
    return RecordedSteps() if device.type == "cuda" and num_workers == 1 else plain_step


class RecordedSteps:
    """The `TakeStep` of one training on one GPU; the results are those of `plain_step`.

    The first steps are taken as usual, and so are all of them where recording fails. The students' weights must stay in
    place, and every batch must have the size of the first.
    """

    def __init__(self) -> None:
        self._num_taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._images: Tensor | None = None
        self._targets: Pyramid = ()
        self._terms: LossTerms | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed by now."""
        return self._graph is not None

    def __call__(
        self, students: nn.Module, optimizer: torch.optim.Optimizer, loss: LossConfig, images: Tensor, targets: Pyramid
    ) -> LossTerms:
        """One step; always of the same students, optimiser and loss."""
        self._num_taken += 1
        if self._num_taken <= NUM_REHEARSALS:
            return rehearse(images.device, lambda: plain_step(students, optimizer, loss, images, targets))
        if self._num_taken == NUM_REHEARSALS + 1:
            self._record(students, optimizer, loss, images, targets)
        if self._graph is None or self._images is None or self._terms is None:
            return plain_step(students, optimizer, loss, images, targets)
        self._images.copy_(images)
        for place, level in zip(self._targets, targets, strict=True):
            place.copy_(level)
        self._graph.replay()
        optimizer.step()
        return self._terms

    def _record(
        self, students: nn.Module, optimizer: torch.optim.Optimizer, loss: LossConfig, images: Tensor, targets: Pyramid
    ) -> None:
        # In the order of the students' outputs, with which the losses combine them.
        wanted = tuple(level.contiguous(memory_format=torch.channels_last).clone() for level in targets)
        seen = images.clone()
        optimizer.zero_grad(set_to_none=True)  # so that the gradients lie in the graph's memory, and are not added up
        try:
            graph, terms = record(images.device, lambda: gradients(students, loss, seen, wanted))
        except RuntimeError as error:
            logger.warning("steps are not recorded: %s", (str(error).splitlines() or [""])[0])
            return
        self._graph, self._terms, self._images, self._targets = graph, terms, seen, wanted
