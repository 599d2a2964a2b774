"""The distance between two feature pyramids, which losses minimise and anomaly maps show."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Pyramid = tuple[Float[Tensor, "b _ _ _"], ...]
"""Feature maps of one batch, the shallowest level first."""


def position_distances(teacher: Float[Tensor, "b c h w"], student: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """1 - cos of the two feature vectors at each position, in [0, 2] up to rounding; float32 also under autocast.

    Half the squared distance of the normalised vectors: Wang et al., arXiv 2103.04257, equation 1.

    >>> import torch
    >>> teacher = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]])  # (1, 2, 1, 2): two positions
    >>> position_distances(teacher, torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])).tolist()
    [[[0.0, 1.0]]]
    """
    return 1 - F.cosine_similarity(teacher.float(), student.float(), dim=1)


class Discrepancies(NamedTuple):
    """How far each student is from the teacher at every position; None without that student.

    Cosine distances in [0, 2], one map per level, shallowest first: all that scoring needs, whatever the
    score configuration, and a fraction of the pyramids' size.
    """

    encoder: tuple[Float[Tensor, "b _ _"], ...] | None
    decoder: tuple[Float[Tensor, "b _ _"], ...] | None


Distances = Callable[[Tensor, Tensor], Tensor]


def discrepancies(
    teacher: Pyramid, encoder: Pyramid | None, decoder: Pyramid | None, distances: Distances = position_distances
) -> Discrepancies:
    """1 - cos per position and level (Wang et al., arXiv 2103.04257, equation 1), in float32.

    >>> import torch
    >>> teacher, encoder = torch.tensor([[[[1.0]], [[0.0]]]]), torch.tensor([[[[0.0]], [[2.0]]]])
    >>> discrepancies((teacher,), (encoder,), None)
    Discrepancies(encoder=(tensor([[[1.]]]),), decoder=None)
    """

    def compare(student: Pyramid) -> tuple[Tensor, ...]:
        return tuple(
            # Rounding can leave a negative distance, of which a product's fractional power is not a number.
            distances(target, level).clamp_min(0)
            for target, level in zip(teacher, student, strict=True)
        )

    return Discrepancies(None if encoder is None else compare(encoder), None if decoder is None else compare(decoder))
