"""Whom `benchmarks.delta` compares: our delta rule with the inputs of several mixers, and flash-linear-attention's.

Each kind of input has one function of ours and one of theirs, which get the same tensors [B, T, H, ...], decays and
write strengths in float32. What turns those into the terms of an engine runs inside the timed calls. What wants heads
before tokens gets it so before the clock runs. Decays are spread as those that the mixers begin with.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from benchmarks import delta_work as work
from benchmarks.comparison import Provider, Workload, both_passes
from benchmarks.recurrences import StateShape, package_missing
from longmix.mixers.parts.log_decay import RATES, SIGMOID_DIVISOR, STEPS
from longmix.mixers.rwkv7 import DECAY_LIMIT
from longmix_kernels.delta import delta_rule

NAIVE_CHUNKS = (16, 32, 64)
NAIVE_MODULE = "fla.ops.generalized_delta_rule.dplr.naive"
RWKV7_CHUNK = 64
"""What fla takes for RWKV-7, whose decays have a bound."""


class DeltaShape(StateShape):
    """What is computed, and the inputs of all providers."""

    @functools.cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By name; `removal` has length 1, `rate` and `strength` lie between 0 and 1."""
        normal, device = self.drawn(), self.device
        query, key, removal, rate = (normal(self.key_dim) for _ in range(4))
        value, grad = (normal(self.value_dim, dtype=self.dtype) for _ in range(2))
        removal, rate = F.normalize(removal, dim=-1), rate.sigmoid()
        rates = torch.linspace(*RATES, self.heads, device=device)
        steps = torch.logspace(math.log10(STEPS[0]), math.log10(STEPS[1]), self.key_dim, device=device)
        biases = steps + (-torch.expm1(-steps)).log()
        return {
            "query": query.to(self.dtype),
            "key": key.to(self.dtype),
            "value": value,
            "grad": grad,
            "removal": removal.to(self.dtype),
            "read": -removal.to(self.dtype),
            "write": (removal * rate).to(self.dtype),
            "strength": normal().sigmoid(),
            "rwkv7_decay": -DECAY_LIMIT * normal(self.key_dim).sigmoid(),
            "head_decay": -rates * F.softplus(normal() + biases.mean()),
            "channel_decay": -rates[:, None] * F.softplus(normal(self.key_dim) + biases),
            "gla_decay": F.logsigmoid(normal(self.key_dim)) / SIGMOID_DIVISOR,
        }

    def workload(
        self, kind: "Kind", function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], chunk: int | None
    ) -> Workload:
        """What is to be timed.

        Args:
            kind: whose inputs the function takes.
            function: returns the output.
            tensors: its inputs, and the gradient of its output.
            chunk: tokens of a chunk; None for those that the implementation chooses.
        """
        *inputs, grad = tensors
        sizes, sequences = (self.key_dim, self.value_dim), self.batch * self.heads
        moved = work.moved_bytes(
            sequences,
            self.length,
            *sizes,
            chunk or work.design_chunk(self.key_dim),
            decays=1 if kind.of_heads else self.key_dim,
            low_rank=kind.low_rank,
            size=self.dtype.itemsize,
        )
        flops = work.recurrence_flops(sequences * self.length, *sizes, low_rank=kind.low_rank)
        return Workload(both_passes(function, inputs, grad), flops, columns={"chunk_size": chunk}, bytes=moved)


@dataclass(frozen=True)
class Kind:
    """A mixer's way to use the delta rule.

    Attributes:
        inputs: names of tensors, in the order in which `ours` and `theirs` take them.
        ours: of these, the output.
        module, name: where fla's function is.
        theirs: calls fla's function, its first argument.
        low_rank: whether something is removed.
        of_heads: whether the decay is one number a head.
    """

    inputs: tuple[str, ...]
    ours: Callable[..., torch.Tensor]
    module: str
    name: str
    theirs: Callable[..., torch.Tensor]
    low_rank: bool = True
    of_heads: bool = False

    def tensors(self, shape: DeltaShape) -> list[torch.Tensor]:
        """The inputs, and the gradient of the output."""
        return [shape.tensors[name] for name in (*self.inputs, "grad")]


def _rwkv7(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    read: torch.Tensor,
    write: torch.Tensor,
) -> torch.Tensor:
    return delta_rule(
        query,
        key,
        value,
        log_decay=log_decay,
        low_rank_read=read,
        low_rank_write=write,
        scale=1.0,
        min_log_decay=-DECAY_LIMIT,
    )[0]


def _replacing(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, strength: torch.Tensor, log_decay: torch.Tensor
) -> torch.Tensor:
    written = key * strength.unsqueeze(-1)
    kept = log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
    return delta_rule(
        query,
        written.to(key.dtype),
        value,
        log_decay=log_decay,
        low_rank_read=(-kept.exp() * written).to(key.dtype),
        low_rank_write=key,
        scale=query.shape[-1] ** -0.5,
    )[0]


