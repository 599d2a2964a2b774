"""The frozen teacher: a pretrained timm backbone cut to its feature pyramid."""

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn

from dskd.config import TeacherSource
from dskd.model.distances import Pyramid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HUB_TIMEOUT = 5.0
"""Seconds to wait for the first answer from the hub."""
RANDOM_TEACHER_SEED = 0

# What torch and safetensors raise on damaged files, found by feeding them some.
UNREADABLE = (
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


class TeacherUnavailableError(ValueError):
    """The teacher's pretrained weights cannot be fetched from the hub."""


class Teacher(nn.Module):
    """A frozen backbone: no gradients, and always in eval mode."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features.requires_grad_(False)
        self.train(False)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return pyramid_channels(self.features)

    @property
    def reductions(self) -> tuple[int, ...]:
        """Image pixels per feature position of each level, along one side."""
        return pyramid_reductions(self.features)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: BatchNorm must not adapt to the parts under inspection."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Pyramid:
        """The pyramid of images from `normalize`."""
        return tuple(self.features(images))


def normalize(images: UInt8[Tensor, "b height width 3"]) -> Float[Tensor, "b 3 height width"]:
    """Convert RGB bytes to the input of ImageNet backbones: over ImageNet, each channel has mean 0 and variance 1.

    The result keeps the memory order of the bytes (torch.channels_last), in which convolutions run faster.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)
    std = torch.tensor(IMAGENET_STD, device=images.device)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def build_teacher(backbone: str, levels: tuple[int, ...], weights: str) -> Teacher:
    """The teacher of a timm `backbone`, cut to the feature indices `levels`.

    `weights` is "hub" (timm's pretrained weights, from the local cache if they are there), "random"
    (seeded and untrained: only for checking that the code runs), or a .safetensors or .pth state dict. A state
    dict may hold more than the pyramid needs, such as a classifier.

    Raises TeacherUnavailableError if the hub cannot be reached; ValueError on an unknown backbone or level
    and on a file that is missing, unreadable or does not fit.
    """
    source = TeacherSource(weights)
    if not (source.is_file or source.is_untrained):
        path = _hub_file(backbone)
        # Loaded by timm itself, since it translates older parameter names of each architecture.
        overlay = {"file": str(path)}
        return Teacher(create_features(backbone, levels, pretrained=True, pretrained_cfg_overlay=overlay))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_TEACHER_SEED)
        features = create_features(backbone, levels)
    if source.is_file:
        _load_weights(features, Path(weights))
    return Teacher(features)


def create_features(backbone: str, levels: tuple[int, ...], **options: Any) -> nn.Module:
    """timm's feature extractor of `backbone`, without stages deeper than the last of `levels`.

    Raises ValueError on an unknown backbone or level, and on a backbone whose features are not 2-D maps.
    """
    try:
        features: nn.Module = timm.create_model(backbone, features_only=True, out_indices=levels, **options)
    except IndexError:
        raise ValueError(f"levels must be feature indices of {backbone}, got {levels}; try 1, 2, 3.") from None
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"backbone must be a timm model with features, got {backbone!r}: {_first_line(error)}"
        ) from error
    if str(getattr(features, "output_fmt", "NCHW")).endswith("NHWC"):
        raise ValueError(f"backbone must give features channels first, got {backbone!r}; try a ResNet.")
    return features


def pyramid_channels(features: nn.Module) -> tuple[int, ...]:
    """Channels of each level that a timm feature extractor gives."""
    return tuple(features.feature_info.channels())  # type: ignore[operator, union-attr]


def pyramid_reductions(features: nn.Module) -> tuple[int, ...]:
    """Image pixels per position of each level that a timm feature extractor gives."""
    return tuple(features.feature_info.reduction())  # type: ignore[operator, union-attr]


def weights_fingerprint(teacher: Teacher) -> str:
    """SHA-256, in hex, of every tensor's name, type, shape and bytes; equal on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hub_file(backbone: str) -> Path:
    source = timm.get_pretrained_cfg(backbone) if timm.is_model(backbone) else None
    if source is None or not source.hf_hub_id:
        raise ValueError(f"backbone must be a timm model with weights on the hub, got {backbone!r}.")
    repository, name = source.hf_hub_id, source.hf_hub_filename or "model.safetensors"
    cached = huggingface_hub.try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # Without a network the download alone retries for tens of seconds.
        url = huggingface_hub.hf_hub_url(repository, name)
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT)
        return Path(huggingface_hub.hf_hub_download(repository, name, etag_timeout=HUB_TIMEOUT))
    except Exception as error:  # each HTTP library of the hub's client raises another type for "unreachable"
        raise TeacherUnavailableError(
            f"cannot fetch teacher weights {repository} from the hub ({_first_line(error)}); give a local file with "
            "--teacher-weights FILE, or --teacher-weights random for an untrained teacher to test the wiring."
        ) from error


def _load_weights(features: nn.Module, path: Path) -> None:
    given = {_spelling(name): tensor for name, tensor in _read_state_dict(path).items()}
    found = {}
    for name, tensor in features.state_dict().items():
        match = given.get(_spelling(name))
        if match is None and name.endswith("num_batches_tracked"):
            match = tensor  # missing in old checkpoints, and not used in eval mode
        if match is None:
            raise ValueError(f"teacher weights {path} lack {name!r}; give a state dict of the run's backbone.")
        if match.shape != tensor.shape:
            raise ValueError(
                f"teacher weights {path}: {name!r} must have shape {tuple(tensor.shape)}, "
                f"got {tuple(match.shape)}; give a state dict of the run's backbone."
            )
        if not torch.isfinite(match).all():
            raise ValueError(f"teacher weights {path}: {name!r} holds values that are not finite; give another file.")
        found[name] = match
    features.load_state_dict(found)


def _spelling(name: str) -> str:
    """A parameter name in one spelling: timm's extractor has `stages_0` where the full model has `stages.0`."""
    return name.replace("_", ".")


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"teacher weights must be 'hub', 'random' or an existing .safetensors or .pth file, got {str(path)!r}."
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"teacher weights {path} are not a readable state dict ({_first_line(error)}); give another file."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"teacher weights {path} must map parameter names to tensors; save model.state_dict().")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
