"""Students of one architecture that train in one process and take their steps in one call per layer.

Each keeps a configuration, an optimiser and batches of its own, and gets the updates that it would get alone, up to
rounding.
"""

import copy
import functools
import logging
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dskd.config import LossConfig
from dskd.losses import LossTerms, distillation_loss
from dskd.model.distances import Pyramid
from dskd.model.network import StudentPyramids, Students
from dskd.training.loop import TakeStep, step_alone

logger = logging.getLogger(__name__)

_PATIENCE = 1.0
"""Seconds after which a step is taken without those that are still reading their batches."""


class Batch(NamedTuple):
    """What one student sees in a step."""

    images: Float[Tensor, "b 3 height width"]
    targets: Pyramid
    """The teacher's."""


class StudentStack:
    """The weights of K students with a first axis of size K; the students' own tensors become parts of it.

    So an optimiser of a student updates the stack.
    """

    def __init__(self, students: Sequence[Students]) -> None:
        """Raises ValueError where the students differ in the shape of a weight."""
        shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in students]
        if not students or any(each != shapes[0] for each in shapes):
            raise ValueError(
                f"students of one stack must have equal architectures, got {len(students)} students; "
                "train others on their own."
            )
        first = students[0]
        self._parts = (first.encoder is not None, first.decoder is not None)
        self._base = _without_memory(first).train()
        tensors = [dict(each.named_parameters()) | dict(each.named_buffers()) for each in students]
        self._own = [[(tensor, tensor.data) for tensor in mine.values()] for mine in tensors]
        self._trained = [
            [(name, value) for name, value in each.named_parameters() if value.requires_grad] for each in students
        ]
        stacked = {name: _stacked([mine[name].data for mine in tensors]) for name in tensors[0]}
        for index, mine in enumerate(tensors):
            for name, tensor in mine.items():
                tensor.data = stacked[name][index]
        # Others, such as those of layers that no loss depends on, have no gradient.
        trained = {name for name, _ in self._trained[0]}
        self._weights = {
            name: stacked[name].detach().requires_grad_(name in trained) for name, _ in first.named_parameters()
        }
        self._buffers = {name: stacked[name] for name, _ in first.named_buffers()}

    def __len__(self) -> int:
        return len(self._own)

    def forward(self, batches: Sequence[Batch]) -> list[StudentPyramids]:
        """Each student's pyramids of its own batch; a batch that is the same object for all is not copied."""

        def one(
            weights: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, targets: Pyramid
        ) -> tuple[Pyramid, ...]:
            found = functional_call(self._base, (weights, buffers), (images, targets))
            return tuple(pyramid for pyramid in found if pyramid is not None)

        images, targets = batches[0]
        is_shared = all(each is batches[0] for each in batches)
        if not is_shared:
            images = torch.stack([each.images for each in batches])
            targets = tuple(torch.stack(levels) for levels in zip(*(each.targets for each in batches), strict=True))
        axis = None if is_shared else 0
        seen = iter(vmap(one, in_dims=(0, 0, axis, axis))(self._weights, self._buffers, images, targets))
        encoders, decoders = (next(seen) if exists else None for exists in self._parts)
        return [
            StudentPyramids(
                *(None if part is None else tuple(level[k] for level in part) for part in (encoders, decoders))
            )
            for k in range(len(self))
        ]

    def backward(
        self, batches: Sequence[Batch], losses: Sequence[LossConfig], precision: torch.dtype = torch.float32
    ) -> list[LossTerms]:
        """Put into every student's weights the gradients of its own loss; the terms of the losses.

        `precision` is that of the convolutions, as under autocast. After an error the students are as they were.
        """
        for trained in self._trained:
            for _, weight in trained:
                weight.grad = None
        before = {name: value.clone() for name, value in self._buffers.items()}
        try:
            with torch.autocast(
                batches[0].images.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16
            ):
                outputs = self.forward(batches)
            terms = [
                distillation_loss(batch.targets, each.encoder, each.decoder, loss)
                for batch, each, loss in zip(batches, outputs, losses, strict=True)
            ]
            total = torch.stack([each.total for each in terms]).sum()
            gradients = torch.autograd.grad(total, [self._weights[name] for name, _ in self._trained[0]])
        except Exception:
            for name, value in before.items():
                self._buffers[name].copy_(value)
            raise
        for index, trained in enumerate(self._trained):
            for (_, weight), gradient in zip(trained, gradients, strict=True):
                weight.grad = _in_order_of(weight, gradient[index])
        return terms

    def release(self, index: int) -> None:
        """Give a student its own memory back, with what it has learnt."""
        for tensor, own in self._own[index]:
            own.copy_(tensor.data)
            tensor.data = own


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors with a first axis, (K, …); each keeps its memory order there."""
    first = tensors[0]
    made = torch.empty_strided(
        (len(tensors), *first.shape), (first.numel(), *first.stride()), dtype=first.dtype, device=first.device
    )
    for place, tensor in zip(made, tensors, strict=True):
        place.copy_(tensor)
    return made


def _in_order_of(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the weight's memory order, which fused optimisers require."""
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def _without_memory(module: Students) -> Students:
    """A copy for `functional_call`, without weights."""
    made: dict[int, object] = {
        id(each): nn.Parameter(each.detach().to("meta"), requires_grad=each.requires_grad)
        for each in module.parameters()
    }
    return copy.deepcopy(module, made | {id(each): each.to("meta") for each in module.buffers()})


