"""BatchNorm over the global batch of several workers, on any backend.

`torch.nn.SyncBatchNorm` works only on GPUs. Without this module every CPU worker would normalise only its
own few images, and two workers would train different students than one worker.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Normalise by the mean and variance of all workers' images, equally weighted (Ioffe, Szegedy 2015).

    With a single worker, or in eval mode, it is the same as `nn.BatchNorm2d`.
    """

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The normalised images of this worker; in training all workers must call it together."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        world_size = dist.get_world_size()
        mean = _SumOverWorkers.apply(input.mean((0, 2, 3))) / world_size
        centred = input - mean.view(1, -1, 1, 1)
        variance = _SumOverWorkers.apply(centred.square().mean((0, 2, 3))) / world_size
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            count = world_size * input.numel() // input.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalised: Tensor = centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return normalised


class _SumOverWorkers(torch.autograd.Function):
    """Sum a tensor over all workers; each worker's value is part of every worker's loss, also for the gradients."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def share_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every BatchNorm replaced by one over all workers; the weights are kept."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return converted
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum, device=device)
            shared.load_state_dict(child.state_dict())
            setattr(module, name, shared)
        else:
            share_batchnorm(child, device)
    return module
