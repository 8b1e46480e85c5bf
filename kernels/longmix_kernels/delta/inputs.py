"""What the implementations of the delta rule get."""

from dataclasses import dataclass

import torch

from longmix_kernels import operators


@dataclass(frozen=True)
class Inputs(operators.Inputs):
    """One call.

    Attributes:
        query, key: [B, T, H, K].
        value: [B, T, H, V].
        log_decay: [B, T, H, K], or [B, T, H] where each head has one; float32 at least.
        low_rank_read, low_rank_write: [B, T, H, K], or both None for zeros.
        initial_state: [B, H, K, V], before each document, dtype of `log_decay`, or None for zeros.
        carried_state: the same before the first token, or None for the initial state.
        document_ids: int32 or int64 [B, T], or None.
        scale: factor on the queries.
        chunk_size: tokens between two states; None for the implementation's choice.
        min_log_decay: a promise that no decay is smaller, or None. Only the Triton kernels look at it.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    log_decay: torch.Tensor
    low_rank_read: torch.Tensor | None
    low_rank_write: torch.Tensor | None
    initial_state: torch.Tensor | None
    carried_state: torch.Tensor | None
    document_ids: torch.Tensor | None
    scale: float
    chunk_size: int | None
    min_log_decay: float | None = None