def _adding(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    return delta_rule(query, key, value, log_decay=log_decay, scale=query.shape[-1] ** -0.5)[0]


def _fla_rwkv7(function: Callable, query, key, value, log_decay, read, write) -> torch.Tensor:
    options = {"scale": 1.0, "chunk_size": RWKV7_CHUNK, "lower_bound": -DECAY_LIMIT}
    return function(r=query, w=log_decay, k=key, v=value, a=read, b=write, **options)[0]


def _fla_replacing(function: Callable, query, key, value, strength, log_decay) -> torch.Tensor:
    return function(q=query, k=key, v=value, g=log_decay, beta=strength)[0]


def _fla_adding(function: Callable, query, key, value, log_decay) -> torch.Tensor:
    return function(q=query, k=key, v=value, g=log_decay)[0]


_DELTA = "query", "removal", "value", "strength"
KINDS = {
    "rwkv7": Kind(
        ("query", "key", "value", "rwkv7_decay", "read", "write"), _rwkv7, "fla.ops.rwkv7", "chunk_rwkv7", _fla_rwkv7
    ),
    "gated-delta": Kind(
        (*_DELTA, "head_decay"),
        _replacing,
        "fla.ops.gated_delta_rule",
        "chunk_gated_delta_rule",
        _fla_replacing,
        of_heads=True,
    ),
    "kda": Kind((*_DELTA, "channel_decay"), _replacing, "fla.ops.kda", "chunk_kda", _fla_replacing),
    "gla": Kind(
        ("query", "key", "value", "gla_decay"), _adding, "fla.ops.gla", "chunk_gla", _fla_adding, low_rank=False
    ),
}


def _ours(kind: Kind, shape: DeltaShape) -> Workload:
    return shape.workload(kind, kind.ours, kind.tensors(shape), None)


def _fla(kind: Kind, shape: DeltaShape) -> Workload:
    function = getattr(importlib.import_module(kind.module), kind.name)
    return shape.workload(kind, functools.partial(kind.theirs, function), kind.tensors(shape), None)


def _fla_missing(kind: Kind, device: torch.device) -> str:
    return "needs CUDA" if device.type != "cuda" else package_missing(kind.module)


def _naive(chunk: int, shape: DeltaShape) -> Workload:
    function = importlib.import_module(NAIVE_MODULE).dplr_chunkwise
    # It multiplies queries by the inverse of this.
    root = math.sqrt(shape.key_dim)

    def run(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_decay: torch.Tensor,
        read: torch.Tensor,
        write: torch.Tensor,
    ) -> torch.Tensor:
        return function(query * root, key, value, read, write, log_decay, chunk_size=chunk)[0]

    kind = KINDS["rwkv7"]
    return shape.workload(kind, run, [x.transpose(1, 2).contiguous() for x in kind.tensors(shape)], chunk)


def _naive_missing(device: torch.device) -> str:
    return "is for the CPU" if device.type != "cpu" else package_missing(NAIVE_MODULE)


def _partial_chunk(chunk: int, shape: DeltaShape, direction: str) -> str:
    return f"skipped: T must be a multiple of the chunk size {chunk}" if shape.length % chunk else ""


OURS = tuple(KINDS)
NAIVE = "dplr-naive"
FLA = {f"fla-{name}": kind for name, kind in KINDS.items()}
FAMILIES = (*OURS, NAIVE, *FLA)
BEST_OF = (NAIVE,)
"""Families whose chunk sizes are summed up by the fastest."""

LEGEND = f"""\
ours:  rwkv7          six separate inputs, a decay per channel that has a bound
       gated-delta    unit keys, one decay and one write strength per head
       kda            unit keys, a decay per channel and a write strength per head
       gla            a decay per channel; nothing is removed
peers: {NAIVE}     fla's dplr_chunkwise, in torch, on inputs as those of rwkv7; with chunks of C tokens, and the fastest
       fla-*          fla's Triton kernels of the same inputs: {", ".join(kind.name for kind in KINDS.values())}"""


def providers() -> dict[str, list[Provider]]:
    """All providers by family."""
    partial = functools.partial
    every = {name: [Provider(name, partial(_ours, kind))] for name, kind in KINDS.items()}
    every[NAIVE] = [
        Provider(f"{NAIVE}-{chunk}", partial(_naive, chunk), _naive_missing, partial(_partial_chunk, chunk))
        for chunk in NAIVE_CHUNKS
    ]
    every |= {name: [Provider(name, partial(_fla, kind), partial(_fla_missing, kind))] for name, kind in FLA.items()}
    return every
