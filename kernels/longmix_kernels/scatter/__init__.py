"""Scatterbrain: softmax attention, exact for the latest blocks and through positive features for all keys before."""

from longmix_kernels.scatter.bounds import exact_bounds
from longmix_kernels.scatter.op import ScatterResult, scatter_attention
from longmix_kernels.scatter.state import FeatureState, absorb, empty_state

__all__ = ["FeatureState", "ScatterResult", "absorb", "empty_state", "exact_bounds", "scatter_attention"]
