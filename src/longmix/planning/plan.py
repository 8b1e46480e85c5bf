"""`Planner(request).plan()`: memory of a device, traffic between devices and time of a step, for any choice."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from longmix.model.backbone import LanguageModel
from longmix.planning.arguments import Choice, Request
from longmix.planning.dry_run import Ends, Rehearsal, Setting, rehearse, rehearse_ends
from longmix.planning.memory import Division, Memory, memory_needed
from longmix.planning.optimizer import OptimizerNeeds, optimizer_needs
from longmix.planning.traffic import StepTime, Traffic, step_time, traffic_of, training_flops


@dataclass(frozen=True)
class Plan:
    """The needs of a run with one choice.

    Attributes:
        choice: how it is run.
        rows: windows of a step on one device, or on those that share windows.
        memory: of one device.
        traffic: of one device in a step.
        flops: of one device in a step, as the model asks for, and computed.
        time: of a step; None for a CPU, whose speed no table knows.
    """

    choice: Choice
    rows: int
    memory: Memory
    traffic: Traffic
    flops: tuple[float, float]
    time: StepTime | None


class Planner:
    """Makes plans of one request; results that choices share are computed once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.device: Literal["cuda", "cpu"] = "cpu" if request.accelerator is None else "cuda"
        self.model: LanguageModel = request.model()
        self._ends: dict[Setting, Ends] = {}
        self._rehearsals: dict[Setting, Rehearsal] = {}
        self._optimizer: OptimizerNeeds | None = None

    def optimizer(self) -> OptimizerNeeds:
        """Bytes that the optimizers hold for undivided weights."""
        if self._optimizer is None:
            dtype = torch.bfloat16 if self.request.precision == "bf16-true" else torch.float32
            self._optimizer = optimizer_needs(self.model, self.request.node["optimizer"], dtype, self.device)
        return self._optimizer

    def _rehearsal(self, setting: Setting) -> Rehearsal:
        alike = dataclasses.replace(setting, checkpointed=False)
        if alike not in self._ends:
            self._ends[alike] = rehearse_ends(self.model, setting)
        if setting not in self._rehearsals:
            self._rehearsals[setting] = rehearse(self.model, setting, self._ends[alike])
        return self._rehearsals[setting]

    def plan(self, choice: Choice | None = None) -> Plan:
        """Plan the request as it is, or with another choice.

        Raises:
            ConfigError: something does not divide.
        """
        request = self.request
        choice = request.choice if choice is None else choice
        rows = request.rows(choice)
        division = Division.of(choice, request.gpus, rows)
        setting = Setting(
            rows=choice.micro_batch_size,
            length=choice.seq_len // choice.context_parallel,
            precision=request.precision,
            sharded=choice.strategy == "fsdp",
            accumulates=division.micro_batches > 1 and choice.strategy != "fsdp",
            checkpointed=choice.checkpointed,
            device=self.device,
            slices=choice.context_parallel,
        )
        rehearsal = self._rehearsal(setting)
        memory = memory_needed(self.model, rehearsal, self.optimizer(), setting, division, request.memory_bytes)
        traffic = traffic_of(self.model, rehearsal, setting, division)
        whole = training_flops(self.model, rows, choice.seq_len, choice.checkpointed, self.device)
        flops = whole[0] / choice.context_parallel, whole[1] / choice.context_parallel
        time = None
        if request.accelerator is not None:
            needs = self.optimizer()
            time = step_time(request.accelerator, flops, rehearsal, needs, traffic, setting, division)
        return Plan(choice, rows, memory, traffic, flops, time)

    def at_length(self, seq_len: int) -> Plan:
        """The request at another context length."""
        return self.plan(dataclasses.replace(self.request.choice, seq_len=seq_len))

    def report(self, plan: Plan) -> dict[str, Any]:
        """A plan as plain values, for JSON; bytes, seconds and FLOPs."""
        request, time = self.request, plan.time
        batch_size = request.batch_size(plan.choice)
        tokens = batch_size * plan.choice.seq_len
        report: dict[str, Any] = {
            "mixer": request.labels[0],
            "model": request.labels[1],
            "parameters": self.model.parameter_counts(),
            "state_bytes_per_window": self.model.state_bytes(plan.choice.seq_len),
            "gpu": "CPU" if request.accelerator is None else request.accelerator.name,
            "gpus": request.gpus,
            "precision": request.precision,
            "batch_size": batch_size,
            "tokens_per_step": tokens,
            **dataclasses.asdict(plan.choice),
            "memory": plan.memory.parts,
            "memory_total": plan.memory.total,
            "memory_limit": plan.memory.limit,
            "memory_moment": plan.memory.moment,
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
