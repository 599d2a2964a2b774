"""The worker processes of one trial and the resources that each reserves."""

from typing import NamedTuple


class Workers(NamedTuple):
    """Workers that run together; one worker never spans two nodes."""

    number: int
    cpus: float
    """CPUs of one worker."""
    gpus: float
    """GPUs of one worker, fractions allowed."""
    trials: int = 1
    """Trials that share one worker, its CPUs and its GPUs; with several the number of workers is 1."""

    @property
    def needs(self) -> dict[str, float]:
        """Resources that one worker reserves, by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus}
