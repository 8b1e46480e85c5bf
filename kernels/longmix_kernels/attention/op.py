"""The public attention function: argument checks, row bounds, and the operators that carry it through autograd."""

from collections.abc import Callable
from typing import Literal, overload

import torch

from longmix_kernels.attention.blocked import blocked_backward, blocked_forward
from longmix_kernels.attention.bounds import check_row_bounds, row_bounds
from longmix_kernels.attention.reference import attention_reference
from longmix_kernels.runtime import check_triton_device, choose_backend

BACKENDS = ("reference", "blocked", "triton")
"""The implementations `attention` offers."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TRITON_MAX_DIM = 256


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = ...,
    window: int | None = ...,
    document_ids: torch.Tensor | None = ...,
    lo: torch.Tensor | None = ...,
    hi: torch.Tensor | None = ...,
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
    document_ids: torch.Tensor | None = ...,
    lo: torch.Tensor | None = ...,
    hi: torch.Tensor | None = ...,
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
    document_ids: torch.Tensor | None = None,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    scale: float | None = None,
    return_logsumexp: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which every query row sees a contiguous run of key rows.

    Scores, softmax and sums are computed in float32, or in float64 for float64 inputs. Differentiable once in query,
    key and value, through the output and through the logsumexp. With fewer queries than keys the queries are the last
    rows. A row that sees no key has output 0 and logsumexp -inf, and sends no gradient anywhere.

    Args:
        query: [B, Tq, Hq, D], float16, bfloat16, float32 or float64.
        key: [B, Tk, Hkv, D], same dtype; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        value: [B, Tk, Hkv, Dv], same dtype.
        causal: a row sees no key after its own position; otherwise it sees all keys of its document.
        window: number of keys a row sees at most, its own position included; needs `causal`.
        document_ids: int32 or int64 [B, Tk], non-decreasing along Tk; rows see the keys of their own document only.
        lo: int32 [B or 1, Hq or 1, Tq], first key row that a query row sees; non-decreasing along Tq. Together with
            `hi` it replaces `causal`, `window` and `document_ids`.
        hi: as `lo`, one past the last key row seen.
        scale: factor on the scores, D ** -0.5 by default.
        return_logsumexp: return the logsumexp of each row's scores too (natural logarithm).
        backend: "reference" (the definition, memory Tq * Tk), "blocked" (tiles, memory linear in Tq + Tk) or "triton"
            (the same on a CUDA device; no float64, head dimensions up to 256). None picks "triton" where it covers the
            call on a CUDA device, and "blocked" elsewhere.

    Returns:
        The output [B, Tq, Hq, Dv] in the dtype of `query`; with `return_logsumexp` also the logsumexp [B, Tq, Hq],
        float64 for float64 inputs and float32 otherwise.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or excludes another. The order of `lo`, `hi`
            and `document_ids` is read on the CPU only.
    """
    _check_inputs(query, key, value)
    queries, keys = query.shape[1], key.shape[1]
    uncovered = _triton_limits(query, value)
    backend = choose_backend(backend, query.device, BACKENDS[:2] if uncovered and backend is None else BACKENDS)
    if backend == "triton":
        if uncovered:
            raise ValueError(f"backend='triton' got {uncovered}")
        check_triton_device(query.device)
    given = lo is not None or hi is not None
    if not given:
        if document_ids is not None:
            _check_document_ids(key, document_ids)
        # The Triton kernels read no bounds that have a closed form; what is built for them then is the check alone.
        device = torch.device("meta") if backend == "triton" and document_ids is None else query.device
        lo, hi = row_bounds(queries, keys, causal=causal, window=window, document_ids=document_ids, device=device)
    elif lo is None or hi is None or not causal or window is not None or document_ids is not None:
        arguments = {
            "lo": lo,
            "hi": hi,
            "window": window,
            "document_ids": document_ids,
            "causal=False": None if causal else causal,
        }
        names = ", ".join(name for name, x in arguments.items() if x is not None)
        raise ValueError(f"got {names}; lo and hi come together, and without window, document_ids and causal=False")
    else:
        _check_bounds(query, lo, hi)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        if query.device.type == "cpu" and not torch.compiler.is_compiling():
            check_row_bounds(lo, hi, keys)
        with torch.autocast(query.device.type, enabled=False):
            output, logsumexp = attention_reference(query, key, value, lo, hi, scale)
    elif backend == "blocked":
        output, logsumexp = _blocked(query, key, value, lo, hi, scale)
    else:
        # Packed documents need `lo`, a window included, and `hi` only where it is not the row's own position.
        read_lo = given or document_ids is not None
        read_hi = given or (document_ids is not None and not causal)
        output, logsumexp = _triton(
            query, key, value, lo if read_lo else None, hi if read_hi else None, scale, causal, window
        )
    return (output, logsumexp) if return_logsumexp else output


