"""Visual anomaly detection by knowledge distillation, on one machine.

Nothing here imports torch until it is used: `import dskd` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dskd.config import VERSION as __version__
from dskd.config import DataConfig, LossConfig, ModelConfig, RunConfig, ScoreConfig, TrainConfig
from dskd.presets import PRESETS

if TYPE_CHECKING:
    from dskd.checkpoint import BrokenDetectorError as BrokenDetectorError
    from dskd.detector import Detector as Detector
    from dskd.detector import Prediction as Prediction
    from dskd.jobs.train import train as train

_LAZY = {
    "BrokenDetectorError": "dskd.checkpoint",
    "Detector": "dskd.detector",
    "Prediction": "dskd.detector",
    "train": "dskd.jobs.train",
}

__all__ = [
    "PRESETS",
    "BrokenDetectorError",
    "DataConfig",
    "Detector",
    "LossConfig",
    "ModelConfig",
    "Prediction",
    "RunConfig",
    "ScoreConfig",
    "TrainConfig",
    "__version__",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dskd' has no attribute {name!r}")
