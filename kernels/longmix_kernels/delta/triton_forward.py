"""The delta rule with diagonal-plus-low-rank transitions on a GPU, forward: what chunks do, then a scan over states.

A chunk of C tokens is an affine map of the state that enters it, and so is its output (see `triton_prepare`). All maps
are found at once, and one kernel applies them in order (`triton_scan`). Both are forgotten: kept for the backward they
would be, per token of a head, 4 K V / C bytes of states, and in the dtype of the inputs K K / C + K + C numbers. The
backward runs both kernels again instead, without outputs.
"""

from typing import NamedTuple

import torch

from longmix_kernels.delta.inputs import Inputs
from longmix_kernels.delta.launch import Call
from longmix_kernels.delta.triton_prepare import prepare_kernel
from longmix_kernels.delta.triton_scan import scan_kernel


class Chunks(NamedTuple):
    """What chunks do to states, see `triton_prepare`.

    Attributes:
        states: float32 [B, H, chunks, K, V]: what enters each chunk, or R where outputs were asked for.
        transitions: E, [B, H, chunks, K, K]; None without low-rank reads.
        reads: Q, [B, H, T, K].
        inverses: M, [B, H, T, chunk]; None without low-rank reads, or where outputs were asked for.
        kept: float32 [B, H, chunks, K], the shares of states that are left.
    """

    states: torch.Tensor
    transitions: torch.Tensor | None
    reads: torch.Tensor
    inverses: torch.Tensor | None
    kept: torch.Tensor


def triton_forward(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Compute the delta rule; no float64, head dimensions up to 256.

    Returns:
        The output [B, T, H, V] and the state after the last token, float32 [B, H, K, V].
    """
    call = Call(inputs)
    output = call.query.new_empty(call.batch, call.length, call.heads, call.value_dim)
    final = call.query.new_empty(call.batch, call.heads, call.dim, call.value_dim, dtype=torch.float32)
    run_chunks(call, output, final)
    return output, final


def run_chunks(call: Call, output: torch.Tensor | None, final: torch.Tensor | None) -> Chunks:
    """Find what all chunks do, and take the states through them.

    Args:
        call: what is computed.
        output: [B, T, H, V], contiguous, to write outputs to; None for the backward, which needs states instead.
        final: float32 [B, H, K, V], contiguous, for the last state; None likewise.
    """
    query, low_rank = call.query, call.low_rank
    chunks = call.batch, call.heads, call.chunks, call.dim
    found = Chunks(
        states=query.new_empty(*chunks, call.value_dim, dtype=torch.float32),
        transitions=query.new_empty(*chunks, call.dim) if low_rank else None,
        reads=query.new_empty(call.batch, call.heads, call.length, call.dim),
        inverses=query.new_empty(call.batch, call.heads, call.length, call.chunk)
        if low_rank and output is None
        else None,
        kept=query.new_empty(*chunks, dtype=torch.float32),
    )
    call.launch(
        "prepare",
        prepare_kernel,
        call.tokens(),
        output,
        *found,
        call.length,
        call.heads,
    )
    call.launch(
        "scan",
        scan_kernel,
        call.document_ids,
        call.initial,
        call.carried,
        output,
        found.states,
        found.transitions,
        found.reads,
        found.kept,
        final,
        call.length,
        call.heads,
    )
    return found