class _Training:
    """A training between two of its validations."""

    def __init__(self, students: nn.Module, optimizer: torch.optim.Optimizer, loss: LossConfig, kind: Hashable) -> None:
        self.students, self.optimizer, self.loss, self.kind = students, optimizer, loss, kind
        self.batch: Batch | None = None
        """Of the step that it waits for."""
        self.arrived = 0.0
        """When it began to wait."""
        self.is_taken = False
        """Whether that step is being taken."""
        self.is_late = False
        """Whether nobody waits for it, since a step was taken without it."""
        self.result: LossTerms | Exception | None = None
        self.has_gradients = False
        """Whether the result's step is still to be taken by the optimiser."""
        self._stack: StudentStack | None = None
        self._place = 0

    def enter(self, stack: StudentStack, place: int) -> None:
        self._stack, self._place = stack, place

    def is_at(self, stack: StudentStack | None, place: int) -> bool:
        return self._stack is stack and self._place == place

    @property
    def stack(self) -> StudentStack | None:
        """Where its weights lie; None: in its own memory."""
        return self._stack

    def leave(self) -> None:
        """Take the weights out of the stack."""
        if self._stack is not None:
            self._stack.release(self._place)
            self._stack = None

    def step_alone(self) -> None:
        """Take its step by itself; an error becomes the result."""
        assert self.batch is not None
        try:
            self.result = step_alone(self.students, self.optimizer, self.loss, *self.batch)
        except Exception as error:  # raised in its own thread
            self.result = error


