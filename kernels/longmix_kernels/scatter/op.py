"""The public function of block-local attention with far keys through features."""

from typing import NamedTuple

import torch

from longmix_kernels.operators import definition, implementation
from longmix_kernels.runtime import backend_of_call, check_chunks
from longmix_kernels.scatter import checks
from longmix_kernels.scatter.cost import call_flops
from longmix_kernels.scatter.inputs import Inputs
from longmix_kernels.scatter.reference import reference_forward
from longmix_kernels.scatter.state import FeatureState

BACKENDS = ("reference", "blocked", "triton")
"""The implementations `scatter_attention` offers."""


class ScatterResult(NamedTuple):
    """What `scatter_attention` returns.

    Attributes:
        output: [B, Tq, Hq, Dv], in the dtype of the query.
        logsumexp: [B, Tq, Hq], the natural logarithm of a row's sum of weights before they are normalised; float64 for
            float64 inputs and float32 otherwise.
        exact_logsumexp: the same for the exact keys alone, without a gradient. exp(exact_logsumexp - logsumexp) is the
            share of the softmax that is exact.
    """

    output: torch.Tensor
    logsumexp: torch.Tensor
    exact_logsumexp: torch.Tensor


def scatter_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_features: torch.Tensor | None = None,
    key_features: torch.Tensor | None = None,
    *,
    block_size: int,
    past_blocks: int,
    initial_state: FeatureState | None = None,
    document_ids: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> ScatterResult:
    """Compute causal softmax attention, exact for the latest blocks and through positive features for all keys before.

    A document is cut into blocks, counted from its first token. A query sees its own block and `past_blocks` before it
    exactly, with weights exp(scale * q . k). It sees all earlier keys of its document with weights phi(q) . phi(k), in
    the same softmax (Chen et al. 2021, arXiv 2110.15343; `reference` has the equations). Nothing is subtracted, and
    every feature has a running scale of its own, so no later key moves an earlier row. Sums are float32, or float64
    for float64 inputs. The results are exactly differentiable, once, through output and logsumexp, in all tensors but
    `document_ids`.

    Args:
        query: [B, Tq, Hq, D], float16, bfloat16, float32 or float64; the last Tq of Tk rows.
        key: [B, Tk, Hkv, D], same dtype; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        value: [B, Tk, Hkv, Dv], same dtype.
        query_features: [B, Tq, Hq, m], log phi(q), finite, float32 (float64 with float64 inputs); None for no far keys.
        key_features: [B, Tk, Hkv, m], log phi(k), finite, same dtype.
        block_size: tokens of a block, at least 1.
        past_blocks: whole blocks before its own that a query sees exactly, at least 0.
        initial_state: sums over earlier keys of the document of each row's first query, whose first given key then
            begins a block; None if no row has such keys. For a row without them, the state must be empty.
        document_ids: int32 or int64 [B, Tk], non-decreasing along Tk; None if each row is one document.
        scale: the factor on the exact scores, D ** -0.5 by default.
        backend: "reference" (the definition, memory Tq * Tk), "blocked" (tiles, memory linear in Tq + Tk) or "triton"
            (the same on a CUDA device; no float64, head dimensions up to 256). None picks "triton" where it covers the
            call on a CUDA device, and "blocked" elsewhere.

    Returns:
        The output, the logsumexp and the logsumexp of the exact keys.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value. The order of `document_ids` is read on the
            CPU only.
    """
    checks.check_inputs(query, key, value)
    checks.check_sizes(query, key, block_size, past_blocks)
    checks.check_features(query, key, query_features, key_features)
    check_chunks(key, document_ids, None)
    checks.check_state(key, value, key_features, initial_state)
    backend = backend_of_call(backend, BACKENDS, checks.TRITON_MAX_DIM, query=query, value=value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    memory, normalizer, log_scale = initial_state or (None, None, None)
    tensors = query, key, value, query_features, key_features, memory, normalizer, log_scale, document_ids
    output, logsumexp, exact_logsumexp = _IMPLEMENTATIONS[backend](Inputs(*tensors, block_size, past_blocks, scale))
    return ScatterResult(output, logsumexp, exact_logsumexp.detach())


def _empty(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    query, exact = inputs.query, torch.promote_types(inputs.query.dtype, torch.float32)
    rows = [query.new_empty(query.shape[:3], dtype=exact) for _ in range(2)]
    return query.new_empty(*query.shape[:3], inputs.value.shape[3]), *rows


_IMPLEMENTATIONS = {"reference": definition(reference_forward)}
_IMPLEMENTATIONS |= {
    name: implementation(
        "scatter",
        name,
        Inputs,
        empty=_empty,
        results=3,
        incoming=2,
        saved=(0, 1),
        outgoing=8,
        flops=call_flops,
    )
    for name in BACKENDS[1:]
}
