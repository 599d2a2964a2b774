"""What students and amplifiers minimise: pure functions from features to a scalar.

All of them compare directions of feature vectors, in float32 also under autocast. A vector of zeros has
no direction and counts as orthogonal to everything, with a finite gradient.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dskd.config import LossConfig
from dskd.distances import Pyramid, position_distances


class LossTerms(NamedTuple):
    """One batch's loss and what it is made of: total = encoder + decoder_weight·decoder + hkd_weight·hard."""

    total: Float[Tensor, ""]
    """What is minimised."""
    encoder: Float[Tensor, ""]
    """Matching loss of the student encoder, summed over the weighted levels; 0 without that student."""
    decoder: Float[Tensor, ""]
    """The same of the student decoder."""
    hard: Float[Tensor, ""]
    """Hard-patch loss of both students, the decoder's times decoder_weight; 0 where hkd_weight is."""
    levels: Float[Tensor, "2 levels"]
    """Matching loss of each level without its weight, encoder then decoder: tells where a loss stops being finite."""


def position_loss(teacher: Float[Tensor, "b c h w"], student: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Mean distance over all positions and images (Wang et al., arXiv 2103.04257, equation 2)."""
    return position_distances(teacher, student).mean()


def flattened_loss(teacher: Float[Tensor, "b c h w"], student: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Mean over the images of 1 - cos of the whole level taken as one vector.

    The form in the released code of Deng, Li, arXiv 2201.10703, not the per-position one of the paper's
    text: positions of large norm weigh more.
    """
    return (1 - F.cosine_similarity(teacher.float().flatten(1), student.float().flatten(1), dim=1)).mean()


def hard_patch_loss(
    teacher: Float[Tensor, "b c h w"], student: Float[Tensor, "b c h w"], *, hardest: int, margin: float
) -> Float[Tensor, ""]:
    """Mean of max(0, distance - margin) over the `hardest` worst-matched positions of each image.

    Tang et al., arXiv 2405.02068, hard knowledge distillation; `margin` (a cosine distance) is ours, and
    0 is the published loss. A level with fewer positions than `hardest` takes part with all of them.
    """
    distances = position_distances(teacher, student).flatten(1)
    worst = distances.topk(min(hardest, distances.shape[1]), dim=1, sorted=False).values
    return torch.relu(worst - margin).mean()


def focal_loss(gate: Float[Tensor, "b h w"], defects: Bool[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Mean over positions of -0.8 (1-w)² log w on defects and -0.2 w² log(1-w) elsewhere, w the gate in (0, 1).

    Lin et al., arXiv 1708.02002, equation 5, with gamma 2 and the weights of the released code of Tang et
    al., arXiv 2405.02068.
    """
    weight = gate.float()
    found = 0.8 * (1 - weight).square() * weight.log()
    spared = 0.2 * weight.square() * torch.log1p(-weight)
    return -torch.where(defects, found, spared).mean()


def amplification_loss(
    normal: Float[Tensor, "n c"],
    abnormal: Float[Tensor, "a c"],
    amplified: Float[Tensor, "a c"],
    *,
    margin: float,
) -> Float[Tensor, ""]:
    """Mean over all pairs of max(0, cos(normal, amplified) - (cos(normal, abnormal) - margin)).

    Every abnormal vector is to become less similar to every normal one by at least `margin`, in cosines.
    Tang et al., arXiv 2405.02068; the margin is subtracted, as in the released code, where some ports
    multiply by it. 0 where there are no pairs.
    """
    if len(normal) == 0 or len(abnormal) == 0:
        return amplified.float().sum() * 0
    units = F.normalize(normal.float(), dim=1)
    before = units @ F.normalize(abnormal.float(), dim=1).T
    after = units @ F.normalize(amplified.float(), dim=1).T
    return torch.relu(after - (before - margin)).mean()


def distillation_loss(
    teacher: Pyramid, encoder: Pyramid | None, decoder: Pyramid | None, config: LossConfig
) -> LossTerms:
    """The loss of one batch; a student that does not exist is None.

    Levels and students of weight 0 stay in the sum, so that every parameter has a gradient (DDP).
    """
    nothing = torch.zeros((), device=teacher[0].device)
    matches = []
    hards = []
    levels = []
    for student, match, margin in (
        (encoder, config.encoder_match, config.encoder_hkd_margin),
        (decoder, config.decoder_match, config.decoder_hkd_margin),
    ):
        match_loss = position_loss if match == "position" else flattened_loss
        matched = hard = nothing
        if student is not None:
            for weight, target, level in zip(config.level_weights, teacher, student, strict=True):
                levels.append(match_loss(target, level))
                matched = matched + weight * levels[-1]
                if config.hkd_weight > 0:
                    hard = hard + weight * hard_patch_loss(target, level, hardest=config.hkd_hardest, margin=margin)
        else:
            levels += [nothing] * len(teacher)
        matches.append(matched)
        hards.append(hard)
    hard = hards[0] + config.decoder_weight * hards[1]
    total = matches[0] + config.decoder_weight * matches[1] + config.hkd_weight * hard
    return LossTerms(total, matches[0], matches[1], hard, torch.stack(levels).detach().unflatten(0, (2, -1)))
