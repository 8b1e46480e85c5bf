"""The memory that one device needs at the worst moment of a training step, by purpose.

The plan follows a step: the forward passes of the layers, the turning point at the loss, the backward passes, the
optimizer. For each moment it adds up the memory of the parts from their dry runs. The largest sum counts.

Assumed, not found by a dry run: a CUDA context and NCCL; the buffers of DDP (a second copy of the gradients)
and of FSDP (the ends and two blocks gathered, one more block while it is unpacked, and one block's gradients on their
way). Left out: memory that a kernel allocates and frees within one call.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from longmix.model.backbone import LanguageModel
from longmix.planning.arguments import Variant
from longmix.planning.dry_run import OptimizerNeeds, Part, Rehearsal, Setting

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
    """

    moment: str
    parts: dict[str, int]
    limit: int

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
    """
    parts = [rehearsal.ends, *rehearsal.layers]
    size = 2 if setting.precision == "bf16-true" else 4
    parameters = sum(part.parameters for part in parts)
    shards = division.processes if setting.sharded else 1
    fixed = {
        "weights": parameters * size // shards,
        "optimizer": optimizer.state // shards,
        "data": setting.rows * division.micro_batches * setting.length * division.context_parallel * (8 + 8 + 4),
        "communication": communication_buffers(rehearsal, setting, division),
        "carried state": carried,
    }
    everything = sum(_lasting(part, setting, division) for part in parts)
    exchanged = optimizer.exchanged // shards if shards > 1 else 0
    step = Moment("optimizer", everything, 0, optimizer.working + exchanged)
    worst = max([*_moments(model, rehearsal, setting, division), step], key=lambda moment: moment.total)
    varying = {"gradients": worst.gradients, "activations": worst.activations, "working": worst.working}
    context = 0 if setting.device == "cpu" else CONTEXT_BYTES * (1 if division.processes == 1 else 2)
    usable = limit if setting.device == "cpu" else int((limit - context) * USABLE)
    held = {name: size for name, size in (fixed | varying).items() if size}
    return Memory(worst.name, held, usable)


@dataclass(frozen=True)
class Moment:
    """Memory that is held at one moment only."""

    name: str
    gradients: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return self.gradients + self.activations + self.working


def _moments(model: LanguageModel, rehearsal: Rehearsal, setting: Setting, division: Division) -> Iterator[Moment]:
    """The last micro-batch of a step; gradients of the others are there from the beginning."""
    ends, layers = rehearsal.ends, rehearsal.layers
    lasting = [_lasting(part, setting, division) for part in layers]
    waits = division.micro_batches > 1
    before = sum(lasting) + _lasting(ends, setting, division) if waits else 0
    stream = layers[0].output
    held = stream
    for index, part in enumerate(layers):
        held += part.kept + part.output
        yield Moment(f"forward of layer {index}", before, held, part.forward)
    turning = held + ends.kept - stream  # the dry run of the ends had the stream of one layer between them
    yield Moment("loss", before, turning, max(ends.forward, ends.backward))
    head = _lasting(ends, setting, division)
    if model.head.weight is not model.embedding.weight:
        head -= _lasting_of(model.embedding.weight.numel(), ends, setting, division)
    made = before if waits else head
    for index in reversed(range(len(layers))):
        part = layers[index]
        yield Moment(f"backward of layer {index}", made, held, part.output + part.backward)
        held -= part.kept + part.output
        made += 0 if waits else lasting[index]
    yield Moment("backward of the embedding", made, held, stream + ends.gradients)


def _lasting(part: Part, setting: Setting, division: Division) -> int:
    """Bytes of a part's gradients from its backward pass until the optimizer's step."""
    return _lasting_of(part.parameters, part, setting, division)


def _lasting_of(parameters: int, part: Part, setting: Setting, division: Division) -> int:
    if not setting.sharded:
        return part.gradients * parameters // part.parameters
    size = 2 if setting.precision == "bf16-true" else 4
    return parameters * size // division.processes


def communication_buffers(rehearsal: Rehearsal, setting: Setting, division: Division) -> int:
    """Bytes of buffers for gathering and exchange."""
    found = 0
    largest = max(part.parameters for part in rehearsal.layers)
    if setting.sharded and division.processes > 1:
        size = setting.weight_dtype.itemsize
        reduced = 2 if setting.precision == "bf16-true" else 4
        found += size * (rehearsal.ends.parameters + 3 * largest) + reduced * largest
        # Where some weights travel rounded, all that a module gathers arrives in memory of its own.
        found += max((part.gathered for part in (rehearsal.ends, *rehearsal.layers) if part.rounded), default=0)
    elif division.processes > 1:
        found += sum(part.gradients for part in (rehearsal.ends, *rehearsal.layers))
    return found
