"""Compute the forward of block-local attention with far keys on a GPU.

The attention engine's kernels compute the exact part, and a kernel of its own merges it with what queries read of far
keys. Compared with one fused kernel, 2 Dv numbers and two logsumexps per row pass through memory once more, and half
precision is rounded twice. One kernel sums over the keys of all blocks at once, and the next one carries the sums from
block to block.
"""

import torch

from longmix_kernels.attention.inputs import Inputs as ExactInputs
from longmix_kernels.attention.pattern import Pattern
from longmix_kernels.attention.triton_forward import triton_forward as exact_forward
from longmix_kernels.scatter.bounds import exact_bounds
from longmix_kernels.scatter.inputs import Inputs
from longmix_kernels.scatter.launch import Call, Sums
from longmix_kernels.scatter.triton_merge import merge_kernel
from longmix_kernels.scatter.triton_scan import scan_kernel
from longmix_kernels.scatter.triton_sums import sums_kernel
from longmix_kernels.tensors import strided


def triton_forward(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output [B, Tq, Hq, Dv], the logsumexp [B, Tq, Hq] and that of the exact part, both float32.

    Args:
        inputs: the call, with head dimensions up to 256 and no float64.
    """
    output, exact_logsumexp = exact_forward(exact_inputs(inputs))
    logsumexp = exact_logsumexp.clone()
    if not inputs.has_far_keys():
        return output, logsumexp, exact_logsumexp
    call = Call(inputs)
    call.launch(
        "merge",
        merge_kernel,
        call.blocks,
        *strided(call.query_features),
        entering_sums(call),
        exact_logsumexp,
        logsumexp,
        output,
        call.row_tiles("merge"),
        call.slots,
        call.heads,
        call.group,
        call.queries,
        call.stride_blocks,
    )
    return output, logsumexp, exact_logsumexp


def exact_inputs(inputs: Inputs) -> ExactInputs:
    """Return the part of a call that the attention engine computes. `hi` is None, since it has a closed form."""
    queries, keys, device = inputs.query.shape[1], inputs.key.shape[1], inputs.query.device
    _, lo, _ = exact_bounds(inputs.document_ids, queries, keys, inputs.block_size, inputs.past_blocks, device)
    return ExactInputs(inputs.query, inputs.key, inputs.value, Pattern(lo, None), inputs.scale)


def entering_sums(call: Call) -> Sums:
    """Return the sums over all far keys, for every block that has any."""
    found, entering = call.new_sums(of_queries=False), call.new_sums(of_queries=False)
    call.launch(
        "sums",
        sums_kernel,
        call.blocks,
        *strided(call.key_features, call.value),
        None,
        None,
        found,
        call.block_size,
        call.slots,
        call.key_heads,
        1,
        call.keys,
        call.stride_blocks,
    )
    call.launch(
        "scan",
        scan_kernel,
        call.blocks,
        found,
        call.memory,
        call.normalizer,
        call.log_scale,
        entering,
        call.slots,
        call.key_heads,
        call.stride_blocks,
    )
    return entering
