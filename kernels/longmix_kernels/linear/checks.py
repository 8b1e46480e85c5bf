"""What the arguments of scalar-gated linear attention must be; every error names the argument and what is allowed."""

import torch

from longmix_kernels.linear.state import LinearState
from longmix_kernels.runtime import DTYPES, check_chunks, check_device

TRITON_MAX_DIM = 512
"""Largest head dimension that the Triton kernels cover."""


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_ids: torch.Tensor | None,
    chunk_size: int | None,
) -> None:
    """Check shapes, dtypes and devices of what comes per token."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; allowed is [B, T, H, D] with every size at least 1")
        if x.dtype not in DTYPES or x.dtype != query.dtype:
            allowed = query.dtype if query.dtype in DTYPES else ", ".join(map(str, DTYPES))
            raise ValueError(f"{name} has dtype {x.dtype}; allowed is {allowed}")
        check_device(name, x, query)
    if key.shape != query.shape:
        raise ValueError(f"key has shape {list(key.shape)}; allowed is {list(query.shape)}, as query")
    if value.shape[:3] != query.shape[:3]:
        raise ValueError(f"value has shape {list(value.shape)}; allowed is {[*query.shape[:3]]} and Dv, as query")
    check_chunks(query, document_ids, chunk_size)


def check_gates(query: torch.Tensor, log_decay: torch.Tensor, log_input: torch.Tensor | None) -> None:
    """Check the gates, which stay in float32 whatever the dtype of the queries."""
    exact = torch.promote_types(query.dtype, torch.float32)
    for name, x in (("log_decay", log_decay), ("log_input", log_input)):
        if x is None:
            continue
        if x.shape != query.shape[:3]:
            allowed = f"{list(query.shape[:3])}" + (f" or [{query.shape[2]}]" if name == "log_decay" else "")
            raise ValueError(f"{name} has shape {list(x.shape)}; allowed is {allowed}")
        if x.dtype != exact:
            raise ValueError(
                f"{name} has dtype {x.dtype}; allowed is {exact}: gates are never rounded to half precision"
            )
        check_device(name, x, query)


def check_state(
    query: torch.Tensor, value: torch.Tensor, state: LinearState | None, normalize: bool, argument: str
) -> None:
    """Check a state that is given as `argument`."""
    if state is None:
        return
    batch, _, heads, dim = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    shapes = {
        "memory": (batch, heads, dim, value.shape[-1]),
        "normalizer": (batch, heads, dim),
        "log_scale": (batch, heads),
    }
    for name, shape in shapes.items():
        x, wanted = getattr(state, name), normalize or name == "memory"
        if (x is not None) != wanted:
            raise ValueError(f"{argument}.{name} is {'missing' if wanted else 'given'} with normalize={normalize}")
        if x is not None and (tuple(x.shape) != shape or x.dtype != exact):
            raise ValueError(f"{argument}.{name} is {x.dtype} {list(x.shape)}; allowed is {exact} {list(shape)}")
        if x is not None:
            check_device(f"{argument}.{name}", x, query)
