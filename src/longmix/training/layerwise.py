"""Mixers learn the outputs of a teacher's mixers, each layer apart from all others.

    loss = mean over layers l and windows w of  |mixer_l(x_wl) - y_wl|^2 / |y_wl|^2

x and y are what the teacher's mixer of the layer is given, behind the norm, and what it returns; the norms are over all
tokens and channels of a window. This is the second stage of MOHAWK (Bick et al. 2024, arXiv 2408.10189, section 3.2),
the attention transfer of LoLCATs (Zhang et al. 2024, arXiv 2410.10254, equation 5) and step 1 of RADLADS (Goldstein et
al. 2025, arXiv 2505.03005), but for the denominator, by which all layers weigh alike and each window by itself: cut
into micro-batches or over processes in any way, a batch has the same loss.

No gradient passes from layer to layer. So the teacher runs once, without gradients, and while it runs each layer is
learned: forward and backward through one mixer, whose activations are then gone. A value residual that a mixer takes
from the first layer is the student's, without its gradient.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from longmix.batch import Batch, documents_of
from longmix.mixers.parts.base import Mixer, MixerOutput
from longmix.mixers.parts.metrics import Measure, accumulate
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Block
from longmix.training import strategies

Backward = Callable[[Tensor], None]


def layers_that_learn(student: LanguageModel, teacher: LanguageModel) -> list[int]:
    """The layers whose mixer is of another class than the teacher's, or has other settings or sizes.

    Args:
        student, teacher: of as many layers.
    """
    pairs = zip(student.mixers(), teacher.mixers(), strict=True)
    return [index for index, (own, theirs) in enumerate(pairs) if _described(own) != _described(theirs)]


def _described(mixer: Mixer) -> list[object]:
    """The classes and settings of a mixer and all its parts, and the shapes of its weights."""
    shapes: list[object] = [(name, weight.shape) for name, weight in mixer.named_parameters()]
    return shapes + [(name, _settings(part)) for name, part in mixer.named_modules()]


def _settings(value: object) -> object:
    """A value by which two settings compare; an object counts as its class and its public attributes."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_settings(item) for item in value]
    if isinstance(value, dict):
        return {key: _settings(item) for key, item in value.items()}
    if type(value).__module__.startswith("torch.") or not (
        isinstance(value, torch.nn.Module)
        or dataclasses.is_dataclass(value)
        or type(value).__module__.startswith("longmix")
    ):
        return type(value)
    attributes = {key: item for key, item in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
    # a mode, and the place of a mixer in the configuration
    left_out = ("training", "kind") if isinstance(value, Mixer) else ("training",)
    return type(value), {key: _settings(item) for key, item in attributes.items() if key not in left_out}


@dataclass
class Learned:
    """What a step's layers learned.

    Attributes:
        layers: each layer's loss, this process's part of it; the mean over processes is the step's.
        losses, metrics: what the mixers measured; see `StepRecord`.
    """

    layers: dict[int, Tensor] = field(default_factory=dict)
    losses: dict[str, Measure] = field(default_factory=dict)
    metrics: dict[str, Measure] = field(default_factory=dict)


class LayerLessons:
    """Lets some layers of a student learn from those of its teacher.

    Args:
        student, teacher: of as many layers and the same width.
        layers: the student's that learn.
        group: the processes that share each row; None if none do.
    """

    def __init__(
        self,
        student: LanguageModel,
        teacher: LanguageModel,
        layers: Collection[int],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.student, self.teacher, self.layers, self.group = student, teacher, layers, group

    def learn(self, micro_batches: list[Batch], backward: Backward) -> Learned:
        """Run the teacher and add to the gradients of the student's mixers; no other weight gets one.

        Args:
            micro_batches: this process's share of a step.
            backward: goes backward from a loss; it is called once for each micro-batch and layer.
        """
        strategies.ready_for_parts(self.student)
        rows = sum(len(batch["tokens"]) for batch in micro_batches)
        slices = 1 if self.group is None else dist.get_world_size(self.group)
        found = Learned()
        for batch in micro_batches:
            pass_ = _Pass(self, batch, found, slices / rows, len(micro_batches), backward)
            with torch.no_grad(), observing(self.teacher, pass_.observe):
                strategies.hidden(self.teacher, batch, self.group)
        return found


class _Pass:
    """One micro-batch: the student's layers learn one after another, as the teacher comes to them."""

    def __init__(
        self, lessons: LayerLessons, batch: Batch, found: Learned, share: float, passes: int, backward: Backward
    ) -> None:
        self.lessons, self.found, self.share, self.passes, self.backward = lessons, found, share, passes, backward
        student, group = lessons.student, lessons.group
        self.blocks = [cast(Block, block) for block in student.blocks]
        given: dict[str, Any]
        if group is None:
            given, state = {"tokens": batch["tokens"], **documents_of(batch)}, None
        else:
            slices, given = strategies.inputs_of_slice(batch, group)
            state = student.slice_state(slices)
        self.states = [None] * len(self.blocks) if state is None else [each.mixer for each in state]
        self.document_ids, self.layouts = student.prepared(state=state, **given)
        takers = [index for index, mixer in enumerate(student.mixers()) if mixer.value_residual]
        self.last_taker = max((index for index in takers if index in lessons.layers), default=-1)
        self.value_residual: Tensor | None = None

    def observe(self, index: int, normed: Tensor, wanted: Tensor) -> None:
        """Learn the layer of which the teacher's mixer has just returned `wanted` for `normed`, both [B, T, D]."""
        if index not in self.lessons.layers:
            if self.value_residual is None and index < self.last_taker:
                self.value_residual = self._mixed(index, normed).value_residual
            return
        with torch.enable_grad():
            mixed = self._mixed(index, normed)
            error = self.share * relative_errors(mixed.y, wanted, self.lessons.group).sum()
            loss = error / len(self.lessons.layers)
            for auxiliary in mixed.losses.values():
                loss = loss + auxiliary / self.passes
            self.backward(loss)
        if self.value_residual is None and mixed.value_residual is not None:
            self.value_residual = mixed.value_residual.detach()
        self.found.layers[index] = self.found.layers.get(index, 0.0) + error.detach()
        accumulate(self.found.losses, mixed.losses)
        accumulate(self.found.metrics, {f"layer_{index}/{name}": value for name, value in mixed.metrics.items()})

    def _mixed(self, index: int, normed: Tensor) -> MixerOutput:
        block = self.blocks[index]
        return block.mix(normed, self.states[index], self.document_ids, self.value_residual, self.layouts[index])


def relative_errors(y: Tensor, wanted: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The squared error of each row over the squares of what was wanted; [B], float32 or better.

    Args:
        y: [B, T, D]; the gradient is with respect to it alone.
        wanted: [B, T, D]. A row of nothing but zeros has the error of one whose squares sum to the least normal number.
        group: the processes that share each row, which must all call it: then the errors are those of this process's
            slice, over the squares of the whole row.
    """
    exact = torch.promote_types(y.dtype, torch.float32)
    wanted = wanted.detach().to(exact)
    squares = wanted.square().sum((1, 2))
    if group is not None:
        dist.all_reduce(squares, group=group)
    return (y.to(exact) - wanted).square().sum((1, 2)) / squares.clamp_min(torch.finfo(exact).tiny)


@contextmanager
def observing(model: LanguageModel, observe: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Within, `observe` is called with each layer's number and its mixer's input and output, as the model runs."""

    def observer(index: int) -> Callable[[Tensor, Tensor], None]:
        return lambda normed, y: observe(index, normed, y)

    blocks = [cast(Block, block) for block in model.blocks]
    try:
        for index, block in enumerate(blocks):
            block.observer = observer(index)
        yield
    finally:
        for block in blocks:
            block.observer = None
