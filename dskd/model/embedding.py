"""The deep feature embedding between the two students: a pyramid condensed into one small map."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dskd.model.distances import Pyramid
from dskd.model.students import level_halvings, residual_stage


class DeepFeatureEmbedding(nn.Module):
    """Condense a pyramid into one map of half the deepest level's resolution and twice its channels.

    The one-class bottleneck of Deng, Li, arXiv 2201.10703, section 3.2: every level is brought to the
    deepest one's resolution by strided 3x3 convolutions and concatenated, then `depth` residual blocks
    follow, the first with stride 2. The DSKD paper does not describe this module; we use that of RD4AD
    instead, which is our assumption. `bottleneck` as in `BlockStyle`. Every level of the pyramid has
    `num_sources` times `channels`: pyramids that are condensed together are concatenated level by level.

    Raises ValueError if the resolution does not halve from level to level.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        reductions: tuple[int, ...],
        depth: int,
        bottleneck: float | None,
        num_sources: int = 1,
    ) -> None:
        super().__init__()
        halvings = level_halvings(reductions)
        # The numbers of channels that each level goes through on its way down to the deepest level.
        paths = [
            [num_sources * channels[i]] + [channels[j + 1] for j in range(i, len(halvings)) for _ in range(halvings[j])]
            for i in range(len(channels))
        ]
        self.reducers = nn.ModuleList(_reducer(path) for path in paths)
        self.out_channels = 2 * channels[-1]
        self.condense = residual_stage(sum(path[-1] for path in paths), self.out_channels, "down", 1, depth, bottleneck)

    def forward(self, pyramid: Pyramid) -> Float[Tensor, "b c h w"]:
        """The embedding of a pyramid."""
        reduced = [reducer(level) for reducer, level in zip(self.reducers, pyramid, strict=True)]
        embedding: Tensor = self.condense(torch.cat(reduced, dim=1))
        return embedding


def _reducer(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
