"""Visual anomaly detection by knowledge distillation, on one machine.

Nothing here imports torch until it is used: `import dskd` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dskd.config import DataConfig, LossConfig, ModelConfig, RunConfig, ScoreConfig, TrainConfig
from dskd.presets import PRESETS

if TYPE_CHECKING:
    from dskd.checkpoint import BrokenDetectorError as BrokenDetectorError
    from dskd.detector import Detector as Detector
    from dskd.detector import Prediction as Prediction

__version__ = "0.1.0"
"""As in pyproject.toml; here for copies that are not installed, as in a served model."""

_LAZY = {"BrokenDetectorError": "dskd.checkpoint", "Detector": "dskd.detector", "Prediction": "dskd.detector"}

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
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dskd' has no attribute {name!r}")
