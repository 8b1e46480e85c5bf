"""The public functions for decoding: attention of a few new tokens to a cache, and how much attention keys got."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from longmix_kernels.attention import decode_launch
from longmix_kernels.attention.cost import decode_flops, decode_weights_flops
from longmix_kernels.attention.decode_inputs import DecodeInputs
from longmix_kernels.attention.decode_reference import reference_decode
from longmix_kernels.attention.decode_torch import torch_decode
from longmix_kernels.attention.segments import Segment
from longmix_kernels.launch import with_room
from longmix_kernels.operators import computed, deferred
from longmix_kernels.runtime import DTYPES, check_device, check_triton_device, on_gpu

BACKENDS = ("reference", "torch", "triton")
"""The implementations `decode_attention` offers."""

MOST_QUERIES = 16
"""The most new tokens of a call; more are a piece of a prompt, which `attention` reads."""


def decode_attention(
    query: torch.Tensor,
    segments: Sequence[Segment],
    *,
    scale: float | None = None,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    return_logsumexp: bool = False,
    return_weights: bool = False,
    schedule: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor] | None]:
    """Compute softmax attention of a few new tokens to the segments of a cache, and to each other.

    Every query of a row sees what the segments let the row read; of `new` it sees its own token and those before. All
    is one softmax. There is no gradient.

    Args:
        query: [B, T, Hq, K], T from 1 to 16; float16, bfloat16, float32 or float64.
        segments: what is read of the cache; their Hkv divides Hq. May be empty with `new`.
        scale: the factor on the scores, K ** -0.5 by default.
        new: key [B, T, Hkv, K] and value [B, T, Hkv, V] of the new tokens, where no segment holds them yet.
        return_logsumexp: whether to return the logsumexp of each query's scores.
        return_weights: whether to return the weights.
        schedule: the lists of a `Schedule` for the Triton kernels, int32, where its owner rewrites them between the
            replays of a CUDA graph; None for lists of all slots. Other backends do not read it.
        backend: "reference" (the definition), "torch" (two products for each segment) or "triton" (kernels for a CUDA
            device; no float64, head dimensions up to 256, and codes of keys by channel and of values by token). None
            picks "triton" where it covers the call on a CUDA device, and "torch" elsewhere.

    Returns:
        The output [B, T, Hq, V] in the dtype of `query`; the logsumexp [B, T, Hq], or None; the weights of each segment
        [B, Hkv, G, T, S], then of the new tokens [B, Hkv, G, T, T], which together sum to 1 over all keys of a query,
        or None. With an `index`, S is that of the index, in its order. Logsumexp and weights are float64 for float64
        inputs and float32 otherwise. A query that sees nothing has output 0 and logsumexp -inf.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
    """
    check_decode(query, segments, new)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if backend == "torch" or (backend is None and not on_gpu(query)):
        return torch_decode(query, segments, new, scale, return_logsumexp, return_weights)
    new_key, new_value = (None, None) if new is None else new
    inputs = DecodeInputs(query, new_key, new_value, tuple(segments), schedule, scale)
    backend = _backend_of(backend, inputs)
    if backend == "reference":
        output, logsumexp, weights = reference_decode(query, segments, new, scale)
        weights = [_in_order(part, segment) for part, segment in zip(weights, segments, strict=False)] + weights[
            len(segments) :
        ]
        return output, logsumexp if return_logsumexp else None, weights if return_weights else None
    if backend == "torch":
        return torch_decode(query, segments, new, scale, return_logsumexp, return_weights)
    output, logsumexp = _TRITON(inputs)
    if not return_weights:
        return output, logsumexp if return_logsumexp else None, None
    inputs = replace(inputs, logsumexp=logsumexp)
    weights = [*(_TRITON_WEIGHTS(inputs) if segments else ()), *_new_weights(inputs)]
    return output, logsumexp if return_logsumexp else None, weights


def _backend_of(backend: str | None, inputs: DecodeInputs) -> str:
    """Return the name of the implementation that runs a call.

    Raises:
        ValueError: `backend` is not offered, or is "triton" and cannot run the call.
    """
    if backend is not None and backend not in BACKENDS:
        allowed = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend={backend!r} is not available here; allowed are None, {allowed}")
    if backend in (None, "triton"):
        reason = decode_launch.uncovered(inputs)
        if reason is not None and backend is None:
            return "torch"
        if reason is not None:
            raise ValueError(f"backend='triton' got {reason}")
        check_triton_device(inputs.query.device)
    return backend or "triton"


def _empty(inputs: DecodeInputs) -> tuple[torch.Tensor, ...]:
    query, (_, width) = inputs.query, decode_launch.sizes_of(inputs)
    return query.new_empty(*query.shape[:3], width), query.new_empty(query.shape[:3], dtype=torch.float32)


def _empty_weights(inputs: DecodeInputs) -> tuple[torch.Tensor, ...]:
    batch, length, heads, _ = inputs.query.shape
    found = []
    for segment in inputs.segments:
        slots = segment.slots if segment.index is None else segment.index.shape[2]
        shape = batch, segment.key.shape[1], heads // segment.key.shape[1], length, slots
        found.append(inputs.query.new_empty(shape, dtype=torch.float32))
    return (*found,)


def _new_weights(inputs: DecodeInputs) -> list[torch.Tensor]:
    """Return the weights float32 [B, Hkv, G, T, T] of the new tokens in a list, which is empty if there are none."""
    if inputs.new_key is None or inputs.logsumexp is None:
        return []
    key_heads, length = inputs.new_key.shape[2], inputs.query.shape[1]
    query, logsumexp = (x.float().unflatten(2, (key_heads, -1)) for x in (inputs.query, inputs.logsumexp))
    scores = inputs.scale * torch.einsum("bthgd,bshd->bhgts", query, inputs.new_key.float())
    weights = (scores - logsumexp.permute(0, 2, 3, 1).unsqueeze(-1)).exp()
    later = torch.ones(length, length, dtype=torch.bool, device=weights.device).triu(1)
    return [weights.masked_fill(later, 0.0)]


_TRITON = computed(
    "longmix::attention_decode",
    DecodeInputs,
    forward=with_room(deferred("longmix_kernels.attention.triton_decode.triton_decode")),
    empty=_empty,
    results=2,
    flops=decode_flops,
)
_TRITON_WEIGHTS = computed(
    "longmix::attention_decode_weights",
    DecodeInputs,
    forward=with_room(deferred("longmix_kernels.attention.triton_decode.triton_decode_weights")),
    empty=_empty_weights,
    results=None,
    flops=decode_weights_flops,
)


def check_decode(
    query: torch.Tensor, segments: Sequence[Segment], new: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    """Check the arguments of `decode_attention`; values of counts and indices are not read.

    Raises:
        ValueError: naming the argument, what it got and what is allowed.
    """
    if query.dim() != 4 or not 1 <= query.shape[1] <= MOST_QUERIES or query.dtype not in DTYPES:
        raise ValueError(
            f"query is {query.dtype} {list(query.shape)}; allowed is a floating-point [B, T, Hq, K] with T from 1 to "
            f"{MOST_QUERIES}"
        )
    if not segments and new is None:
        raise ValueError("segments is empty; there is something to read only with `new`")
    batch, length, heads, width = query.shape
    key_heads = segments[0].key.shape[1] if segments else new[0].shape[2]  # type: ignore[index]
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"there are {key_heads} key heads; allowed are the divisors of the {heads} heads of query")
    for number, segment in enumerate(segments):
        key = segment.key
        shape, value_shape = key.shape, segment.value.shape
        name = f"segments[{number}]"
        if len(shape) != 4 or value_shape[:3] != shape[:3] or shape[1] != key_heads:
            got = f"key {list(shape)} and value {list(value_shape)}"
            raise ValueError(f"{name} has {got}; allowed are [R, {key_heads}, S, .] with one R and S")
        if shape[0] < 1 or batch % shape[0]:
            raise ValueError(f"{name} has {shape[0]} rows; allowed are the divisors of the {batch} rows of query")
        wide = shape[3] if segment.key_codes is None else shape[3] * 8 // segment.key_codes.bits
        if wide != width:
            raise ValueError(f"{name} has keys of {wide} channels; allowed are {width}, as query")
        if segment.index is not None and not (segment.count is None and segment.first is None):
            raise ValueError(f"{name} has an index, which excludes count and first")
        check_device(f"{name}.key", key, query)
    if new is not None and (new[0].shape != (batch, length, key_heads, width) or new[1].shape[:3] != new[0].shape[:3]):
        got = f"key {list(new[0].shape)} and value {list(new[1].shape)}"
        raise ValueError(f"new has {got}; allowed are [{batch}, {length}, {key_heads}, {width}] and as many values")


def _in_order(weights: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Return weights [B, Hkv, G, T, S] of the slots that an index names, in its order; 0 where it names none."""
    if segment.index is None:
        return weights
    at = segment.index.clamp(min=0).long()[:, :, None, None]
    found = weights.gather(-1, at.expand(*weights.shape[:4], -1))
    return found.masked_fill((segment.index < 0)[:, :, None, None], 0.0)


