"""The advanced teacher of AAND: gates find abnormal features in a pyramid, residuals move them away from normal ones.

Tang et al., arXiv 2405.02068, section "anomaly amplification"; details that are not in the paper follow the released
code. Sizes depend on the teacher's channels; the published sizes are those for WideResNet50-2.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dskd.model.distances import Pyramid
from dskd.model.seeding import seeded
from dskd.model.teacher import Teacher

MAX_HIDDEN = 1024
"""Largest number of hidden channels in a level's perceptrons; otherwise it is twice the level's channels."""
TEMPERATURE = 0.2
"""Temperature of the softmax over the memory; cosines lie in [-1, 1], so a gate lies between 1 / (1 + e^±10)."""
POSITION_BASE = 1e4


class ResidualGate(nn.Module):
    """How abnormal each position is, by its similarity to a learnt memory: the Matching-guided Residual Gate.

    The first half of the memory is normal, the second abnormal; a gate is the abnormal share of the
    softmax over cosines between a position's query and the whole memory.
    Raises ValueError if the number of channels does not allow a position code.
    """

    def __init__(self, channels: int, memory_size: int) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(
                f"amplification needs levels of a multiple of 4 channels (position code), got {channels}; "
                "choose another backbone or other levels."
            )
        self.query = _perceptron(channels)
        self.memory = nn.Parameter(torch.randn(2 * memory_size, channels))

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
        """Gates g in [4.5e-5, 1 - 4.5e-5]: far enough from 0 and 1 that log(g) and log(1 - g) are safe."""
        query = self.query(features + position_code(features))
        keys = F.normalize(self.memory, dim=1)[:, :, None, None]
        cosines = F.conv2d(F.normalize(query, dim=1), keys)  # (B, 2 memory_size, H, W)
        shares = (cosines / TEMPERATURE).softmax(dim=1)
        return shares[:, len(self.memory) // 2 :].sum(dim=1)


class AttributeResidual(nn.Module):
    """The residual to add to an abnormal position: the Attribute-scaling Residual Generator.

    Gains in (-1, 1) times the features themselves, so a full residual scales a channel by 0 to 2
    and never changes its sign.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gains = _perceptron(channels)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The residual of every position."""
        residual: Tensor = torch.tanh(self.gains(features)) * features
        return residual


class LevelAmplifier(nn.Module):
    """Gate and residual of one level: F + w · r."""

    def __init__(self, channels: int, memory_size: int) -> None:
        super().__init__()
        self.gate = ResidualGate(channels, memory_size)
        self.residual = AttributeResidual(channels)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The level with abnormal positions amplified."""
        amplified: Tensor = features + self.gate(features)[:, None] * self.residual(features)
        return amplified


class Amplifier(nn.Module):
    """One amplifier per level; the levels are independent of each other."""

    def __init__(self, channels: tuple[int, ...], memory_size: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(LevelAmplifier(count, memory_size) for count in channels)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """The amplified pyramid."""
        return tuple(amplifier(level) for amplifier, level in zip(self.levels, pyramid, strict=True))


class AmplifiedTeacher(Teacher):
    """A frozen teacher followed by a frozen amplifier.

    It inherits from Teacher, so it can be used wherever a Teacher can.
    """

    def __init__(self, teacher: Teacher, amplifier: Amplifier) -> None:
        super().__init__(teacher.features, teacher.statistics)
        self.amplifier = amplifier.requires_grad_(False)
        self.train(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Pyramid:
        """The amplified pyramid of images from `normalize`."""
        amplified: Pyramid = self.amplifier(super().forward(images))
        return amplified


def build_amplifier(teacher: Teacher, memory_size: int, seed: int) -> Amplifier:
    """An untrained amplifier for `teacher`'s levels; equal seeds give equal weights, on any machine.

    Convolutions are initialised as in He et al., arXiv 1502.01852, for ReLU and fan-out, the memory from a
    standard normal distribution, as in the released code. The caller's random state is not changed.
    Raises ValueError if a level's channels are no multiple of 4.
    """
    with seeded(seed):
        amplifier = Amplifier(teacher.channels, memory_size)
        for module in amplifier.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return amplifier


def position_code(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "c h w"]:
    """Sines and cosines of the column in the first half of the channels, of the row in the second.

    Along each axis as in Vaswani et al., arXiv 1706.03762, section 3.5: frequencies 1e4^(-2i/d) for d = C / 2
    channels, sine and cosine in turn. C is a multiple of 4.
    """
    _, channels, height, width = features.shape
    half = channels // 2
    frequencies = torch.exp(torch.arange(0, half, 2, device=features.device) * (-math.log(POSITION_BASE) / half))

    def axis(length: int) -> Float[Tensor, "half length"]:
        phases = frequencies[:, None] * torch.arange(length, device=features.device)
        return torch.stack([phases.sin(), phases.cos()], dim=1).flatten(0, 1)

    columns = axis(width)[:, None, :].expand(half, height, width)
    rows = axis(height)[:, :, None].expand(half, height, width)
    return torch.cat([columns, rows])


def _perceptron(channels: int) -> nn.Sequential:
    hidden = min(2 * channels, MAX_HIDDEN)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, channels, 1),
    )
