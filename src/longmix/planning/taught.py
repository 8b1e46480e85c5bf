"""The memory of steps that learn from a teacher, `objective=layers` and `logits`, found by dry runs as all else is.

The teacher runs without gradients, one layer after another. With `layers`, a layer of the student goes forward and
backward while the teacher is at that layer, so that the activations of one mixer are held at a time, and the mixers
that learn have gradients and moments, nothing else. With `logits`, the student's step follows the teacher's pass, of
which the last hidden states remain.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from longmix.mixers.parts.layout import Layout, LayoutNeeds, needs_of
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Block
from longmix.planning.dry_run import Part, Setting, autocast, kind_of, materialise, measured_part, shared_layouts
from longmix.planning.fakes import gpu_functions
from longmix.planning.memory_tracker import Ledger
from longmix.training.distillation import LAYERS
from longmix.training.layerwise import layers_that_learn, relative_errors
from longmix.training.strategies import names_of_product_weights
from longmix_kernels.runtime import assumed_device


@dataclass(frozen=True)
class Passing:
    """Bytes of a layer of the teacher in its pass, besides its weights and its input.

    Attributes:
        peak: the most that it holds.
        observed: what it holds when its mixer has returned.
        given, wanted: dtypes of the mixer's input and output.
        parameters: number of its weights.
        moved: bytes that operators other than products of matrices read and write.
    """

    peak: int
    observed: int
    given: torch.dtype
    wanted: torch.dtype
    parameters: int
    moved: int


@dataclass(frozen=True)
class Lesson:
    """A layer of the student that learns its teacher's outputs.

    Attributes:
        part: of its mixer alone.
        rounded: bytes of its weights as autocast keeps them until a step ends.
        block: number of the whole layer's weights, which FSDP gathers together.
        y: bytes of its mixer's output, which is there until its backward pass has ended.
    """

    part: Part
    rounded: int
    block: int
    y: int

    @property
    def held(self) -> int:
        """What it holds between its passes."""
        return self.y + self.part.kept + self.part.output

    @property
    def peak(self) -> int:
        """The most that it holds, its new gradients included."""
        return self.held + max(self.part.forward, self.part.backward)


@dataclass(frozen=True)
class Teaching:
    """What a step needs because of a teacher.

    Attributes:
        objective: "layers" or "logits".
        parameters: number of the teacher's weights.
        ends: those of them outside the layers.
        stream: bytes of what goes from layer to layer.
        hidden: bytes of the last hidden states.
        layouts: bytes of what its layers share.
        passing: of each layer of the teacher.
        lessons: of the student's layers that learn, by number; none with "logits".
    """

    objective: str
    parameters: int
    ends: int
    stream: int
    hidden: int
    layouts: int
    passing: list[Passing]
    lessons: dict[int, Lesson]

    @property
    def learns_layers(self) -> bool:
        """Whether layers learn one after another, and not the whole model at once."""
        return self.objective == LAYERS


def rehearse_teaching(
    student: LanguageModel, teacher: LanguageModel, setting: Setting, dtype: torch.dtype, objective: str
) -> Teaching:
    """Run a layer of each kind of the teacher, and each kind that learns of the student.

    Args:
        student, teacher: on the meta device; they are not changed.
        setting: how they are run.
        dtype: of the input of layers.
        objective: "layers" or "logits".
    """
    for mixer in (*student.mixers(), *teacher.mixers()):
        mixer.prepare(setting.length)
    blocks = [cast(Block, block) for block in teacher.blocks]
    own = [cast(Block, block) for block in student.blocks]
    learn = layers_that_learn(student, teacher) if objective == LAYERS else []
    copies = {kind_of(block): copy.deepcopy(block) for block in blocks}
    learners = {kind_of(own[index]): copy.deepcopy(own[index].mixer) for index in learn}
    shape = (setting.rows, setting.length, teacher.shape.d_model)
    with assumed_device(setting.device), FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.empty(shape[:2], dtype=torch.int32)
        made, of_teacher = shared_layouts(teacher, ids)
        passing = {kind: _passing(block, shape, dtype, ids, made, setting) for kind, block in copies.items()}
        first = passing[kind_of(blocks[0])]
        made, of_student = shared_layouts(student, ids)
        parts = {kind: _lesson(mixer, shape, first, ids, made, setting) for kind, mixer in learners.items()}
    products = names_of_product_weights(student) if setting.precision == "bf16-mixed" else set()
    hidden = shape[0] * shape[1] * shape[2]
    lessons = {}
    for index in learn:
        prefix = f"blocks.{index}.mixer."
        rounded = sum(student.get_parameter(name).numel() for name in products if name.startswith(prefix))
        lessons[index] = Lesson(
            parts[kind_of(own[index])], 2 * rounded, _numbers(own[index]), hidden * first.wanted.itemsize
        )
    return Teaching(
        objective=objective,
        parameters=_numbers(teacher),
        ends=_numbers(teacher) - sum(map(_numbers, blocks)),
        stream=hidden * dtype.itemsize,
        hidden=hidden * dtype.itemsize,
        layouts=of_teacher + (of_student if objective == LAYERS else 0),
        passing=[passing[kind_of(block)] for block in blocks],
        lessons=lessons,
    )


def _numbers(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _passing(
    block: Block,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    ids: torch.Tensor,
    made: dict[LayoutNeeds, Layout],
    setting: Setting,
) -> Passing:
    materialise(block, setting)
    block.eval().requires_grad_(False)
    x = torch.empty(shape, dtype=dtype)
    others = None, ids, None, _layout(block.mixer, made)
    seen: list[tuple[int, torch.dtype, torch.dtype]] = []
    known = [*block.parameters(), *block.buffers(), x, ids, *_tensors(others[-1])]
    functions = gpu_functions() if setting.device == "cuda" else contextlib.nullcontext()
    with Ledger(known) as ledger, autocast(setting), torch.no_grad(), functions:
        block(x, *others)
        before = ledger.mark()
        block.observer = lambda given, y: seen.append((ledger.live - before, given.dtype, y.dtype))
        block(x, *others)
        peak, moved = ledger.peak - before, ledger.moved
    return Passing(peak, *seen[0], _numbers(block), moved)


def _lesson(
    mixer: Any,
    shape: tuple[int, ...],
    passing: Passing,
    ids: torch.Tensor,
    made: dict[LayoutNeeds, Layout],
    setting: Setting,
) -> Part:
    materialise(mixer, setting)
    given, wanted = torch.empty(shape, dtype=passing.given), torch.empty(shape, dtype=passing.wanted)
    layout = _layout(mixer, made)
    options = {} if layout is None else {"layout": layout}

    def call() -> tuple[torch.Tensor, list[torch.Tensor], Any]:
        mixed = mixer(given, document_ids=ids, **options)
        return relative_errors(mixed.y, wanted).sum(), list(mixed.losses.values()), mixed.value_residual

    return measured_part(call, mixer, [given, wanted, ids, *_tensors(layout)], setting)


def _layout(mixer: Any, made: dict[LayoutNeeds, Layout]) -> Layout | None:
    needs = needs_of(mixer)
    return None if needs is None else made[needs]


def _tensors(layout: Layout | None) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(layout) if isinstance(leaf, torch.Tensor))
