"""The delta rule with diagonal-plus-low-rank transitions: RWKV-7, (gated) DeltaNet, KDA, GLA."""

from longmix_kernels.delta.op import delta_rule

__all__ = ["delta_rule"]
