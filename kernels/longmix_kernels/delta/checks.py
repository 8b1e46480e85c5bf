"""What the arguments of the delta rule must be; every error names the argument and what is allowed."""

import math

import torch

from longmix_kernels.runtime import DTYPES, check_chunks, check_device

TRITON_MAX_DIM = 256
"""Largest head dimension that the Triton kernels cover."""


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low_rank_read: torch.Tensor | None,
    low_rank_write: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    chunk_size: int | None,
) -> None:
    """Check shapes, dtypes and devices of what comes per token."""
    named: dict[str, torch.Tensor | None] = {"query": query, "key": key, "value": value}
    named |= {"low_rank_read": low_rank_read, "low_rank_write": low_rank_write}
    for name, x in named.items():
        if x is None:
            continue
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; allowed is [B, T, H, D] with every size at least 1")
        if x.dtype not in DTYPES or x.dtype != query.dtype:
            allowed = query.dtype if query.dtype in DTYPES else ", ".join(map(str, DTYPES))
            raise ValueError(f"{name} has dtype {x.dtype}; allowed is {allowed}")
        wanted = [*query.shape[:3], x.shape[3] if name == "value" else query.shape[3]]
        if list(x.shape) != wanted:
            raise ValueError(f"{name} has shape {list(x.shape)}; allowed is {wanted}, as query")
        check_device(name, x, query)
    if (low_rank_read is None) != (low_rank_write is None):
        missing = "low_rank_read" if low_rank_read is None else "low_rank_write"
        raise ValueError(f"{missing} is missing; low_rank_read and low_rank_write come together")
    check_chunks(query, document_ids, chunk_size)


def check_decay(query: torch.Tensor, log_decay: torch.Tensor) -> None:
    """Check the decay, which stays in float32 whatever the dtype of the queries."""
    exact = torch.promote_types(query.dtype, torch.float32)
    if log_decay.shape not in (query.shape, query.shape[:3]):
        allowed = f"{list(query.shape)} or {list(query.shape[:3])}"
        raise ValueError(f"log_decay has shape {list(log_decay.shape)}; allowed is {allowed}")
    if log_decay.dtype != exact:
        raise ValueError(
            f"log_decay has dtype {log_decay.dtype}; allowed is {exact}: it is never rounded to half precision"
        )
    check_device("log_decay", log_decay, query)


def check_state(query: torch.Tensor, value: torch.Tensor, state: torch.Tensor | None, argument: str) -> None:
    """Check a state that is given as `argument`."""
    if state is None:
        return
    exact = torch.promote_types(query.dtype, torch.float32)
    wanted = [query.shape[0], query.shape[2], query.shape[3], value.shape[3]]
    if list(state.shape) != wanted or state.dtype != exact:
        raise ValueError(f"{argument} is {state.dtype} {list(state.shape)}; allowed is {exact} {wanted}")
    check_device(argument, state, query)


def check_promise(min_log_decay: float | None) -> None:
    """Check what is promised of decays."""
    if min_log_decay is not None and not (math.isfinite(min_log_decay) and min_log_decay <= 0):
        raise ValueError(f"min_log_decay is {min_log_decay}; allowed is a finite number, at most 0, or None")
