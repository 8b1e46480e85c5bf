"""`Planner(request).plan()`: memory of a device, traffic between devices and time of a step, for any variant.

Where a run does not fit, the planner itself judges the changes that may make it fit, the smallest first.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from longmix.errors import ConfigError
from longmix.model.backbone import Checkpointing, LanguageModel
from longmix.planning.arguments import Request, Variant
from longmix.planning.dry_run import Ends, OptimizerNeeds, Rehearsal, Setting, optimizer_needs, rehearse, rehearse_ends
from longmix.planning.memory import Division, Memory, memory_needed
from longmix.planning.taught import Teaching, rehearse_teaching
from longmix.planning.traffic import StepTime, Traffic, step_time, taught_flops, traffic_of, training_flops
from longmix.training.carried import carried_bytes
from longmix.training.distillation import LAYERS, LOGITS
from longmix.training.layerwise import layers_that_learn


@dataclass(frozen=True)
class Plan:
    """The needs of a run with one variant.

    Attributes:
        variant: how it is run.
        rows: windows of a step on one device, or on those that share windows.
        memory: of one device.
        traffic: of one device in a step.
        flops: of one device in a step, as the model asks for, and computed.
        time: of a step; None for a CPU, whose speed no table knows.
    """

    variant: Variant
    rows: int
    memory: Memory
    traffic: Traffic
    flops: tuple[float, float]
    time: StepTime | None


class Planner:
    """Makes plans of one request; results that variants share are computed once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.device: Literal["cuda", "cpu"] = "cpu" if request.accelerator is None else "cuda"
        self.model: LanguageModel = request.model()
        self.teacher: LanguageModel | None = request.teacher_model()
        self._ends: dict[Setting, Ends] = {}
        self._rehearsals: dict[Setting, Rehearsal] = {}
        self._teachings: dict[Setting, Teaching] = {}
        self._optimizer: OptimizerNeeds | None = None

    def optimizer(self) -> OptimizerNeeds:
        """Bytes that the optimizers hold for undivided weights."""
        if self._optimizer is None:
            dtype = torch.bfloat16 if self.request.precision == "bf16-true" else torch.float32
            weights = dict(self.model.named_parameters())
            if self.teacher is not None and self.request.config.objective == LAYERS:
                learn = tuple(f"blocks.{index}.mixer." for index in layers_that_learn(self.model, self.teacher))
                weights = {name: weight for name, weight in weights.items() if name.startswith(learn)}
            self._optimizer = optimizer_needs(weights, self.request.config.optimizer, dtype, self.device)
        return self._optimizer

    def _rehearsal(self, setting: Setting) -> Rehearsal:
        alike = dataclasses.replace(setting, checkpointing="none", offloads=False)
        if alike not in self._ends:
            self._ends[alike] = rehearse_ends(self.model, setting)
        if setting not in self._rehearsals:
            self._rehearsals[setting] = rehearse(self.model, setting, self._ends[alike])
        return self._rehearsals[setting]

    def _teaching(self, setting: Setting) -> Teaching | None:
        if self.teacher is None:
            return None
        if setting not in self._teachings:
            alike = dataclasses.replace(setting, checkpointing="none", offloads=False)
            dtype = self._ends[alike].dtype
            objective = self.request.config.objective
            self._teachings[setting] = rehearse_teaching(self.model, self.teacher, setting, dtype, objective)
        return self._teachings[setting]

    def plan(self, variant: Variant | None = None) -> Plan:
        """Plan the request as it is, or with another variant.

        Raises:
            ConfigError: something does not divide.
        """
        request = self.request
        variant = request.variant if variant is None else variant
        rows = request.rows(variant)
        division = Division.of(variant, request.gpus, rows)
        setting = Setting(
            rows=variant.micro_batch_size,
            length=variant.seq_len // variant.context_parallel,
            precision=request.precision,
            sharded=variant.strategy == "fsdp",
            accumulates=division.micro_batches > 1 and variant.strategy != "fsdp",
            checkpointing=variant.activation_checkpointing,
            device=self.device,
            slices=variant.context_parallel,
            offloads=variant.activation_offload and self.device == "cuda",
            hard_share=request.config.distil.hard_share if request.config.objective == LOGITS else None,
        )
        rehearsal = self._rehearsal(setting)
        teaching = self._teaching(setting)
        carried = 2 * rows * carried_bytes(self.model) if request.config.loop.carry_state else 0
        averaged = 0 if request.config.loop.ema_decay is None else 4 * self.model.parameter_counts()["total"]
        needs = self.optimizer()
        held = carried, averaged
        memory = memory_needed(self.model, rehearsal, needs, setting, division, request.memory_bytes, *held, teaching)
        traffic = traffic_of(rehearsal, setting, division, teaching)
        whole = training_flops(self.model, rows, variant.seq_len, rehearsal, setting)
        if self.teacher is not None:
            whole = taught_flops(self.model, self.teacher, rows, variant.seq_len, whole, teaching)
        flops = whole[0] / variant.context_parallel, whole[1] / variant.context_parallel
        time = None
        if request.accelerator is not None:
            time = step_time(request.accelerator, flops, rehearsal, needs, traffic, setting, division, teaching)
        return Plan(variant, rows, memory, traffic, flops, time)

    def at_length(self, seq_len: int) -> Plan:
        """The request at another context length."""
        return self.plan(dataclasses.replace(self.request.variant, seq_len=seq_len))

    def report(self, plan: Plan) -> dict[str, Any]:
        """A plan as plain values, for JSON; bytes, seconds and FLOPs."""
        request, time = self.request, plan.time
        batch_size = request.batch_size(plan.variant)
        tokens = batch_size * plan.variant.seq_len
        report: dict[str, Any] = {
            "mixer": request.labels[0],
            "model": request.labels[1],
            "parameters": self.model.parameter_counts(),
            "state_bytes_per_window": self.model.state_bytes(plan.variant.seq_len),
            "gpu": "CPU" if request.accelerator is None else request.accelerator.name,
            "gpus": request.gpus,
            "precision": request.precision,
            "batch_size": batch_size,
            "tokens_per_step": tokens,
            **dataclasses.asdict(plan.variant),
            "memory": plan.memory.parts,
            "memory_total": plan.memory.total,
            "memory_limit": plan.memory.limit,
            "memory_moment": plan.memory.moment,
            "memory_of_host": plan.memory.host,
            "fits": plan.memory.fits,
            "traffic": dataclasses.asdict(plan.traffic) | {"total": plan.traffic.total},
            "model_flops": plan.flops[0],
            "computed_flops": plan.flops[1],
            "time": None,
        }
        if time is not None:
            seconds = dataclasses.asdict(time) | {"total": time.total, "tokens_per_second": tokens / time.total}
            report["time"] = seconds
        return report


