"""The delta rule with diagonal-plus-low-rank transitions on a GPU, forward: what chunks do, then a scan over states.

A chunk of C tokens is an affine map of the state that enters it, and so is its output (see `triton_prepare`). All maps
are found at once, and one kernel applies them in order (`triton_scan`). What it goes through is kept for the backward,
which then needs neither the maps nor the states again: per token of a head, 4 K V / C bytes for states, and in the
dtype of the inputs K K / C + K + C numbers for E, Q and M.
"""

import torch

from longmix_kernels.delta.launch import Call, kept_by_triton, launch_config, on_device
from longmix_kernels.delta.triton_prepare import prepare_kernel
from longmix_kernels.delta.triton_scan import scan_kernel


def triton_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    low_rank_read: torch.Tensor | None,
    low_rank_write: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    scale: float,
    chunk_size: int | None,
    min_log_decay: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """Compute the delta rule, with the arguments of `delta_rule`.

    Returns:
        The output [B, T, H, V] and the state after the last token, float32 [B, H, K, V]; then for the backward, float32
        states that enter chunks [B, H, chunks, K, V], E [B, H, chunks, K, K], Q [B, H, T, K], M [B, H, T, chunk], and
        float32 shares of states that are kept [B, H, chunks, K]; E and M are empty without low-rank reads.
    """
    inputs = query, key, value, log_decay, low_rank_read, low_rank_write, initial_state, document_ids
    call = Call(*inputs, scale, chunk_size, min_log_decay)
    output = query.new_empty(call.batch, call.length, call.heads, call.value_dim)
    final = query.new_empty(call.batch, call.heads, call.dim, call.value_dim, dtype=torch.float32)
    states, transitions, reads, inverses, kept = kept_by_triton(*inputs, scale, chunk_size, min_log_decay)
    with on_device(call.query):
        config = launch_config("prepare", call)
        prepare_kernel[call.chunk_programs()](
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
            **call.chunk_constants(config),
        )
        config = launch_config("scan", call)
        scan_kernel[call.scan_programs(config)](
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
            **call.scan_constants(config),
        )
    return output, final, states, transitions, reads, inverses, kept
