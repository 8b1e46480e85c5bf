"""What the delta rule costs by its mathematics, and the chunks it is taken in. Estimates; nothing here is measured.

Bytes are those that have to pass between chip and memory, each tensor read or written once per kernel. Operations are
those of products of matrices, multiply-adds counted twice, weights between tokens in full and not only where rows see.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from longmix_kernels.cost import Work, per_row
from longmix_kernels.delta.inputs import Inputs

SPAN = 100.0
"""Largest exponent of 2 that weights of rows or columns of a chunk may have.

float32 has 126 on either side; the rest is for what is weighted, and for sums. From the middle of a chunk of C tokens
it is at most C / 2 + 1 log decays away.
"""

SHORTEST_CHUNK, EXACT_CHUNK, LONGEST_CHUNK = 16, 32, 64
"""Tokens of the shortest chunk, of the longest for decays of channels without a bound, and of the longest of all.

Registers do not suffice for chunks of 64 without a bound. The gradients of queries and of keys would spill 1792 and
1368 bytes, and without low-rank reads 380 and 392: heads of 64 / 64, documents, an initial state, sm_90, Triton 3.9.
In chunks of 32 they spill nothing.
"""

WIDEST = ((128, 64), (256, 32))
"""Up to which head dimension, of keys or of values, a chunk of how many tokens fits into registers."""

DECAYS = ("bounded", "exact", "head")
"""How kernels weight pairs of tokens, see `triton_tiles`: decays of channels with or without a bound, or of heads."""

FORWARD = ("prepare", "scan")
BACKWARD = ("prepare_again", "scan_again", "grad_scan", "grad_value", "grad_key")
"""The kernels of a call with bounded decays, as they run; the forward's run again for states, without outputs.

For other decays, "grad_query" runs before "grad_key" and takes the rows' half of its work.
"""


def call_flops(inputs: Inputs) -> int:
    """Operations of a call by its definition: an update and a reading of the state per row, and two with a low rank."""
    return (4 if inputs.low_rank_read is None else 8) * inputs.query.numel() * inputs.value.shape[3]


@dataclass(frozen=True)
class Setting:
    """A call [B, T, H, D], `rows` being B T H.

    Attributes:
        rows: tokens times heads.
        dim, value_dim: of keys and of values.
        chunk: tokens of a chunk.
        low_rank: whether there are low-rank reads and writes.
        size: bytes of a number of the inputs.
    """

    rows: int
    dim: int
    value_dim: int
    chunk: int
    low_rank: bool = True
    size: int = 2


def kernel_work(setting: Setting) -> Mapping[str, Work]:
    """Return the work of every kernel, without documents and initial state."""
    dim, value_dim, chunk, low = setting.dim, setting.value_dim, setting.chunk, setting.low_rank
    narrow, wide, decay = setting.size * dim, setting.size * value_dim, 4 * dim
    kinds = 4 if low else 2
    tokens = kinds * narrow + decay
    state, kept = 4 * dim * value_dim / chunk, 4 * dim / chunk
    transition, inverse = low * setting.size * dim * dim / chunk, low * setting.size * chunk
    # Products with a matrix of weights between tokens, of as many columns as keys or values; with a state.
    pairs, value_pairs, through = 2 * chunk * dim, 2 * chunk * value_dim, 2 * dim * value_dim
    merges = low * 4 * chunk * chunk * int(math.log2(chunk // 16))
    moves = low * through * dim / chunk
    work = per_row(setting.rows)
    maps = (
        low * (3 * pairs + 2 * value_pairs) + merges + (2 if low else 1) * through + low * (2 * pairs + 2 * dim * dim)
    )
    of_maps = tokens + wide + state + transition + narrow + kept
    outputs = pairs + (2 if low else 1) * value_pairs
    return {
        "prepare": work(maps + outputs, of_maps + wide),
        "scan": work(through + moves, 2 * wide + state + transition + narrow + kept),
        "prepare_again": work(maps, of_maps + inverse),
        "scan_again": work(moves, 2 * state + transition + kept),
        "grad_scan": work(through + moves, wide + state + transition + narrow + kept),
        "grad_value": work(
            (4 if low else 1) * pairs + (6 if low else 1) * value_pairs + (3 if low else 1) * through,
            tokens + inverse + (1 + low) * state + (5 if low else 2) * wide,
        ),
        "grad_key": work(
            kinds * (kinds // 2) * (pairs + value_pairs) + kinds * through,
            2 * tokens + kinds * wide + 2 * state,
        ),
    }


def choose_chunk(
    dim: int,
    value_dim: int,
    length: int,
    chunk_size: int | None,
    min_log_decay: float | None,
    per_head: bool = False,
) -> tuple[int, str]:
    """Return how many tokens a chunk has, and which of `DECAYS` the kernels take.

    "bounded" is not taken where it would need chunks of less than 32 tokens, which is below -4.07. There, the gradient
    of a decay would be a small difference of what rows and columns have; "exact" costs operations, but no memory.

    Args:
        dim, value_dim: of keys and of values.
        length: of the sequence; chunks are no longer than needed.
        chunk_size: what the caller allows at most; None for no wish.
        min_log_decay: what the caller promises, or None.
        per_head: whether each head has one decay.
    """
    safe, decay = LONGEST_CHUNK, "head"
    if not per_head:
        while safe > SHORTEST_CHUNK and (min_log_decay is None or exponent(safe, min_log_decay) > SPAN):
            safe //= 2
        safe, decay = (safe, "bounded") if safe > SHORTEST_CHUNK else (EXACT_CHUNK, "exact")
    fitting = next(size for widest, size in WIDEST if (dim if per_head else max(dim, value_dim)) <= widest)
    chunk = min(chunk_size or fitting, safe)
    while chunk > SHORTEST_CHUNK and length <= chunk // 2:
        chunk //= 2
    return chunk, decay


def exponent(chunk: int, min_log_decay: float) -> float:
    """Return the largest exponent of 2 in the weights of a chunk with log decays no smaller than that."""
    return (chunk // 2 + 1) * -min_log_decay * math.log2(math.e)
