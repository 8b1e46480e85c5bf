"""The memory that one device needs at the worst moment of a training step, by purpose.

The plan follows a step: the forward passes of the layers, the turning point at the loss, the backward passes, the
optimizer. For each moment it adds up the memory of the parts from their dry runs. The largest sum counts.

Assumed, not found by a dry run: a CUDA context and NCCL, and the buffers of DDP and FSDP (`communication`). Left out:
memory that a kernel allocates and frees within one call.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from longmix.model.backbone import LanguageModel
from longmix.planning.arguments import Variant
from longmix.planning.communication import Buffers, ShardedBuffers
from longmix.planning.dry_run import OptimizerNeeds, Part, Rehearsal, Setting
from longmix.planning.taught import Teaching

GIB = 2**30

CONTEXT_BYTES = GIB
"""Bytes of a CUDA context with its libraries; NCCL takes as much again where there are several processes."""

USABLE = 0.95
"""Share of the remaining memory that the allocator can use; the rest is lost between blocks of other sizes."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the worst moment.

    Attributes:
        moment: its name.
        parts: bytes by purpose.
        limit: bytes that a device can provide.
        host: bytes of the host's memory that hold activations of this device.
    """

    moment: str
    parts: dict[str, int]
    limit: int
    host: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the device has this much memory."""
        return self.total <= self.limit


