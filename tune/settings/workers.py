"""The processes of one trial, and what each of them reserves."""

from typing import NamedTuple


class Workers(NamedTuple):
    """Workers that run together, each whole on one node."""

    number: int
    cpus: float
    """CPUs of one worker."""
    gpus: float
    """GPUs of one worker, fractions allowed."""

    @property
    def needs(self) -> dict[str, float]:
        """What one worker reserves, under Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus}
