"""Check the arguments of an attention call. Every error names the argument, what it got and what is allowed."""

import torch

from longmix_kernels.attention.pattern import BlockList
from longmix_kernels.runtime import DTYPES, check_device

TRITON_MAX_DIM = 256
"""The largest head dimension that the Triton kernels cover."""

PROBE_MAX_DIM = 128
"""The largest head dimension that the Triton kernels with a probe cover: they hold two sums where others hold one."""


def check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Check that query, key and value fit each other.

    Args:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D], same dtype and device; Hkv divides Hq.
        value: [B, Tk, Hkv, Dv], same dtype and device.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    for name, x, axes in (
        ("query", query, "[B, Tq, Hq, D]"),
        ("key", key, "[B, Tk, Hkv, D]"),
        ("value", value, "[B, Tk, Hkv, Dv]"),
    ):
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; allowed is {axes} with every size at least 1")
        if x.dtype not in DTYPES or x.dtype != query.dtype:
            allowed = query.dtype if query.dtype in DTYPES else ", ".join(map(str, DTYPES))
            raise ValueError(f"{name} has dtype {x.dtype}; allowed is {allowed}")
        check_device(name, x, query)
    batch, _, query_heads, head_dim = query.shape
    keys, key_heads = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"key has shape {list(key.shape)}; allowed is [{batch}, Tk, Hkv, {head_dim}] to match query")
    if tuple(value.shape[:3]) != (batch, keys, key_heads):
        raise ValueError(f"value has shape {list(value.shape)}; allowed is [{batch}, {keys}, {key_heads}, Dv] as key")
    if query_heads % key_heads:
        raise ValueError(f"key has {key_heads} heads; allowed are the divisors of the {query_heads} heads of query")


def check_probe(query: torch.Tensor, probe: torch.Tensor) -> None:
    """Check that a probe is as the query.

    Args:
        query: [B, Tq, Hq, D].
        probe: [B, Tq, Hq, D], same dtype and device.

    Raises:
        ValueError: its shape, dtype or device is another.
    """
    if probe.shape != query.shape or probe.dtype != query.dtype:
        allowed = f"{query.dtype} {list(query.shape)}"
        raise ValueError(f"probe is {probe.dtype} {list(probe.shape)}; allowed is {allowed} as query")
    check_device("probe", probe, query)


def check_document_ids(key: torch.Tensor, document_ids: torch.Tensor) -> None:
    """Check the shape and the device of document ids.

    Args:
        key: [B, Tk, Hkv, D].
        document_ids: [B, Tk], on the device of `key`.

    Raises:
        ValueError: they are something else.
    """
    if document_ids.shape != key.shape[:2]:
        raise ValueError(f"document_ids has shape {list(document_ids.shape)}; allowed is {list(key.shape[:2])}")
    check_device("document_ids", document_ids, key)


def check_rows(query: torch.Tensor, key: torch.Tensor, **rows: torch.Tensor | None) -> None:
    """Check tensors that hold one int32 per row and head, [B or 1, H or 1, T].

    Args:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D].
        rows: the tensors by name, or None. `key_rows` is about the rows of key, all others about those of query.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    for name, x in rows.items():
        if x is None:
            continue
        batch, length, heads = (key if name == "key_rows" else query).shape[:3]
        if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads) or x.shape[2] != length:
            allowed = f"[{batch} or 1, {heads} or 1, {length}]"
            raise ValueError(f"{name} has shape {list(x.shape)}; allowed is {allowed}, batch, heads, rows")
        if x.dtype != torch.int32:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed is torch.int32")
        check_device(name, x, query)


def check_permutation(name: str, rows: torch.Tensor | None) -> None:
    """Check that rows [B or 1, H or 1, T] hold each row number once for each head.

    This reads values; call it for CPU tensors only.

    Args:
        name: the argument's name, for the message.
        rows: the row numbers, or None.

    Raises:
        ValueError: a head's rows are no permutation.
    """
    if rows is None:
        return
    length = rows.shape[-1]
    inside = bool((rows >= 0).all() and (rows < length).all())
    seen = torch.zeros(rows.shape, dtype=torch.bool)
    if not inside or not seen.scatter_(-1, rows.long(), True).all():
        raise ValueError(f"{name} must hold every row number from 0 to {length - 1} once for each head")


def check_slopes(query: torch.Tensor, slopes: torch.Tensor, causal: bool) -> None:
    """Check ALiBi's slopes.

    Args:
        query: [B, Tq, Hq, D].
        slopes: float32 [Hq], on the device of `query`.
        causal: whether the call is causal, which it must be.

    Raises:
        ValueError: a shape, dtype or device is wrong, the slopes require a gradient, or the call is not causal.
    """
    if slopes.shape != query.shape[2:3] or slopes.dtype != torch.float32:
        got = f"{slopes.dtype} {list(slopes.shape)}"
        raise ValueError(f"alibi_slopes is {got}; allowed is torch.float32 [{query.shape[2]}], one per query head")
    if slopes.requires_grad:
        raise ValueError("alibi_slopes requires a gradient, which is not computed; learn slopes with bias_columns")
    if not causal:
        raise ValueError("alibi_slopes with causal=False would reward later keys; allowed is causal=True")
    check_device("alibi_slopes", slopes, query)


def check_blocks(query: torch.Tensor, key: torch.Tensor, blocks: BlockList) -> None:
    """Check that block lists have blocks for all keys, and that there are no more queries than keys.

    Args:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D].
        blocks: the lists.

    Raises:
        ValueError: the size of a block, or a list's length, dtype or device, is wrong; or Tq is larger than Tk.
    """
    wanted = -(-key.shape[1] // blocks.size) + 1
    if blocks.size < 16 or blocks.size & (blocks.size - 1):
        raise ValueError(f"blocks.size is {blocks.size}; allowed are powers of two from 16 on")
    for name, x in zip(BlockList._fields[1:], blocks[1:], strict=True):
        if x.dtype != torch.int32 or x.dim() != 1:
            raise ValueError(f"blocks.{name} is {x.dtype} {list(x.shape)}; allowed is torch.int32 with one axis")
        if name.endswith("offsets") and x.shape[0] != wanted:
            raise ValueError(f"blocks.{name} has {x.shape[0]} entries; allowed are {wanted} for {key.shape[1]} keys")
        check_device(f"blocks.{name}", x, query)
    if query.shape[1] > key.shape[1]:
        raise ValueError(f"blocks got {query.shape[1]} queries and {key.shape[1]} keys; allowed are at most as many")
