"""Block-local attention with far keys through features on a GPU, forward.

The exact part runs in the attention engine's kernels and is merged, unfused, with what queries read of far keys: 2 Dv
numbers and two logsumexps per row pass through memory once more than in one kernel, and half precision is rounded
twice. Sums over far keys are taken of all blocks at once and then carried from block to block.
"""

from collections.abc import Sequence

import torch

from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.triton_forward import triton_forward as exact_forward
from longmix_kernels.scatter.bounds import exact_bounds
from longmix_kernels.scatter.launch import Call, launch_config, on_device, strides
from longmix_kernels.scatter.triton_merge import merge_kernel
from longmix_kernels.scatter.triton_scan import scan_kernel
from longmix_kernels.scatter.triton_sums import sums_kernel


def triton_forward(*inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute attention, as `blocked.blocked_forward` does; no float64, head dimensions up to 256."""
    query, key, value = inputs[:3]
    output, exact_logsumexp = exact_forward(query, key, value, exact_pattern(inputs), inputs[-1])
    logsumexp = exact_logsumexp.clone()
    if not has_far_keys(inputs):
        return output, logsumexp, exact_logsumexp
    call = Call(*inputs)
    with on_device(call.value):
        sums = entering_sums(call)
        config = launch_config("merge", call)
        row_tiles, value_tiles = call.row_tiles(config), -(-call.value_dim // config.values)
        merge_kernel[(call.slots * row_tiles * value_tiles * call.batch * call.heads,)](
            call.blocks,
            call.query_features,
            *sums,
            exact_logsumexp,
            logsumexp,
            output,
            row_tiles,
            call.slots,
            call.heads,
            call.group,
            call.queries,
            call.stride_blocks,
            *strides(call.query_features),
            **call.product_constants(config),
        )
    return output, logsumexp, exact_logsumexp


def exact_pattern(inputs: Sequence) -> Pattern:
    """Return which keys are seen exactly."""
    query, key, *_, document_ids, block_size, past_blocks, _ = inputs
    sizes = query.shape[1], key.shape[1], block_size, past_blocks
    return Pattern(exact_bounds(document_ids, *sizes, query.device)[1], None)


def has_far_keys(inputs: Sequence) -> bool:
    """Say whether a query can see a key, or an initial state, through features."""
    _, key, _, features, _, memory, *_, block_size, past_blocks, _ = inputs
    return features is not None and (memory is not None or key.shape[1] > (past_blocks + 1) * block_size)


def entering_sums(call: Call) -> list[torch.Tensor]:
    """Return scales, total weights and sums of the far keys of every block that has any."""
    scales, weights, sums = found = call.new_sums()
    config = launch_config("sums", call)
    sums_kernel[call.sums_programs(config)](
        call.blocks,
        call.key_features,
        call.value,
        None,
        None,
        scales,
        weights,
        None,
        sums,
        call.block_size,
        call.slots,
        call.key_heads,
        1,
        call.keys,
        call.stride_blocks,
        *strides(call.key_features, call.value),
        **call.product_constants(config),
    )
    config = launch_config("scan", call)
    scan_kernel[call.scan_programs(config)](
        call.blocks,
        scales,
        weights,
        sums,
        call.memory,
        call.normalizer,
        call.log_scale,
        call.slots,
        call.key_heads,
        call.stride_blocks,
        **call.constants(config),
    )
    return found
