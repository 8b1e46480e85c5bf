"""Linear attention with a scalar decay and input gate per head: mLSTM, retention, Lightning Attention, simple GLA."""

from longmix_kernels.linear.op import linear_attention
from longmix_kernels.linear.state import LinearState

__all__ = ["LinearState", "linear_attention"]
