"""What the implementations of linear attention get."""

from dataclasses import dataclass

import torch

from longmix_kernels import operators


@dataclass(frozen=True)
class Inputs(operators.Inputs):
    """One call, with the states taken apart.

    Attributes:
        query, key: [B, T, H, Dk].
        value: [B, T, H, Dv].
        log_decay: [B, T, H], float32 at least, as all that follow.
        log_input: [B, T, H], or None for 0.
        memory: [B, H, Dk, Dv], before each document, or None for zero.
        normalizer: [B, H, Dk], there with `memory` and `normalize`.
        log_scale: [B, H], likewise.
        carried_memory, carried_normalizer, carried_log_scale: the same before the first token; None for what each
            document begins from.
        document_ids: int32 or int64 [B, T], or None.
        normalize: whether the output is divided by the normaliser.
        scale: factor on the queries.
        chunk_size: tokens between two states; None for the implementation's choice.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    log_decay: torch.Tensor
    log_input: torch.Tensor | None
    memory: torch.Tensor | None
    normalizer: torch.Tensor | None
    log_scale: torch.Tensor | None
    carried_memory: torch.Tensor | None
    carried_normalizer: torch.Tensor | None
    carried_log_scale: torch.Tensor | None
    document_ids: torch.Tensor | None
    normalize: bool
    scale: float
    chunk_size: int | None
