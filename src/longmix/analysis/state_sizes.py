"""How large what a mixer remembers is: in bytes, and a recurrent state in magnitude."""

import math
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

BOOKKEEPING = frozenset({"document_ids", "recent_ids", "last_id", "next_position", "count"})
"""Fields of states that say where a row is and what is valid, of a few bytes a row or token; `state_bytes` of a mixer
counts what it remembers of the tokens and not these."""


def held_bytes(state: Any) -> tuple[int, int]:
    """Bytes of the tensors of a state over all rows: what it remembers, and its `BOOKKEEPING`."""
    if isinstance(state, Tensor):
        return state.nbytes, 0
    if is_dataclass(state) and not isinstance(state, type):
        named = {field.name: getattr(state, field.name) for field in fields(state)}
    elif isinstance(state, tuple) and hasattr(state, "_asdict"):
        named = state._asdict()
    elif isinstance(state, dict):
        named = {str(name): part for name, part in state.items()}
    elif isinstance(state, list | tuple):
        named = {str(place): part for place, part in enumerate(state)}
    else:
        return 0, 0
    content = kept = 0
    for name, part in named.items():
        of_content, of_bookkeeping = held_bytes(part)
        if name in BOOKKEEPING:
            of_content, of_bookkeeping = 0, of_content + of_bookkeeping
        content, kept = content + of_content, kept + of_bookkeeping
    return content, kept


def log_root_mean_square(carried: Any) -> Tensor:
    """Natural logarithm of the root mean square of each head's state, float64 [B, H], minus infinity for zeros.

    Args:
        carried: a recurrent engine's state: a tensor [B, H, K, V], or several of which `memory` is that and stands for
            exp(`log_scale`) times as much.
    """
    memory = carried if isinstance(carried, Tensor) else carried.memory
    # Divided by the largest entry before squaring, since a state that grows may overflow.
    largest = memory.detach().double().abs().amax((-2, -1))
    safe = largest.masked_fill(largest == 0, 1.0)
    size = largest.log() + 0.5 * (memory.detach().double() / safe[..., None, None]).square().mean((-2, -1)).log()
    size = size.masked_fill(largest == 0, -math.inf)
    log_scale = None if isinstance(carried, Tensor) else carried.log_scale
    return size if log_scale is None else size + log_scale.detach().to(torch.float64)
