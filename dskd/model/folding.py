"""Frozen networks for inference: the same outputs up to rounding, in less time."""

import copy
import itertools
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Module = TypeVar("Module", bound=nn.Module)


def folded(module: Module) -> Module:
    """A copy with each BatchNorm in the convolution before it, and weights in the order of `normalize`'s images.

    A layer, or the last one of a sequence, is taken to feed the next one of the same parent, as in the networks of
    torchvision and timm and in ours; whoever calls this for another network compares outputs. For inference alone: the
    copy keeps no gradients.
    """
    found = copy.deepcopy(module).eval().requires_grad_(False)
    for parent in list(found.modules()):
        for (name, first), (norm_name, norm) in itertools.pairwise(parent.named_children()):
            holder, place, layer = parent, name, first
            while isinstance(layer, nn.Sequential) and len(layer):
                holder, place, layer = layer, str(len(layer) - 1), layer[-1]
            if not (isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats):
                continue
            if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) or layer.out_channels != norm.num_features:
                continue
            is_transposed = isinstance(layer, nn.ConvTranspose2d)
            if is_transposed and layer.groups > 1:
                continue
            setattr(holder, place, fuse_conv_bn_eval(layer, norm, transpose=is_transposed))
            # timm's BatchNorm may have an activation inside.
            activation = getattr(norm, "act", None)
            setattr(parent, norm_name, nn.Identity() if activation is None else activation)
    return found.to(memory_format=torch.channels_last)


@torch.inference_mode()
def folded_pair(teacher: Module, students: nn.Module, side: int) -> tuple[Module, nn.Module]:
    """Both folded; as they are where the folded ones give anything else on an image of noise of that side.

    The given networks are put into evaluation mode, as by everything that scores with them.
    """
    teacher.eval()
    students.eval()  # else the noise would enter BatchNorm's statistics
    if not any(isinstance(layer, nn.BatchNorm2d) for part in (teacher, students) for layer in part.modules()):
        return teacher, students
    pair = folded(teacher), folded(students)
    place = next(teacher.parameters()).device
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(place)
    expected, found = teacher(noise), pair[0](noise)
    outputs = [*expected], [*found]
    for pyramid, other in zip(students(noise, expected), pair[1](noise, found), strict=True):
        outputs[0].extend(pyramid or ())
        outputs[1].extend(other or ())
    for level, other in zip(*outputs, strict=True):
        if not (level - other).abs().max() <= _TOLERANCE * level.abs().max():
            return teacher, students
    return pair


_TOLERANCE = 1e-3
"""Of a level's largest value: rounding stays far below, and another wiring far above."""
