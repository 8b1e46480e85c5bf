"""A stand-in on the CPU for torch's `varlen_attn`, with its arguments, sequence by sequence."""

import torch
from torch import Tensor
from torch.nn import functional as F


class VarlenStandIn:
    """Records its calls. Sequences are rows [starts[i], starts[i + 1]) of all tensors; some have no tokens."""

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        """Causal attention within each sequence, in float32."""
        shapes = [tuple(x.shape) for x in (query, key, value)]
        lengths = {"starts": cu_seq_q.clone(), "same_starts": cu_seq_q is cu_seq_k, "longest": (max_q, max_k)}
        self.calls.append({"shapes": shapes, **lengths, "window_size": window_size, "grouped": enable_gqa})
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        outputs = []
        for begin, end in zip(cu_seq_q.tolist()[:-1], cu_seq_q.tolist()[1:], strict=True):
            rows = (x[begin:end].float().transpose(0, 1) for x in (query, key, value))
            if end > begin:
                outputs.append(F.scaled_dot_product_attention(*rows, is_causal=True, scale=scale).transpose(0, 1))
        return torch.cat(outputs).to(query.dtype)
