"""Softmax attention in which every query row sees a contiguous run of key rows."""

from longmix_kernels.attention.bounds import key_bounds, positions_from_document_ids, row_bounds
from longmix_kernels.attention.op import attention
from longmix_kernels.attention.sdpa import sdpa, sdpa_supports

__all__ = ["attention", "key_bounds", "positions_from_document_ids", "row_bounds", "sdpa", "sdpa_supports"]
