"""Work of a GPU that is recorded once and then replayed, as CUDA graphs.

The kernels of small networks take less time than a host needs to start them one by one; a graph starts all of them.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")

logger = logging.getLogger(__name__)

_RECORDING = threading.RLock()
"""Held by whoever records: one thread of a process at a time."""
_MOST_SHAPES = 12


def record(device: torch.device, act: Callable[[], Found]) -> tuple[torch.cuda.CUDAGraph, Found]:
    """`act`, which works on that GPU, as a graph, and what it returned: tensors that each replay fills anew.

    Nothing is computed meanwhile. `act` must have run before (`rehearse`), must not read a tensor on the host, and all
    tensors that it gets or changes must stay where they are. Raises RuntimeError where it cannot be recorded.
    """
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    # Of another GPU than the process's current one nothing would be recorded, and nothing said.
    recording = torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local")
    with _RECORDING, torch.cuda.device(device), recording:
        found = act()
    return graph, found


def rehearse(device: torch.device, act: Callable[[], Found]) -> Found:
    """Do `act` on a stream of its own, as recording will: libraries prepare what must not be prepared in a graph."""
    here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    aside.wait_stream(here)
    with _RECORDING, torch.cuda.stream(aside):
        found = act()
    here.wait_stream(aside)
    return found


class _Recorded(NamedTuple):
    inputs: tuple[Tensor, ...]
    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]


class Recorded:
    """A function of tensors on a GPU, recorded for each shape of its inputs when it first meets it.

    Its weights must stay in place. Threads of one stream may call it; they take turns. Where it cannot be recorded it
    runs as it is.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._known: dict[Any, _Recorded | None] = {}
        """None where recording has failed."""
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function gives, in tensors of the caller's own."""
        key = tuple((each.shape, each.dtype, each.device) for each in inputs)
        with self._lock:
            if key not in self._known:
                if len(self._known) == _MOST_SHAPES:
                    del self._known[next(iter(self._known))]
                self._known[key] = self._record(inputs)
            known = self._known[key]
            if known is None:
                return self._function(*inputs)
            for place, each in zip(known.inputs, inputs, strict=True):
                place.copy_(each)
            known.graph.replay()
            return tuple(each.clone() for each in known.outputs)

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded | None:
        places = tuple(each.clone() for each in inputs)
        device = places[0].device
        rehearse(device, lambda: self._function(*places))
        try:
            return _Recorded(places, *record(device, lambda: self._function(*places)))
        except RuntimeError as error:
            logger.warning("an inspection is not recorded: %s", (str(error).splitlines() or [""])[0])
            return None