def column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    logsumexp: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    size: int = 1024,
) -> torch.Tensor:
    """Sum the attention weights that each key got, over queries and over the query heads that share a key head.

    Args:
        query: [B, T, Hq, K].
        key: [B, Hkv, S, K], head-major, in the order of the tokens.
        logsumexp: [B, T, Hq], as `attention` returns it for these queries.
        rows: int64 [B or 1, T], which of the S tokens each query is: it sees keys up to its own. None for the last T.
        first: integer [B or 1] or [B or 1, T], the first key that a row, or a query, sees; None for 0.
        scale: the factor on the scores, K ** -0.5 by default.
        size: queries and keys that are computed at once.

    Returns:
        [B, Hkv, S], float64 for float64 inputs and float32 otherwise. It takes one product of queries and keys and no
        memory beyond size * size scores of each head.
    """
    batch, length, _, width = query.shape
    key_heads, slots = key.shape[1:3]
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = width**-0.5 if scale is None else scale
    if rows is None:
        rows = torch.arange(slots - length, slots, device=query.device)[None]
    if first is not None and first.dim() == 1:
        first = first[:, None].expand(-1, length)
    mass = torch.zeros(batch, key_heads, slots, dtype=exact, device=query.device)
    for begin in range(0, length, size):
        some = slice(begin, begin + size)
        group = query[:, some].to(exact).transpose(1, 2).unflatten(1, (key_heads, -1))  # [B, Hkv, G, t, K]
        norm = logsumexp[:, some].to(exact).transpose(1, 2).unflatten(1, (key_heads, -1)).unsqueeze(-1)
        for start in range(0, slots, size):
            keys = key[:, :, start : start + size].to(exact)
            slot = torch.arange(start, start + keys.shape[2], device=query.device)
            hidden = slot > rows[:, some, None]
            if first is not None:
                hidden = hidden | (slot < first[:, some, None])
            scores = torch.matmul(scale * group.flatten(2, 3), keys.transpose(-1, -2)).unflatten(2, group.shape[2:4])
            weights = (scores - norm).masked_fill(hidden[:, None, None], -torch.inf).exp()
            mass[:, :, start : start + size] += weights.sum((2, 3))
    return mass