class SharedSteps:
    """Where the threads of a process meet that each train one run: those of one architecture step together.

    A thread that brings a batch waits until all of its kind that are between two validations have brought theirs, or
    `_PATIENCE` is over; one of them then takes the step for all. A step that fails for all is taken by each alone, so
    that an error stays with the one that causes it.
    """

    def __init__(self, patience: float = _PATIENCE) -> None:
        self._patience = patience
        self._changed = threading.Condition()
        self._trainings: dict[Hashable, list[_Training]] = {}
        self._busy: set[Hashable] = set()
        """Kinds whose step is being taken."""
        self._ended: dict[Hashable, float] = {}
        """When the last step of a kind ended."""
        self._most: dict[Hashable, int] = {}
        """How many of a kind may step together, where more have failed to."""
        self._turn = threading.Lock()
        """One step at a time: several at once would need more memory and take no less time."""
        self.num_together = 0
        """Steps so far that were taken for several trainings at once."""

    @contextmanager
    def join(
        self, students: nn.Module, optimizer: torch.optim.Optimizer, loss: LossConfig, kind: Hashable
    ) -> Iterator[TakeStep]:
        """The `Join` of `fit`; trainings of one kind have students of one architecture and batches of one size."""
        mine = _Training(students, optimizer, loss, (kind, str(students)))
        with self._changed:
            self._trainings.setdefault(mine.kind, []).append(mine)
        try:
            yield functools.partial(self._step, mine)
        finally:
            with self._changed:
                self._trainings[mine.kind].remove(mine)
                if not self._trainings[mine.kind]:
                    del self._trainings[mine.kind]
                self._changed.notify_all()
            mine.leave()

    def _step(self, mine: _Training, images: Tensor, targets: Pyramid) -> LossTerms:
        with self._changed:
            mine.batch, mine.arrived, mine.is_late, mine.result = Batch(images, targets), time.monotonic(), False, None
            self._changed.notify_all()
            while mine.result is None and not self._may_begin(mine):
                self._changed.wait(self._patience)
            group = self._take(mine.kind) if mine.result is None else []
        if group:
            self._step_all(group)
        if isinstance(mine.result, Exception):
            raise mine.result
        assert mine.result is not None
        if mine.has_gradients:
            mine.optimizer.step()
        return mine.result

    def _may_begin(self, mine: _Training) -> bool:
        """Whether this thread is to take the step for all that wait."""
        if mine.is_taken or mine.kind in self._busy:
            return False
        since = max(mine.arrived, self._ended.get(mine.kind, 0.0))
        is_complete = all(each.batch is not None or each.is_late for each in self._trainings[mine.kind])
        return is_complete or time.monotonic() - since >= self._patience

    def _take(self, kind: Hashable) -> list[_Training]:
        """Those that wait, marked as taken."""
        group = [each for each in self._trainings[kind] if each.batch is not None]
        for each in self._trainings[kind]:
            each.is_taken, each.is_late = each.batch is not None, each.batch is None
        self._busy.add(kind)
        return group

    def _step_all(self, group: Sequence[_Training]) -> None:
        kind = group[0].kind
        try:
            size = self._most.get(kind, len(group))
            for start in range(0, len(group), size):
                self._step_some(group[start : start + size])
        finally:
            with self._changed:
                for each in group:
                    each.batch, each.is_taken = None, False
                    each.result = each.result or RuntimeError("the thread that took the step for others has ended")
                self._busy.discard(kind)
                self._ended[kind] = time.monotonic()
                self._changed.notify_all()

    def _step_some(self, group: Sequence[_Training]) -> None:
        """Set everyone's result."""
        with self._turn:
            if len(group) > 1 and self._step_together(group):
                return
            for each in group:
                each.has_gradients = False
                each.leave()
                each.step_alone()
            if len(group) > 1 and not any(isinstance(each.result, Exception) for each in group):
                self._most[group[0].kind] = max(1, len(group) // 2)

    def _step_together(self, group: Sequence[_Training]) -> bool:
        """Whether one pass could give all of them their gradients."""
        try:
            batches = [cast(Batch, each.batch) for each in group]
            precision = torch.bfloat16 if batches[0].images.is_cuda else torch.float32
            terms = self._stack_of(group).backward(batches, [each.loss for each in group], precision)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            logger.warning("%d trainings step one by one: %s: %s", len(group), type(error).__name__, reason)
            return False
        for each, mine in zip(group, terms, strict=True):
            each.result, each.has_gradients = mine, True
        self.num_together += 1
        return True

    def _stack_of(self, group: Sequence[_Training]) -> StudentStack:
        """The stack of exactly these students; a new one if others were in it, or one has joined."""
        stack = group[0].stack
        if stack is None or len(stack) != len(group) or not all(e.is_at(stack, k) for k, e in enumerate(group)):
            for each in group:
                each.leave()
            stack = StudentStack([cast(Students, each.students) for each in group])
            for place, each in enumerate(group):
                each.enter(stack, place)
        return stack
