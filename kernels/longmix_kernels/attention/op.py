"""The public attention function."""

from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch.nn import functional as F

from longmix_kernels.attention import checks, split_launch
from longmix_kernels.attention.bounds import check_row_bounds, row_bounds
from longmix_kernels.attention.cost import call_flops
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.attention.pattern import BlockList, Pattern
from longmix_kernels.attention.reference import reference_forward
from longmix_kernels.launch import with_room
from longmix_kernels.operators import computed, deferred, definition, implementation
from longmix_kernels.runtime import backend_of_call, is_readable

BACKENDS = ("reference", "blocked", "triton")
"""The implementations `attention` offers."""


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = ...,
    window: int | None = ...,
    lo: torch.Tensor | None = ...,
    hi: torch.Tensor | None = ...,
    query_rows: torch.Tensor | None = ...,
    key_rows: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    blocks: BlockList | None = ...,
    document_ids: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_logsumexp: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = ...,
    window: int | None = ...,
    lo: torch.Tensor | None = ...,
    hi: torch.Tensor | None = ...,
    query_rows: torch.Tensor | None = ...,
    key_rows: torch.Tensor | None = ...,
    alibi_slopes: torch.Tensor | None = ...,
    blocks: BlockList | None = ...,
    document_ids: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_logsumexp: Literal[True],
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    query_rows: torch.Tensor | None = None,
    key_rows: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    blocks: BlockList | None = None,
    document_ids: torch.Tensor | None = None,
    scale: float | None = None,
    return_logsumexp: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention in which every query row sees a contiguous run of key rows.

    Scores, softmax and sums are float32, or float64 for float64 inputs. The results are differentiable once in query,
    key and value, through the output and through the logsumexp. With fewer queries than keys, the queries are the last
    rows. A row that sees no key has output 0 and logsumexp -inf, and sends no gradient anywhere.

    Args:
        query: [B, Tq, Hq, D], float16, bfloat16, float32 or float64.
        key: [B, Tk, Hkv, D], same dtype; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        value: [B, Tk, Hkv, Dv], same dtype.
        causal: whether a row sees no key after its own position; otherwise it sees all keys of its document.
        window: how many keys a row sees at most, its own position included; needs `causal`.
        lo: int32 [B or 1, Hq or 1, Tq], the first key row that a query row sees; non-decreasing along Tq. It replaces
            `window` and `document_ids`.
        hi: as `lo`, one past the last key row seen. It replaces `causal`, and comes with `lo`.
        query_rows: int32 [B or 1, Hq or 1, Tq], a permutation of each head's rows: row i of `lo` and `hi` is about row
            `query_rows[..., i]` of query, output and logsumexp. So sorted rows need no sorted copies. Comes with `lo`.
        key_rows: int32 [B or 1, Hkv or 1, Tk], the same for key and value.
        alibi_slopes: float32 [Hq]; slope * (key position - query position), at most 0, is added to the scores.
            Positions count rows before permutation. The slopes get no gradient.
        blocks: which blocks of keys each block of rows sees; a row then sees only those keys of the above that are in
            listed blocks. Not together with `lo`, `hi`, `query_rows` and `key_rows`.
        document_ids: int32 or int64 [B, Tk], non-decreasing along Tk; rows see the keys of their own document only.
        scale: the factor on the scores, D ** -0.5 by default.
        return_logsumexp: whether to return the logsumexp of each row's scores too (natural logarithm).
        backend: "reference" (the definition, memory Tq * Tk), "blocked" (tiles, memory linear in Tq + Tk) or "triton"
            (the same on a CUDA device; no float64, head dimensions up to 256). None picks "triton" where it covers the
            call on a CUDA device, and "blocked" elsewhere.

    Returns:
        The output [B, Tq, Hq, Dv] in the dtype of `query`; with `return_logsumexp` also the logsumexp [B, Tq, Hq],
        float64 for float64 inputs and float32 otherwise.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or excludes another. The order of `lo`, `hi`
            and `document_ids`, and whether rows are permutations, is read on the CPU only.
    """
    checks.check_inputs(query, key, value)
    checks.check_rows(query, key, lo=lo, hi=hi, query_rows=query_rows, key_rows=key_rows)
    if alibi_slopes is not None:
        checks.check_slopes(query, alibi_slopes, causal)
    given = {"window": window, "document_ids": document_ids, "blocks": blocks, "causal=False": None if causal else 0}
    check_company(given, {"lo": lo, "hi": hi, "query_rows": query_rows, "key_rows": key_rows})
    backend = backend_of_call(backend, BACKENDS, checks.TRITON_MAX_DIM, query=query, value=value)
    missing = 0
    if blocks is not None:
        checks.check_blocks(query, key, blocks)
        # Row blocks are counted from the first key position on, so the queries must begin where a block does.
        missing = (key.shape[1] - query.shape[1]) % blocks.size
        query = F.pad(query, (0, 0, 0, 0, missing, 0))
    if document_ids is not None:
        checks.check_document_ids(key, document_ids)
    closed = backend == "triton"
    lo, hi = bounds_of(query, key, causal, window, document_ids, lo, hi, closed)
    pattern = Pattern(lo, hi, query_rows, key_rows, alibi_slopes, blocks, causal, window)
    inputs = Inputs(query, key, value, pattern, query.shape[-1] ** -0.5 if scale is None else scale)
    if backend == "reference" and not torch.compiler.is_compiling():
        check_values(inputs)
    split = backend == "triton" and split_launch.covers(inputs)
    output, logsumexp = (_SPLIT if split else _IMPLEMENTATIONS[backend])(inputs)
    if missing:
        output, logsumexp = output[:, missing:], logsumexp[:, missing:]
    return (output, logsumexp) if return_logsumexp else output


def check_company(closed: Mapping[str, object], rows: Mapping[str, object]) -> None:
    """Refuse explicit rows without `lo`, or together with arguments that describe bounds in closed form.

    Args:
        closed: the arguments in closed form by name, None where the caller gave none.
        rows: the explicit rows by name, likewise.
    """
    described, given = ([name for name, x in group.items() if x is not None] for group in (closed, rows))
    if given and (described or "lo" not in given):
        names = ", ".join([*given, *described])
        raise ValueError(f"got {names}; hi, query_rows and key_rows come with lo, and without {', '.join(closed)}")


def bounds_of(
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
    window: int | None,
    document_ids: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    closed: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the bounds. If `closed`, a bound that has a closed form is None, after the same checks."""
    queries, keys = query.shape[1], key.shape[1]
    if lo is not None and (hi is not None or closed):
        return lo, hi
    if closed and document_ids is None:
        row_bounds(queries, keys, causal=causal, window=window, device="meta")
        return None, None
    first, end = row_bounds(queries, keys, causal=causal, window=window, document_ids=document_ids, device=query.device)
    if lo is not None:
        return lo, end
    # Packed documents need `lo`, which includes a window. They need `hi` only where it is not the row's own position.
    return first, None if closed and causal else end


