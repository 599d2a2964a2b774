"""A bar for work that takes minutes, on a terminal only and only where the caller gives the work a name."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def shown(steps: Iterable[T], label: str | None, total: int, unit: str) -> Iterable[T]:
    """The same `steps`, counted by a bar on stderr that vanishes at the end; silent where `label` is None."""
    # tqdm's disable=None: draw where stderr is a terminal
    return tqdm(steps, desc=label, total=total, unit=unit, leave=False, disable=None if label else True)
