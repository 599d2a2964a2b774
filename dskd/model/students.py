"""The two students: one with the teacher's architecture, and one with the reversed architecture."""

import copy
import itertools
from typing import Literal, NamedTuple

import timm
import torch
from jaxtyping import Float
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from dskd.model.distances import Pyramid
from dskd.model.teacher import create_features

Scale = Literal["down", "same", "up"]


class BlockStyle(NamedTuple):
    """The residual blocks that embedding and decoder take over from the teacher."""

    bottleneck: float | None
    """Inner channels / outer channels of a bottleneck block; None: a basic block of two 3x3 convolutions."""
    blocks: tuple[int, ...]
    """Residual blocks of each teacher stage, shallowest first."""


def block_style(features: nn.Module, levels: tuple[int, ...]) -> BlockStyle:
    """The block type of a timm ResNet and the blocks per level; for other backbones two basic blocks per level."""
    stages = [list(stage.children()) if (stage := getattr(features, f"layer{level}", None)) else [] for level in levels]
    block = next((stage[0] for stage in stages if stage), None)
    blocks = tuple(len(stage) or 2 for stage in stages)
    if isinstance(block, Bottleneck):
        return BlockStyle(block.conv2.out_channels / block.conv3.out_channels, blocks)
    return BlockStyle(None, blocks)


class ResidualBlock(nn.Module):
    """The block of He et al., arXiv 1512.03385, figure 5, which can also double the resolution instead of halving it.

    "up" replaces the spatial convolution (the first one, if there are two) and the shortcut by transposed
    convolutions with kernel 2 and stride 2, as in RD4AD's code.
    """

    def __init__(self, inputs: int, outputs: int, scale: Scale, bottleneck: float | None) -> None:
        super().__init__()
        if bottleneck is None:
            self.residual = nn.Sequential(
                _spatial(inputs, outputs, scale),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
                _spatial(outputs, outputs, "same"),
                nn.BatchNorm2d(outputs),
            )
        else:
            inner = max(1, round(outputs * bottleneck))
            self.residual = nn.Sequential(
                nn.Conv2d(inputs, inner, 1, bias=False),
                nn.BatchNorm2d(inner),
                nn.ReLU(inplace=True),
                _spatial(inner, inner, scale),
                nn.BatchNorm2d(inner),
                nn.ReLU(inplace=True),
                nn.Conv2d(inner, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
        self.shortcut = _shortcut(inputs, outputs, scale)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h_out w_out"]:
        """Non-negative features, at half, the same or twice the resolution."""
        return torch.relu(self.residual(x) + self.shortcut(x))


def residual_stage(
    inputs: int, outputs: int, scale: Scale, num_scaling: int, num_blocks: int, bottleneck: float | None
) -> nn.Sequential:
    """`num_blocks` residual blocks, the first `num_scaling` of which change the resolution."""
    return nn.Sequential(
        *(
            ResidualBlock(inputs if i == 0 else outputs, outputs, scale if i < num_scaling else "same", bottleneck)
            for i in range(num_blocks)
        )
    )


class StudentEncoder(nn.Module):
    """The teacher's backbone, untrained; it learns to give the teacher's features on normal images (STFPM).

    Layers deeper than the last level are not trained, and with a ResNet they are not even built.
    """

    def __init__(self, backbone: str, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.features = create_features(backbone, levels)
        source = timm.get_pretrained_cfg(backbone)
        _freeze_unused(self.features, source.input_size if source else (3, 224, 224))

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Pyramid:
        """The student's own pyramid, shaped as the teacher's."""
        return tuple(self.features(images))


class StudentDecoder(nn.Module):
    """A reversed backbone that reconstructs the teacher's pyramid from an embedding.

    Deng, Li, arXiv 2201.10703, section 3.1 and code: one stage per level, the deepest first, and each stage
    starts with up-sampling blocks. The stages have the teacher's numbers of blocks in the teacher's order, so
    for a (3, 4, 6) teacher the 6 blocks are at the highest resolution. Each stage ends with a ReLU, as the ResNets of
    that paper do; for teachers whose features can be negative a linear layer follows.
    """

    def __init__(
        self,
        inputs: int,
        channels: tuple[int, ...],
        reductions: tuple[int, ...],
        style: BlockStyle,
        linear: tuple[bool, ...] | None = None,
    ) -> None:
        """`linear`: for each level whether a linear layer follows, so that it can be negative; None: no level."""
        super().__init__()
        outputs = channels[::-1]
        self.outputs = nn.ModuleList(
            nn.Conv2d(count, count, 1) if is_linear else nn.Identity()
            for count, is_linear in zip(outputs, (linear or (False,) * len(channels))[::-1], strict=True)
        )
        doublings = (1, *level_halvings(reductions)[::-1])
        self.stages = nn.ModuleList(
            residual_stage(source, target, "up", ups, max(blocks, ups), style.bottleneck)
            for source, target, ups, blocks in zip(
                (inputs, *outputs[:-1]), outputs, doublings, style.blocks, strict=True
            )
        )

    def forward(self, embedding: Float[Tensor, "b c h w"]) -> Pyramid:
        """The pyramid, shallowest first, its deepest level at twice the embedding's resolution."""
        levels = []
        features = embedding
        for stage, output in zip(self.stages, self.outputs, strict=True):
            features = stage(features)
            levels.append(output(features))
        return tuple(reversed(levels))


def level_halvings(reductions: tuple[int, ...]) -> tuple[int, ...]:
    """How often the resolution halves from each level to the next deeper one.

    Raises ValueError if a step is not a power of two.
    """
    halvings = []
    for shallow, deep in itertools.pairwise(reductions):
        ratio = deep // shallow
        if deep % shallow or ratio & (ratio - 1):
            raise ValueError(f"levels must halve the resolution step by step, got reductions {reductions}.")
        halvings.append(ratio.bit_length() - 1)
    return tuple(halvings)


def _freeze_unused(features: nn.Module, image_shape: tuple[int, ...]) -> None:
    # timm does not remove the layers after the deepest level in every family, and DDP fails on a trainable parameter
    # that no output depends on. The meta device finds these parameters without computing anything.
    twin = copy.deepcopy(features).to("meta").eval()
    total = torch.stack([level.sum() for level in twin(torch.zeros(1, *image_shape, device="meta"))]).sum()
    gradients = torch.autograd.grad(total, list(twin.parameters()), allow_unused=True)
    for parameter, gradient in zip(features.parameters(), gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _spatial(inputs: int, outputs: int, scale: Scale) -> nn.Module:
    if scale == "up":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    return nn.Conv2d(inputs, outputs, 3, stride=2 if scale == "down" else 1, padding=1, bias=False)


def _shortcut(inputs: int, outputs: int, scale: Scale) -> nn.Module:
    if scale == "same" and inputs == outputs:
        return nn.Identity()
    if scale == "up":
        projection: nn.Module = nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    else:
        projection = nn.Conv2d(inputs, outputs, 1, stride=2 if scale == "down" else 1, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(outputs))
