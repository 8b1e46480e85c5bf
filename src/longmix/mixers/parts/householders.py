"""The delta rule with several writes a token: products of Householder matrices as transitions (arXiv 2502.10297)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from longmix_kernels.delta import delta_rule


def delta_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    householders: int,
    log_decay: Tensor,
    low_rank_read: Tensor,
    low_rank_write: Tensor,
    document_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run `delta_rule` on a row for each write: the state decays before a token's first, and is read after its last.

    The engine sees n rows a token, so it launches no more kernels than for one, and takes n times their time and bytes.

    Args:
        query: [B, T, H, K].
        key, low_rank_read, low_rank_write: [B, T, n H, K], the heads of the first write first.
        value: [B, T, n H, V], likewise.
        householders: n.
        log_decay: [B, T, H], or [B, T, H, K].
        document_ids: [B, T], or None.
        options: others of `delta_rule`, `scale` among them.

    Returns:
        The output [B, T, H, V], and the state after the last token.
    """
    others = householders - 1

    def rows(x: Tensor) -> Tensor:
        return x.unflatten(2, (householders, -1)).flatten(1, 2)

    output, state = delta_rule(
        F.pad(query.unsqueeze(2), (0, 0, 0, 0, others, 0)).flatten(1, 2),
        rows(key),
        rows(value),
        log_decay=F.pad(log_decay.unsqueeze(2), (0, 0) * (log_decay.dim() - 2) + (0, others)).flatten(1, 2),
        low_rank_read=rows(low_rank_read),
        low_rank_write=rows(low_rank_write),
        document_ids=None if document_ids is None else document_ids.repeat_interleave(householders, 1),
        **options,
    )
    return output[:, others::householders], state