def check_values(inputs: Inputs) -> None:
    """Check the values of bounds and rows where reading them costs no wait."""
    pattern = inputs.pattern
    if not is_readable(inputs.query):
        return
    if pattern.lo is not None and pattern.hi is not None:
        check_row_bounds(pattern.lo, pattern.hi, inputs.key.shape[1])
    checks.check_permutation("query_rows", pattern.query_rows)
    checks.check_permutation("key_rows", pattern.key_rows)


def _empty(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    query, exact = inputs.query, torch.promote_types(inputs.query.dtype, torch.float32)
    output = query.new_empty(*query.shape[:3], inputs.value.shape[3])
    return output, query.new_empty(query.shape[:3], dtype=exact)


_IMPLEMENTATIONS = {"reference": definition(reference_forward)}
_IMPLEMENTATIONS |= {
    name: implementation(
        "attention",
        name,
        Inputs,
        empty=_empty,
        results=2,
        incoming=2,
        saved=(0, 1),
        outgoing=3,
        flops=call_flops,
        check=check_values,
    )
    for name in BACKENDS[1:]
}

_SPLIT = computed(
    "longmix::attention_split",
    Inputs,
    forward=with_room(deferred("longmix_kernels.attention.triton_split.triton_split")),
    empty=_empty,
    results=2,
    flops=call_flops,
    check=check_values,
)
"""Attention with few queries and no gradient: `split_launch` says which calls that are, and how keys are divided."""
