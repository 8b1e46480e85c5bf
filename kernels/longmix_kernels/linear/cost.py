"""What linear attention costs by its mathematics, and the chunk size that follows. Estimates; nothing here is measured.

Per token and head, with chunks of L tokens in tiles of t, of whose pairs c = (L / t + 1) / (2 L / t) are visited,

    forward     4 Dk Dv + 2 c L (Dk + Dv)             multiply-adds count twice
    backward   10 Dk Dv + 6 c L (Dk + Dv)

where the states' share of the backward is the same 2 Dk Dv again to compute them, 2 Dk Dv for their gradients, and
2 Dk Dv to take each of dQ, dK and dV from them. Between kernels, states pass through memory once each way: Dk Dv / L
numbers per token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from longmix_kernels.accelerators import H200
from longmix_kernels.cost import Work, per_row
from longmix_kernels.linear.inputs import Inputs

SMALLEST_CHUNK, LONGEST_CHUNK = 16, 1024
_TILE = 64


FORWARD = ("scales", "gates", "states", "output")
BACKWARD = ("gates", "grad_rows", "states", "grad_states", "grad_query", "grad_key_value", "grad_gates")
"""The kernels of a call, in the order in which they run; `scales` and `grad_rows` are for the normalised form."""


def call_flops(inputs: Inputs) -> int:
    """Operations of a call by its definition: an update and a reading of the state per row, 2 Dk Dv each."""
    return 4 * inputs.query.numel() * inputs.value.shape[3]


@dataclass(frozen=True)
class Setting:
    """A call [B, T, H, D], `rows` being B T H.

    Attributes:
        rows: tokens times heads.
        dim, value_dim: of keys and of values.
        chunk: tokens of a chunk.
        normalize: divide by the normaliser.
        size: bytes of a number of query, key and value.
        state_size: bytes of a number of a stored state.
    """

    rows: int
    dim: int
    value_dim: int
    chunk: int
    normalize: bool
    size: int = 2
    state_size: int = 4


def kernel_work(setting: Setting) -> Mapping[str, Work]:
    """Return the work of every kernel, reading and writing each tensor once, without documents and initial state."""
    dim, value_dim, chunk, normalize = setting.dim, setting.value_dim, setting.chunk, setting.normalize
    tiles = max(chunk // _TILE, 1)
    pairs = chunk * (tiles + 1) / (2 * tiles)
    both, memory = dim + value_dim, dim * value_dim
    narrow, wide = setting.size * dim, setting.size * value_dim
    # The states, and the normalisers in float32.
    state = (memory * setting.state_size + 4 * dim * normalize) / chunk
    work = per_row(setting.rows)
    kernels = {
        "gates": work(0, 4 * (8 + normalize)),
        "states": work(2 * memory, narrow + wide + 8 + state),
        "output": work(2 * memory + 2 * pairs * both, 2 * narrow + 2 * wide + 20 + 8 * normalize + state),
        "grad_states": work(2 * memory, narrow + wide + 4 + 4 * normalize + state),
        "grad_query": work(2 * memory + 2 * pairs * both, 3 * narrow + 2 * wide + 24 + 4 * normalize + state),
        "grad_key_value": work(4 * memory + 4 * pairs * both, 3 * narrow + 3 * wide + 24 + 4 * normalize + state),
        "grad_gates": work(0, 16),
    }
    if normalize:
        kernels["scales"] = work(0, 12)
        kernels["grad_rows"] = work(0, 2 * wide + 28)
    return kernels


def default_chunk(dim: int, value_dim: int, length: int) -> int:
    """Return the chunk size for head dimensions and a length: a power of two, at least 64 and no longer than needed.

    A longer chunk stores fewer states and computes more pairs. Where a forward that overlaps neither with the other
    takes the least time, with I operations per byte at the peak rates and F of a chunk's pairs visited,

        L = sqrt((2 Dk Dv (1 + 4 I) + 5) / (F (2 (Dk + Dv) + 6) + 1))        182, 301 and 426 at 64/64, 128/256, 256/512

    and the next smaller power of two is taken, not above 256: published kernels were fastest at 128 to 256, below what
    their model says. With I of an H200, F = 3/4.
    """
    intensity, visited = H200.flops(2) / H200.bandwidth, 0.75
    best = math.sqrt((2 * dim * value_dim * (1 + 4 * intensity) + 5) / (visited * (2 * (dim + value_dim) + 6) + 1))
    chunk = min(max(1 << int(math.log2(best)), _TILE), 256)
    return clamp_chunk(chunk, length)


def clamp_chunk(chunk: int, length: int) -> int:
    """Return a chunk size that the kernels take and that is not needlessly longer than the sequence."""
    needed = max(1 << (length - 1).bit_length(), SMALLEST_CHUNK)
    return min(chunk, needed, LONGEST_CHUNK)