def _check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, x, axes in (
        ("query", query, "[B, Tq, Hq, D]"),
        ("key", key, "[B, Tk, Hkv, D]"),
        ("value", value, "[B, Tk, Hkv, Dv]"),
    ):
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; allowed is {axes} with every size at least 1")
        if x.dtype not in _DTYPES or x.dtype != query.dtype:
            allowed = query.dtype if query.dtype in _DTYPES else ", ".join(map(str, _DTYPES))
            raise ValueError(f"{name} has dtype {x.dtype}; allowed is {allowed}")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device}; allowed is {query.device}, where query is")
    batch, _, query_heads, head_dim = query.shape
    keys, key_heads = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"key has shape {list(key.shape)}; allowed is [{batch}, Tk, Hkv, {head_dim}] to match query")
    if tuple(value.shape[:3]) != (batch, keys, key_heads):
        raise ValueError(f"value has shape {list(value.shape)}; allowed is [{batch}, {keys}, {key_heads}, Dv] as key")
    if query_heads % key_heads:
        raise ValueError(f"key has {key_heads} heads; allowed are the divisors of the {query_heads} heads of query")


def _check_document_ids(key: torch.Tensor, document_ids: torch.Tensor) -> None:
    if document_ids.shape != key.shape[:2]:
        raise ValueError(f"document_ids has shape {list(document_ids.shape)}; allowed is {list(key.shape[:2])}")
    if document_ids.device != key.device:
        raise ValueError(f"document_ids is on {document_ids.device}; allowed is {key.device}, where key is")


def _check_bounds(query: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> None:
    batch, queries, heads, _ = query.shape
    for name, x in (("lo", lo), ("hi", hi)):
        if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads) or x.shape[2] != queries:
            allowed = f"[{batch} or 1, {heads} or 1, {queries}]"
            raise ValueError(f"{name} has shape {list(x.shape)}; allowed is {allowed}, batch, query heads, queries")
        if x.dtype != torch.int32:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed is torch.int32")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device}; allowed is {query.device}, where query is")


def _triton_limits(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Say what of a call the Triton kernels do not cover; None if nothing."""
    if query.dtype == torch.float64:
        return "query of dtype torch.float64; allowed are torch.float16, torch.bfloat16 and torch.float32"
    for name, x in (("query", query), ("value", value)):
        if x.shape[3] > _TRITON_MAX_DIM:
            return f"{name} with head dimension {x.shape[3]}; allowed are 1 to {_TRITON_MAX_DIM}"
    return None


def _differentiable(
    name: str,
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Register a forward and its backward as torch operators, so that autograd and torch.compile see two nodes.

    Bounds that are None follow from `causal` and `window`, which are not read where the bounds are given.
    """

    @torch.library.custom_op(f"longmix::attention_{name}", mutates_args=())
    def run(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lo: torch.Tensor | None,
        hi: torch.Tensor | None,
        scale: float,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if lo is not None and hi is not None and lo.device.type == "cpu":
            check_row_bounds(lo, hi, key.shape[1])
        with torch.autocast(query.device.type, enabled=False):
            return forward(query, key, value, lo, hi, scale, causal, window)

    @torch.library.custom_op(f"longmix::attention_{name}_backward", mutates_args=())
    def run_backward(
        grad_output: torch.Tensor,
        grad_logsumexp: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lo: torch.Tensor | None,
        hi: torch.Tensor | None,
        output: torch.Tensor,
        logsumexp: torch.Tensor,
        scale: float,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = query, key, value, lo, hi, output, logsumexp
        with torch.autocast(query.device.type, enabled=False):
            return backward(grad_output, grad_logsumexp, *inputs, scale, causal, window)

    @run.register_fake
    def _(query, key, value, lo, hi, scale, causal=True, window=None):
        exact = torch.promote_types(query.dtype, torch.float32)
        output = query.new_empty(*query.shape[:3], value.shape[3])
        return output, query.new_empty(query.shape[:3], dtype=exact)

    @run_backward.register_fake
    def _(grad_output, grad_logsumexp, query, key, value, lo, hi, output, logsumexp, scale, causal=True, window=None):
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)

    def save(ctx, inputs, output):
        *tensors, ctx.scale, ctx.causal, ctx.window = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_output, grad_logsumexp):
        if grad_output is None:
            grad_output = torch.zeros_like(ctx.saved_tensors[5])
        grads = run_backward(grad_output, grad_logsumexp, *ctx.saved_tensors, ctx.scale, ctx.causal, ctx.window)
        return *grads, None, None, None, None, None

    run.register_autograd(differentiate, setup_context=save)
    return run


def _blocked_forward(query, key, value, lo, hi, scale, causal, window):
    return blocked_forward(query, key, value, lo, hi, scale)


def _blocked_backward(grad_output, grad_logsumexp, query, key, value, lo, hi, output, logsumexp, scale, causal, window):
    return blocked_backward(grad_output, grad_logsumexp, query, key, value, lo, hi, output, logsumexp, scale)


def _triton_forward(*arguments):
    from longmix_kernels.attention.triton_forward import triton_forward

    return triton_forward(*arguments)


def _triton_backward(*arguments):
    from longmix_kernels.attention.triton_backward import triton_backward

    return triton_backward(*arguments)


_blocked = _differentiable("blocked", _blocked_forward, _blocked_backward)
_triton = _differentiable("triton", _triton_forward, _triton_backward)
