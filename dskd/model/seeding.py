"""Random initial weights that depend on a seed alone, also where several threads of a process build networks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.RLock()
"""Held by whoever draws from torch's generator, which all threads of a process share."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch draw from `seed` on the CPU; afterwards the caller's random state is what it was."""
    with _LOCK, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the caller's accelerators as well.
        torch.default_generator.manual_seed(seed)
        yield


def reseed(seed: int) -> None:
    """Seed torch on every device, but not while another thread draws."""
    with _LOCK:
        torch.manual_seed(seed)
