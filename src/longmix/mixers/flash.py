"""Exact causal attention, computed by the fastest exact provider there is (Dao 2023, arXiv 2307.08691)."""

from torch import Tensor

from longmix.mixers.softmax import SoftmaxAttention
from longmix_kernels.attention import attention, sdpa


class Flash(SoftmaxAttention):
    """Every token sees itself and all earlier tokens of its document."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor | None) -> Tensor:
        """A plain causal call goes to the provider; documents and later chunks go to our engine, which skips tiles."""
        if document_ids is None and query.shape[1] in (1, key.shape[1]):
            return sdpa(query, key, value)
        return attention(query, key, value, document_ids=document_ids)

    def visible_pairs(self, length: int) -> int:
        """The causal triangle with its diagonal."""
        return length * (length + 1) // 2
