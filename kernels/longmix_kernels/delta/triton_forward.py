"""The delta rule with diagonal-plus-low-rank transitions on a GPU, forward: what chunks do, then a scan over states.

A chunk of C tokens is an affine map of the state that enters it, and so is its output (see `triton_prepare`). All maps
are found at once, and one kernel applies them in order (`triton_scan`). What it goes through is kept for the backward,
which then needs neither the maps nor the states again: per token of a head, 4 K V / C bytes for states, and in the
dtype of the inputs K K / C + K + C numbers for E, Q and M.
"""

import torch

from longmix_kernels.delta.inputs import Inputs
from longmix_kernels.delta.launch import Call, kept_by_triton
from longmix_kernels.delta.triton_prepare import prepare_kernel
from longmix_kernels.delta.triton_scan import scan_kernel


def triton_forward(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Compute the delta rule; no float64, head dimensions up to 256.

    Returns:
        The output [B, T, H, V] and the state after the last token, float32 [B, H, K, V]; then for the backward, float32
        states that enter chunks [B, H, chunks, K, V], E [B, H, chunks, K, K], Q [B, H, T, K], M [B, H, T, chunk], and
        float32 shares of states that are kept [B, H, chunks, K]; E and M are empty without low-rank reads.
    """
    call = Call(inputs)
    output = call.query.new_empty(call.batch, call.length, call.heads, call.value_dim)
    final = call.query.new_empty(call.batch, call.heads, call.dim, call.value_dim, dtype=torch.float32)
    states, transitions, reads, inverses, kept = kept_by_triton(inputs)
    call.launch(
        "prepare",
        prepare_kernel,
        call.query,
        call.key,
        call.value,
        call.log_decay,
        call.low_rank_read,
        call.low_rank_write,
        call.document_ids,
        output,
        states,
        transitions if call.low_rank else None,
        reads,
        inverses if call.low_rank else None,
        kept,
        call.scale,
        call.floor,
        call.length,
        call.heads,
        *call.token_strides(),
    )
    call.launch(
        "scan",
        scan_kernel,
        call.document_ids,
        call.initial,
        output,
        states,
        transitions if call.low_rank else None,
        reads,
        kept,
        final,
        call.length,
        call.heads,
    )
    return output, final, states, transitions, reads, inverses, kept
