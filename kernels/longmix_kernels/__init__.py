"""Four engines of sequence mixing: attention, linear, delta and scatter. They import torch and triton, nothing else.

    attention           softmax attention in which every query row sees a contiguous run of key rows
    linear_attention    linear attention with a scalar decay and input gate per head and token
    delta_rule          linear attention whose transitions are a diagonal plus a matrix of rank one
    scatter_attention   softmax attention, exact for the latest blocks and through features for all before

Each takes `query`, `key` and `value` [B, T, H, D], and by name its own arguments, `initial_state` (except attention),
`document_ids`, `scale` (D ** -0.5 by default) and `backend`. Helpers of one engine are in that engine's package.
"""

from longmix_kernels.attention import attention
from longmix_kernels.delta import delta_rule
from longmix_kernels.linear import linear_attention
from longmix_kernels.scatter import scatter_attention

__all__ = ["attention", "delta_rule", "linear_attention", "scatter_attention"]
