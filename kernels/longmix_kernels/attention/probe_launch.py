"""Launch attention with a probe: tiles, warps and stages per architecture, and how few queries divide the keys.

Nothing here imports Triton. `longmix_kernels.launch` has what all engines share.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from longmix_kernels import launch
from longmix_kernels.attention import launch as whole
from longmix_kernels.attention import split_launch
from longmix_kernels.attention.probe_inputs import ProbeInputs
from longmix_kernels.launch import LaunchTable, known_architecture, with_tiles_of
from longmix_kernels.runtime import on_gpu
from longmix_kernels.tensors import unit_stride

KERNELS = ("probe_forward", "probe_split", "probe_grad_query", "probe_grad_key_value")
"""`probe_split` is the forward with few queries, whose keys are divided among programs."""

WIDTHS = (64, 96, 128)
"""The largest head dimensions, of keys or of values, that the entries are for."""


@dataclass(frozen=True)
class LaunchConfig(whole.LaunchConfig):
    """One way to launch a kernel, with the attributes of attention's without a probe; none loads by descriptors."""

    def used_by(self, kernel: str) -> Collection[str]:
        """Return the names of the attributes that change a kernel's code."""
        return {"rows", "keys", "warps", "stages", *({"fold"} if kernel == "probe_grad_key_value" else set())}


# One row per entry of WIDTHS: rows, keys, warps, stages and perhaps fold. Each tile compiles without a spill at that
# head dimension, causal, under Triton 3.9; on sm_80 and sm_90 mostly also with ALiBi, and at 64 and 128 columns with
# rows in an order of their own. `probe_grad_key_value` on sm_90 at 128 columns spills 24 bytes, and none under 3.6.
# None has been timed.
_FEW_QUERIES = ((16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2))
_AMPERE = {
    "probe_forward": ((128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
    "probe_split": _FEW_QUERIES,
    "probe_grad_query": ((64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    "probe_grad_key_value": ((16, 64, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1)),
}
_HOPPER = {
    "probe_forward": ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
    "probe_split": _FEW_QUERIES,
    "probe_grad_query": ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
    "probe_grad_key_value": ((32, 64, 4, 2, True), (16, 64, 4, 1, True), (16, 128, 8, 1)),
}
_BLACKWELL = {
    "probe_forward": ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    "probe_split": _FEW_QUERIES,
    "probe_grad_query": ((64, 32, 8, 1), (64, 32, 8, 2), (64, 32, 8, 1)),
    "probe_grad_key_value": ((32, 64, 8, 1), (16, 64, 8, 1), (32, 64, 8, 1)),
}
TABLE = LaunchTable(
    LaunchConfig,
    WIDTHS,
    {80: _AMPERE, 86: _AMPERE, 90: _HOPPER, 100: _BLACKWELL},
    float32={
        "probe_forward": (16, 16, 4, 1),
        "probe_split": (16, 16, 4, 1),
        "probe_grad_query": (16, 16, 4, 1),
        "probe_grad_key_value": (16, 16, 4, 1),
    },
    interpreted={
        **dict.fromkeys(KERNELS, LaunchConfig(rows=32, keys=32, warps=1, stages=1)),
        "probe_split": LaunchConfig(rows=16, keys=16, warps=1, stages=1),
    },
    measured={},
)
# Entries that replace those of the table where a call has a feature, as `launch.NARROWER`.
NARROWER: dict[str, dict[tuple[str, int, int], LaunchConfig]] = {"permuted": {}, "alibi": {}, "padded": {}}
"""By feature, and by kernel, architecture and head dimension, entries for elements of two bytes that need less."""


def table_entry(kernel: str, architecture: int, size: int, width: int, features: Collection[str] = ()) -> LaunchConfig:
    """Return the configuration of a kernel for one architecture and kind of call; see `launch.table_entry`."""
    known, covering = with_tiles_of(known_architecture(architecture)), TABLE.covering(width)
    narrower = [NARROWER[name].get((kernel, known, covering)) for name in features] if size == 2 else []
    found = [config for config in narrower if config is not None]
    plain = TABLE.entry(kernel, architecture, size, width)
    return min(found, key=lambda config: (config.rows * config.keys, config.stages), default=plain)


class Call(whole.Call):
    """The tensors and numbers of one call, as the kernels take them.

    Attributes:
        own: the keys in their own places, and `own_order`: which rows the queries are, also within `gathered_before`.
        splits: into how many parts the keys are cut; 1 except with few queries.
    """

    TABLE = TABLE  # type: ignore[assignment]  # of a class of its own

    def __init__(self, call: ProbeInputs) -> None:
        super().__init__(call.inputs)
        self.probe = unit_stride(self.take_queries(call.probe))
        self.own = self.key if self.key_rows is None else unit_stride(call.inputs.key)
        rows = call.inputs.pattern.query_rows
        self.own_order = None if rows is None else unit_stride(rows)
        self.splits = self._splits()

    def _splits(self) -> int:
        if self.queries > split_launch.MOST_QUERIES:
            return 1
        # Documents and bounds may hide keys, but only the device knows how many, so all keys count here.
        seen = min(self.keys, self.window + self.queries - 1) if self.mode == "window" else self.keys
        processors = launch.processors_of(self.query.device) if on_gpu(self.query) else split_launch.ELSEWHERE
        return split_launch.splits_of(self.batch * self.heads, seen, processors)

    def forward_kernel(self) -> str:
        """Return the name in the table of the forward for this call."""
        return "probe_split" if self.queries <= split_launch.MOST_QUERIES else "probe_forward"

    def features(self) -> list[str]:
        """Return the features of this call, which are keys of `NARROWER`."""
        return [name for name in super().features() if name in NARROWER]

    def entry(self, kernel: str, architecture: int, size: int) -> LaunchConfig:
        """Return the table's configuration of a kernel for this call."""
        return table_entry(kernel, architecture, size, max(self.dim, self.value_dim), self.features())

    def programs(self, kernel: str, config: whole.LaunchConfig) -> int:
        """Return how many programs a kernel is launched with."""
        if kernel == "probe_grad_key_value":
            return -(-self.keys // config.keys) * self.batch * self.key_heads
        splits = self.splits if kernel == "probe_split" else 1
        return -(-self.queries // config.rows) * self.batch * self.heads * splits


def merged(parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return what the parts of the keys give together.

    A part's output o_p is a weighted mean under its own e_p. Under the e of all parts, its rows turn to
    o_p + O1_p (e - e_p), O1_p being the part's softmax attention.

    Args:
        parts: output, output of softmax attention, logsumexp and e of each part, float32 [parts, B, Tq, Hq, ..].
        dtype: that of the outputs.
    """
    output, plain, logsumexp, expected = parts
    total = logsumexp.logsumexp(0)
    share = torch.exp(logsumexp - total.masked_fill(total.isneginf(), 0.0))
    mean = (share * expected).sum(0)
    shares = share.unsqueeze(-1)
    turned = torch.addcmul(output, plain, (mean - expected).unsqueeze(-1))
    return (shares * turned).sum(0).to(dtype), (shares * plain).sum(0).to(dtype), total, mean
