"""The distance between two feature pyramids, which losses minimise and anomaly maps show."""

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
