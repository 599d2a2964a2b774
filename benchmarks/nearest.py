"""A reference without students: how far each patch of an image is from the nearest patch of the good images.

The idea of PatchCore (Roth et al., CVPR 2022, arXiv 2106.08265), in this project's own terms: its memory holds the
teacher's features, not the students that learn to give them. What is simpler than there: the features are not pooled to
1024 channels, and the image score is the largest distance, not weighted by how crowded its neighbourhood is.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dskd.anomaly import anomaly_maps
from dskd.config import ScoreConfig
from dskd.evaluate import AnomalyScores
from dskd.model.distances import Discrepancies
from dskd.model.features import FeatureTable

_BATCH = 16
_PROJECTED = 128
"""Random projections of the features on which the coreset is chosen, as in PatchCore's code."""
_SCORE = ScoreConfig(score_level_weights=(1.0,), level_fusion="sum", blur_sigma=4.0)


def build_memory(table: FeatureTable, device: torch.device, share: float, seed: int) -> Float[Tensor, "n c"]:
    """The coreset of all patches of good images: `share` of them, at least one."""
    patches = torch.cat([each.flatten(0, 2) for each in _patches(table, device)])
    return patches[coreset(patches, max(1, round(share * len(patches))), seed)]


def coreset(patches: Float[Tensor, "n c"], count: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices of `count` patches such that every patch is near one of them: always the farthest is added.

    Greedy k-center selection, at most twice as far as the best choice would be; on random projections.
    """
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(patches), (1,), generator=generator))
    if patches.shape[1] > _PROJECTED:
        directions = torch.randn(patches.shape[1], _PROJECTED, generator=generator) / _PROJECTED**0.5
        patches = patches @ directions.to(patches.device)
    squares = patches.square().sum(dim=1)
    chosen = torch.full((count,), first, dtype=torch.int64)
    nearest = torch.full_like(squares, torch.inf)
    for position in range(1, count):
        center = patches[chosen[position - 1]]
        nearest = torch.minimum(nearest, squares - 2 * (patches @ center) + center.square().sum())
        chosen[position] = nearest.argmax()
    return chosen.numpy()


@torch.inference_mode()
def score_by_memory(
    table: FeatureTable,
    memory: Float[Tensor, "n c"],
    size: tuple[int, int],
    device: torch.device,
    inside: npt.NDArray[np.bool_] | None = None,
) -> AnomalyScores:
    """Maps (N, H, W) of `size` (H, W) and scores: the distance of each patch from the nearest one in `memory`.

    The maps are 0 where `inside` (N, H, W) is false, and patches that lie there whole have no part in the score.
    """
    maps, scores = [], []
    start = 0
    for patches in _patches(table, device):
        distances = torch.stack([torch.cdist(image.flatten(0, 1), memory).amin(dim=1) for image in patches])
        distances = distances.unflatten(1, patches.shape[1:3])  # (B, H, W)
        heat = anomaly_maps(Discrepancies((distances,), None), _SCORE, size)
        if inside is not None:
            scored = torch.from_numpy(inside[start : start + len(heat)]).to(device)
            heat = heat * scored
            distances = distances * F.adaptive_max_pool2d(scored[:, None].float(), distances.shape[1:])[:, 0]
            start += len(heat)
        maps.append(heat.cpu().numpy())
        scores.append(distances.amax(dim=(1, 2)).cpu().numpy())
    return AnomalyScores(np.concatenate(maps), np.concatenate(scores))


def _patches(table: FeatureTable, device: torch.device) -> Iterator[Float[Tensor, "b h w c"]]:
    """Batches of all images' patches: the levels but the shallowest, each averaged over 3 x 3 positions, together."""
    for start in range(0, len(table.rows), _BATCH):
        levels = table.pyramid(slice(start, start + _BATCH), device)
        levels = levels[1:] or levels
        size: Any = levels[0].shape[-2:]
        averaged = [F.avg_pool2d(level, 3, stride=1, padding=1, count_include_pad=False) for level in levels]
        yield torch.cat(
            [F.interpolate(level, size, mode="bilinear", align_corners=False) for level in averaged], dim=1
        ).movedim(1, 3)