KINDS = (
    "micro_batch_size",
    "activation_checkpointing",
    "activation_offload",
    "strategy",
    "context_parallel",
    "seq_len",
)

LESS_KEPT: tuple[Checkpointing, ...] = ("none", "selective", "block")
"""The kinds of activation checkpointing, in the order of the arithmetic that they add."""

SHORTEST = 256
"""The shortest window that is proposed, in tokens."""


@dataclass(frozen=True)
class Advice:
    """A change of the settings, and the plan with it.

    Attributes:
        words: what to add to the command line.
        plan: with them.
    """

    words: tuple[str, ...]
    plan: Plan


def single_changes(planner: Planner) -> list[Advice]:
    """Each kind of change alone: the smallest of its kind that fits, or the largest if none does."""
    found = []
    for kind in KINDS:
        tried: list[Advice] = []
        for variant in _steps(planner, kind):
            answer = _asked(planner, variant)
            if answer is not None:
                tried.append(answer)
                if answer.plan.memory.fits:
                    break
        if tried:
            found.append(min(tried, key=lambda each: (not each.plan.memory.fits, each.plan.memory.total)))
    return found


def smallest_change(planner: Planner) -> Advice | None:
    """The change of the fewest kinds that fits; a shorter window only where nothing else does.

    Among changes of as many kinds, the cheapest counts as smallest: micro-batches, then recomputing, offloading, FSDP,
    and context parallelism, each with the smallest step that suffices.
    """
    asked = planner.request.variant
    for length in (asked.seq_len, *_halves(asked.seq_len, SHORTEST)):
        start = dataclasses.replace(asked, seq_len=length)
        for number in range(len(KINDS)):
            for kinds in itertools.combinations(KINDS[:-1], number):
                found = _first_that_fits(planner, start, kinds)
                if found is not None:
                    return found
    return None


def _first_that_fits(planner: Planner, start: Variant, kinds: tuple[str, ...]) -> Advice | None:
    values = [[getattr(variant, kind) for variant in _steps(planner, kind)] for kind in kinds]
    for combination in itertools.product(*values):
        variant = dataclasses.replace(start, **dict(zip(kinds, combination, strict=True)))
        found = _asked(planner, variant)
        if found is not None and found.plan.memory.fits:
            return found
    return None


def _steps(planner: Planner, kind: str) -> Iterator[Variant]:
    """The variants that differ in one kind of setting alone, the smallest step first."""
    request = planner.request
    variant = request.variant
    values: list = []
    if kind == "micro_batch_size":
        values = [rows for rows in _halves(variant.micro_batch_size) if variant.micro_batch_size % rows == 0]
    elif kind == "activation_checkpointing":
        values = list(LESS_KEPT[LESS_KEPT.index(variant.activation_checkpointing) + 1 :])
    elif kind == "activation_offload":
        values = [] if variant.activation_offload or planner.device == "cpu" else [True]
    elif kind == "strategy":
        values = [] if variant.strategy == "fsdp" or request.gpus == 1 else ["fsdp"]
    elif kind == "context_parallel":
        doubled = itertools.takewhile(
            lambda n: n <= request.gpus, (variant.context_parallel << n for n in range(1, 20))
        )
        values = list(doubled)
    else:
        values = list(_halves(variant.seq_len, SHORTEST))
    for value in values:
        yield dataclasses.replace(variant, **{kind: value})


def _halves(number: int, least: int = 1) -> Iterator[int]:
    """Half of a number, a quarter, and so on, down to `least`."""
    while number // 2 >= least:
        number //= 2
        yield number


def _asked(planner: Planner, variant: Variant) -> Advice | None:
    """The plan of a variant; None if the variant is impossible."""
    try:
        return Advice(words(planner.request, variant), planner.plan(variant))
    except ConfigError:
        return None


def words(request: Request, variant: Variant) -> tuple[str, ...]:
    """The words that add a variant to the request's command line."""
    spelled = {"seq_len": "seq_len={}", "strategy": "trainer={}", "context_parallel": "trainer.context_parallel={}"}
    asked = request.variant
    found = []
    for name, text in spelled.items():
        value = getattr(variant, name)
        if value != getattr(asked, name):
            found.append(text.format(value))
    if variant.micro_batch_size != (request.trainer.micro_batch_size or request.rows(variant)):
        found.append(f"trainer.micro_batch_size={variant.micro_batch_size}")
    if variant.activation_checkpointing != asked.activation_checkpointing:
        found.append(f"model.activation_checkpointing={variant.activation_checkpointing}")
    if variant.activation_offload != asked.activation_offload:
        found.append("model.activation_offload=true")
    return tuple(found)
