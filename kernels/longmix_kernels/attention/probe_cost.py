"""Estimate what attention with a probe costs by its mathematics. Nothing here is measured.

For each pair of a query and a key, the forward multiplies 2 D + 2 Dv columns, the gradient of queries and probes
4 D + Dv, and the gradient of keys and values 4 D + 2 Dv. Each kernel reads or writes each tensor once; all else stays
on the chip.
"""

from collections.abc import Mapping

from longmix_kernels.attention import cost
from longmix_kernels.attention.cost import Setting, visible_pairs
from longmix_kernels.attention.launch import LaunchConfig
from longmix_kernels.attention.probe_inputs import ProbeInputs
from longmix_kernels.cost import Work

FORWARD = ("probe_forward",)
BACKWARD = ("probe_grad_query", "probe_grad_key_value")
"""The kernels of a call, in the order in which they run."""

# For each row, how many vectors of D columns, vectors of Dv columns and float32 numbers a kernel reads or writes. The
# forward reads the row's own key once more.
_MOVED = {"probe_forward": (4, 3, 2), "probe_grad_query": (5, 4, 6), "probe_grad_key_value": (4, 3, 4)}


def call_flops(call: ProbeInputs) -> int:
    """Return the operations of a call by its definition: 4 (D + Dv) for each pair of a query and a key that it sees."""
    inputs = call.inputs
    columns = inputs.query.shape[3] + inputs.value.shape[3]
    return 4 * columns * visible_pairs(inputs.query, inputs.key, inputs.pattern)


def kernel_work(setting: Setting) -> Mapping[str, Work]:
    """Return the work of every kernel of a call, by name."""
    scores = setting.rows * (setting.length + 1) // 2
    return {
        kernel: Work(
            2 * scores * _columns(kernel, setting.dim, setting.value_dim),
            setting.rows * cost.row_bytes(moved, setting),
            scores,
            setting.size,
        )
        for kernel, moved in _MOVED.items()
    }


def tile_work(kernel: str, config: LaunchConfig, setting: Setting) -> Work:
    """Return the work of one step of a kernel's inner loop: the products of a tile, and the bytes that it loads.

    Args:
        kernel: the kernel's name.
        config: its tile.
        setting: the sizes of the call.
    """
    over_rows = kernel == "probe_grad_key_value"
    queries = 2 if over_rows else 1
    loaded = (queries * setting.dim + setting.value_dim) * setting.size + 16 * over_rows + 4 * setting.permuted
    scores = config.rows * config.keys
    flops = 2 * scores * _columns(kernel, setting.dim, setting.value_dim)
    return Work(flops, (config.rows if over_rows else config.keys) * loaded, scores, setting.size)


def _columns(kernel: str, dim: int, value_dim: int) -> int:
    """Return how many columns a kernel multiplies for each score."""
    return {
        "probe_forward": 2 * (dim + value_dim),
        "probe_grad_query": 4 * dim + value_dim,
        "probe_grad_key_value": 4 * dim + 2 * value_dim,
    }[kernel]