@dataclass(frozen=True)
class Division:
    """The division of a run over processes and passes.

    Attributes:
        processes: all of them.
        context_parallel: those that share a window.
        strategy: as in `Variant`.
        micro_batches: forward and backward passes of a process in a step.
    """

    processes: int
    context_parallel: int
    strategy: str
    micro_batches: int

    @staticmethod
    def of(variant: Variant, processes: int, rows: int) -> "Division":
        """The division that a variant makes, for the windows of one process."""
        return Division(processes, variant.context_parallel, variant.strategy, rows // variant.micro_batch_size)


def memory_needed(
    model: LanguageModel,
    rehearsal: Rehearsal,
    optimizer: OptimizerNeeds,
    setting: Setting,
    division: Division,
    limit: int,
    carried: int = 0,
    averaged: int = 0,
    teaching: Teaching | None = None,
) -> Memory:
    """Add up the worst moment of a step.

    Args:
        model: on the meta device.
        rehearsal: of its parts, in `setting`.
        optimizer: of undivided weights.
        setting: of one process.
        division: of the run.
        limit: bytes that a device has.
        carried: bytes of the states that rows carry from step to step, before a step and after it.
        averaged: bytes of the undivided weights' averages.
        teaching: what a teacher needs; None without one.
    """
    parts = [rehearsal.ends, *rehearsal.layers]
    size = 2 if setting.precision == "bf16-true" else 4
    parameters = sum(part.parameters for part in parts)
    shards = division.processes if setting.sharded else 1
    fixed = {
        "weights": parameters * size // shards,
        "teacher": 0 if teaching is None else _of_teacher(teaching, setting, size, shards),
        "optimizer": optimizer.state // shards,
        "averaged weights": averaged // shards,
        "data": setting.rows * division.micro_batches * setting.length * division.context_parallel * (8 + 8 + 4),
        "carried state": carried,
    }
    learning = parts
    if teaching is not None and teaching.learns_layers:
        learning = [lesson.part for lesson in teaching.lessons.values()]
    host = sum(pinned(part.offloaded) for part in rehearsal.layers)
    everything = sum(_lasting(part, setting, division) for part in learning)
    exchanged = optimizer.exchanged // shards if shards > 1 else 0
    buffers = _buffers(rehearsal, setting, division)
    if teaching is not None and teaching.learns_layers:
        moments = _lessons(teaching, setting, division, buffers)
    else:
        moments = _moments(model, rehearsal, setting, division, buffers, teaching)
    step = Moment("optimizer", everything, 0, optimizer.working + exchanged, buffers.always)
    worst = max([*moments, step], key=lambda moment: moment.total)
    varying = {
        "communication": worst.communication,
        "gradients": worst.gradients,
        "activations": worst.activations,
        "working": worst.working,
    }
    context = 0 if setting.device == "cpu" else CONTEXT_BYTES * (1 if division.processes == 1 else 2)
    usable = limit if setting.device == "cpu" else int((limit - context) * USABLE)
    held = {name: size for name, size in (fixed | varying).items() if size}
    return Memory(worst.name, held, usable, host)


@dataclass(frozen=True)
class Moment:
    """Memory that is held at one moment only."""

    name: str
    gradients: int
    activations: int
    working: int
    communication: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return self.gradients + self.activations + self.working + self.communication


def _lessons(teaching: Teaching, setting: Setting, division: Division, buffers: Buffers) -> Iterator[Moment]:
    """Layers that learn one after another while the teacher runs; gradients of other micro-batches are there already.

    Under autocast the rounded weights of a layer that has learned stay until the step ends.
    """
    waits = division.micro_batches > 1
    lasting = {index: _lasting(lesson.part, setting, division) for index, lesson in teaching.lessons.items()}
    made = sum(lasting.values()) if waits else 0
    rounded = sum(lesson.rounded for lesson in teaching.lessons.values()) if waits else 0
    held = teaching.stream + teaching.layouts
    for index, passing in enumerate(teaching.passing):
        theirs = passing.parameters * setting.weight_dtype.itemsize if setting.sharded else 0
        lesson = teaching.lessons.get(index)
        if lesson is not None:
            own = lesson.block * setting.weight_dtype.itemsize if setting.sharded else 0
            gathered = buffers.always + theirs + own
            working, idle = passing.observed + lesson.peak, passing.observed + lesson.held
            yield Moment(f"lesson of layer {index}", made, held + rounded, working, gathered)
            yield Moment(f"gather of layer {index} again", made, held + rounded, idle, gathered + own)
            if not waits:
                made, rounded = made + lasting[index], rounded + lesson.rounded
        yield Moment(f"layer {index} of the teacher", made, held + rounded, passing.peak, buffers.always + 2 * theirs)


def _of_teacher(teaching: Teaching, setting: Setting, size: int, shards: int) -> int:
    """Bytes of the teacher's weights that are always there: FSDP leaves those outside its layers gathered."""
    own = teaching.parameters * size // shards
    return own + (teaching.ends * setting.weight_dtype.itemsize if setting.sharded else 0)


def _moments(
    model: LanguageModel,
    rehearsal: Rehearsal,
    setting: Setting,
    division: Division,
    buffers: Buffers,
    teaching: Teaching | None = None,
) -> Iterator[Moment]:
    """The last micro-batch of a step; gradients of the others are there from the beginning.

    A teacher runs first, and its last hidden states stay until the loss has gone backward.

    What a layer offloads leaves while the next one computes, and is back before its own backward pass, during that of
    the layer after it.
    """
    ends, layers = rehearsal.ends, rehearsal.layers
    lasting = [_lasting(part, setting, division) for part in layers]
    waits = division.micro_batches > 1
    before = sum(lasting) + _lasting(ends, setting, division) if waits else 0
    stream = layers[0].output
    taught = 0
    if teaching is not None:
        taught = teaching.hidden
        for index, passing in enumerate(teaching.passing):
            theirs = 2 * passing.parameters * setting.weight_dtype.itemsize if setting.sharded else 0
            activations, gathered = teaching.stream + teaching.layouts, buffers.always + theirs
            yield Moment(f"layer {index} of the teacher", before, activations, passing.peak, gathered)
    held = stream + rehearsal.layouts + taught
    for index, part in enumerate(layers):
        yield Moment(f"gather of layer {index}", before, held, 0, buffers.gather(index))
        held += part.kept + part.output
        leaving = layers[index - 1].offloaded if index > 0 else 0
        yield Moment(f"forward of layer {index}", before, held + leaving, part.forward, buffers.forward(index))
        held -= part.input_offloaded + part.input_let_go
    turning = held + ends.kept - stream  # the dry run of the ends had the stream of one layer between them
    yield Moment("loss", before, turning, max(ends.forward, ends.backward), buffers.loss)
    held -= taught
    head = _lasting(ends, setting, division)
    if model.head.weight is not model.embedding.weight:
        head -= _lasting_of(model.embedding.weight.numel(), ends, setting, division)
    made = before if waits else head - rehearsal.shared // (division.processes if setting.sharded else 1)
    for index in reversed(range(len(layers))):
        part = layers[index]
        following = layers[index + 1] if index < len(layers) - 1 else None
        if following is None or not following.input_offloaded + following.input_let_go:
            held -= part.output  # kept by what follows alone, whose backward pass is over
        coming = layers[index - 1].offloaded if index > 0 else 0
        yield Moment(f"gather of layer {index} again", made, held, part.output, buffers.gather_again(index))
        working = part.output + part.backward + coming
        yield Moment(f"backward of layer {index}", made, held, working, buffers.backward(index))
        held -= part.kept
        made += rehearsal.shared if index == rehearsal.first_of_shared else 0
        yield Moment(f"exchange of layer {index}", made, held, part.output, buffers.exchange(index))
        made += 0 if waits else lasting[index]
    yield Moment("backward of the embedding", made, held, stream + ends.gradients, buffers.embedding)


def pinned(size: int) -> int:
    """Bytes of pinned memory that torch takes for so many: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _lasting(part: Part, setting: Setting, division: Division) -> int:
    """Bytes of a part's gradients from its backward pass until the optimizer's step."""
    return _lasting_of(part.parameters, part, setting, division)


def _lasting_of(parameters: int, part: Part, setting: Setting, division: Division) -> int:
    if not setting.sharded:
        return part.gradients * parameters // part.parameters
    size = 2 if setting.precision == "bf16-true" else 4
    return parameters * size // division.processes


def _buffers(rehearsal: Rehearsal, setting: Setting, division: Division) -> Buffers:
    if division.processes == 1:
        return Buffers(0)
    if not setting.sharded:
        return Buffers(sum(part.gradients for part in (rehearsal.ends, *rehearsal.layers)))
    reduced = 2 if setting.precision == "bf16-true" else 4
    return ShardedBuffers(rehearsal, division.processes, setting.weight_dtype.itemsize, reduced)
