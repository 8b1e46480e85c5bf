"""Estimates of the bytes that devices exchange in a step and of its time, with their assumptions."""

from dataclasses import dataclass
from typing import cast

from longmix.accelerators import Accelerator
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Block
from longmix.model.head import slice_rows
from longmix.planning.dry_run import OptimizerNeeds, Rehearsal, Setting
from longmix.planning.memory import Division
from longmix.planning.taught import Teaching

UTILISATION = 0.6
"""Share of peak arithmetic that products of matrices reach."""

BANDWIDTH_SHARE = 0.8
"""Share of memory bandwidth that other operators reach."""

LINK_SHARE = 0.8
"""Share of the slowest link's bandwidth that a collective reaches."""

ASSUMPTIONS = (
    f"products of matrices and engines run at {UTILISATION:.0%} of peak arithmetic, other operators, unfused, at "
    f"{BANDWIDTH_SHARE:.0%} of memory bandwidth, one after the other",
    f"collectives reach {LINK_SHARE:.0%} of the slowest link; those of weights and gradients hide behind the rest as "
    "far as they are shorter, those of a divided window do not",
    f"copies to the host's memory and back reach {LINK_SHARE:.0%} of its link, and hide behind the pass they belong to",
    "the pipeline of data, launches and the host cost nothing",
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in a step.

    Attributes:
        gradients: all-reduce of DDP, or reduce-scatter of FSDP.
        weights: all-gathers of FSDP.
        context: keys and values, or states, of divided windows.
        host: activations on their way to the host, and as many back.
    """

    gradients: int
    weights: int
    context: int
    host: int = 0

    @property
    def total(self) -> int:
        """All that goes to other devices."""
        return self.gradients + self.weights + self.context


def traffic_of(rehearsal: Rehearsal, setting: Setting, division: Division, teaching: Teaching | None = None) -> Traffic:
    """Count the bytes of ring collectives: (W - 1) / W of a gathered or scattered tensor, twice that if all-reduced."""
    if teaching is not None and teaching.learns_layers:
        return _traffic_of_lessons(teaching, setting, division)
    processes = division.processes
    ends, layers = rehearsal.ends.parameters, sum(part.parameters for part in rehearsal.layers)
    size = 2 if setting.precision == "bf16-true" else 4
    gradients = size * (ends + layers) * (processes - 1) // processes
    weights = context = 0
    if setting.sharded:
        # The ends stay gathered from the forward to the backward pass, a block is gathered for each.
        gathered = rehearsal.ends.gathered + 2 * sum(part.gathered for part in rehearsal.layers)
        if setting.precision == "bf16-true":
            gathered = size * (ends + 2 * layers)
        if teaching is not None:
            gathered += size * (teaching.parameters - teaching.ends)
        weights = gathered * division.micro_batches * (processes - 1) // processes
        gradients *= division.micro_batches  # each micro-batch scatters its own
    else:
        gradients *= 2
    if division.context_parallel > 1:
        passes = 2 if setting.checkpointing == "none" else 3
        context = sum(part.received for part in rehearsal.layers) * passes * division.micro_batches
    host = sum(part.offloaded for part in rehearsal.layers) * division.micro_batches
    return Traffic(gradients, weights, context, host)


def _traffic_of_lessons(teaching: Teaching, setting: Setting, division: Division) -> Traffic:
    """Layers that learn send their mixers' gradients; FSDP gathers them whole twice, and the teacher's layers once.

    Weights on their way count as they are, not rounded.
    """
    others, size = (division.processes - 1) / division.processes, 2 if setting.precision == "bf16-true" else 4
    lessons = teaching.lessons.values()
    gradients = size * sum(lesson.part.parameters for lesson in lessons)
    if not setting.sharded:
        return Traffic(round(2 * gradients * others), 0, 0)
    gathered = teaching.parameters - teaching.ends + 2 * sum(lesson.block for lesson in lessons)
    passes = division.micro_batches
    return Traffic(round(gradients * passes * others), round(size * gathered * passes * others), 0)


def taught_flops(
    student: LanguageModel,
    teacher: LanguageModel,
    rows: int,
    length: int,
    whole: tuple[int, int],
    teaching: Teaching | None,
) -> tuple[int, int]:
    """Floating-point operations of a step that learns from a teacher: as asked for, and computed.

    Args:
        student, teacher: on the meta device.
        rows, length: of the step.
        whole: what the step takes without a teacher.
        teaching: what learns.
    """
    forward = teacher.flops(length) * rows
    if teaching is None or not teaching.learns_layers:
        return whole[0] + forward, whole[1] + forward
    mixers = student.mixers()
    learned = 3 * sum(mixers[index].flops(length) for index in teaching.lessons) * rows
    return forward + learned, forward + learned


def training_flops(
    model: LanguageModel, rows: int, length: int, rehearsal: Rehearsal, setting: Setting
) -> tuple[int, int]:
    """Floating-point operations of a step on `rows` windows: those of the model, and those with recomputation.

    A backward pass takes twice the forward one; recomputed blocks, and a head in slices, go forward once more. Of
    blocks that are recomputed selectively, the rehearsal has counted which part does.
    """
    forward = model.flops(length)
    each = [cast(Block, block).flops(length) for block in model.blocks]
    layers = again = sum(each)
    if setting.checkpointing != "block":
        again = round(sum(part.again * flops for part, flops in zip(rehearsal.layers, each, strict=True)))
    if rows * length > slice_rows(model.vocab_size, setting.device):
        again += forward - layers
    return 3 * forward * rows, (3 * forward + again) * rows


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        products: of matrices, the mixers' engines included.
        others: memory traffic of all other operators, and of the optimizer.
        exchange: of weights and gradients, beside the rest.
        context: of divided windows, before or after the rest.
        host: that computation waits for activations on their way to the host and back.
        utilisation: model FLOPs per second over the peak, of the whole step ("MFU").
    """

    products: float
    others: float
    exchange: float
    context: float
    host: float
    utilisation: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return max(self.products + self.others + self.host, self.exchange) + self.context


def step_time(
    accelerator: Accelerator,
    flops: tuple[float, float],
    rehearsal: Rehearsal,
    optimizer: OptimizerNeeds,
    traffic: Traffic,
    setting: Setting,
    division: Division,
    teaching: Teaching | None = None,
) -> StepTime:
    """Estimate a step on one device.

    Args:
        accelerator: of the table.
        flops: of one device, as the model asks for, and computed.
        rehearsal: of the model's parts.
        optimizer: of undivided weights.
        traffic: what it sends.
        setting: how it computes.
        division: of the run.
        teaching: what a teacher needs; None without one.
    """
    peak = accelerator.fp32_flops if setting.precision == "32-true" else accelerator.bf16_flops
    parts = [rehearsal.ends, *rehearsal.layers]
    if teaching is not None and teaching.learns_layers:
        parts = [lesson.part for lesson in teaching.lessons.values()]
    of_teacher = 0 if teaching is None else sum(passing.moved for passing in teaching.passing)
    moved = division.micro_batches * (of_teacher + sum(part.moved for part in parts))
    shards = division.processes if setting.sharded else 1
    weights = sum(part.parameters for part in parts) * (2 if setting.precision == "bf16-true" else 4)
    moved += (3 * weights + 2 * optimizer.state) // shards  # gradients read, weights and states read and written
    link = _link(accelerator, division.processes)
    products, others = flops[1] / (peak * UTILISATION), moved / (accelerator.bandwidth * BANDWIDTH_SHARE)
    exchange, context = (traffic.gradients + traffic.weights) / link, traffic.context / link
    host = _waits(traffic.host / (accelerator.host_bandwidth * LINK_SHARE), products + others, flops)
    whole = StepTime(products, others, exchange, context, host, 0.0).total
    return StepTime(products, others, exchange, context, host, flops[0] / (peak * whole))


def _waits(one_way: float, computing: float, flops: tuple[float, float]) -> float:
    """Seconds that copies to the host take longer than the forward passes, and those back than the backward passes."""
    forward = computing * flops[0] / 3 / flops[1]
    return max(0.0, one_way - forward) + max(0.0, one_way - (computing - forward))


def _link(accelerator: Accelerator, processes: int) -> float:
    """Bytes per second of a ring: those of the link within one machine, of all network cards between machines."""
    bandwidth = accelerator.link_bandwidth
    if processes > accelerator.node_size:
        bandwidth = min(bandwidth, accelerator.node_size * accelerator.network_bandwidth)
    return bandwidth * LINK_SHARE
