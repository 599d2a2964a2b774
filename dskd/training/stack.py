"""Students of one architecture that train in one process, on the same batches and one teacher pyramid.

Their weights are stacked, so that each layer is one call for all of them. Every student keeps an optimiser, a loss and
a learning rate of its own, and gets the updates that it would get alone, up to rounding.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from dskd.config import LossConfig, TrainConfig
from dskd.losses import LossTerms, distillation_loss
from dskd.model.distances import Pyramid
from dskd.model.network import StudentPyramids, Students
from dskd.training.loop import build_optimizer


class StudentStack:
    """K students as one: weights with a first axis of size K, and one optimiser for each student's share of them."""

    def __init__(self, students: Sequence[Students], configs: Sequence[TrainConfig]) -> None:
        """Copies of `students`, which have equal architectures; `configs` say how each is optimised.

        Raises ValueError where they differ in the shape of a weight.
        """
        shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in students]
        if not students or len(students) != len(configs) or any(each != shapes[0] for each in shapes):
            raise ValueError(
                f"students of one stack must have equal architectures and a configuration each, got {len(students)} "
                f"students and {len(configs)} configurations; train others on their own."
            )
        self._parts = (students[0].encoder is not None, students[0].decoder is not None)
        self._configs = list(configs)
        # Names of weights that are trained: others, such as those of layers that no loss depends on, have no gradient.
        self._trained = [name for name, value in students[0].named_parameters() if value.requires_grad]
        self._base = copy.deepcopy(students[0]).to("meta").train()
        self._stack(students)
        self.optimizers = [self._optimizer(index) for index in range(len(students))]

    def __len__(self) -> int:
        return len(self._configs)

    def _stack(self, students: Sequence[Students]) -> None:
        parameters, buffers = stack_module_state(list(students))
        self._weights: dict[str, Tensor] = {
            name: value.detach().requires_grad_(name in self._trained) for name, value in parameters.items()
        }
        self._buffers: dict[str, Tensor] = {name: value.detach().clone() for name, value in buffers.items()}

    def _optimizer(self, index: int) -> torch.optim.Optimizer:
        """Over views of one student's share: an update of them is an update of the stack."""
        share = nn.ParameterList(nn.Parameter(self._weights[name].detach()[index]) for name in self._trained)
        return build_optimizer(share, self._configs[index])

    def forward(self, images: Float[Tensor, "b 3 height width"], targets: Pyramid) -> list[StudentPyramids]:
        """Every student's pyramids of the same images."""

        def one(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Pyramid, ...]:
            found = functional_call(self._base, (weights, buffers), (images, targets))
            return tuple(pyramid for pyramid in found if pyramid is not None)

        seen = iter(vmap(one)(self._weights, self._buffers))
        encoders, decoders = (next(seen) if exists else None for exists in self._parts)
        return [
            StudentPyramids(
                *(None if part is None else tuple(level[k] for level in part) for part in (encoders, decoders))
            )
            for k in range(len(self))
        ]

    def step(
        self,
        images: Float[Tensor, "b 3 height width"],
        targets: Pyramid,
        losses: Sequence[LossConfig],
        learning_rates: Sequence[float] | None = None,
        precision: torch.dtype = torch.float32,
    ) -> list[LossTerms]:
        """One step of every student, each by its own loss; the loss terms before the step.

        `precision` is that of the convolutions, as under autocast.
        """
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            outputs = self.forward(images, targets)
        terms = [
            distillation_loss(targets, each.encoder, each.decoder, loss)
            for each, loss in zip(outputs, losses, strict=True)
        ]
        trained = [self._weights[name] for name in self._trained]
        gradients = torch.autograd.grad(torch.stack([each.total for each in terms]).sum(), trained)
        for index, optimizer in enumerate(self.optimizers):
            (group,) = optimizer.param_groups
            if learning_rates is not None:
                group["lr"] = learning_rates[index]
            for weight, gradient in zip(group["params"], gradients, strict=True):
                weight.grad = gradient[index]
            optimizer.step()
        return terms

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """The weights of one student, as its own `state_dict` would give them."""
        return {name: value[index].detach().clone() for name, value in (self._weights | self._buffers).items()}

    def load(self, index: int, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Put a student with the state of its optimiser in the place of another: it goes on where it was."""
        self.set_weights(index, weights)
        self.optimizers[index].load_state_dict(optimizer)

    @torch.no_grad()
    def set_weights(self, index: int, weights: dict[str, Tensor]) -> None:
        """Give one student these weights, in the memory of the stack."""
        for name, value in (self._weights | self._buffers).items():
            value[index].copy_(weights[name])

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with these students alone, in this order; the others leave, and no longer cost anything."""
        states = [copy.deepcopy(self.optimizers[index].state_dict()) for index in indices]
        chosen = list(indices)
        self._configs = [self._configs[index] for index in chosen]
        self._weights = {
            name: value.detach()[chosen].requires_grad_(name in self._trained) for name, value in self._weights.items()
        }
        self._buffers = {name: value[chosen] for name, value in self._buffers.items()}
        self.optimizers = [self._optimizer(index) for index in range(len(chosen))]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
