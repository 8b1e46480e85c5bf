"""Weights of Phi-3's folders: query, key and value are one matrix, and so are the feed-forward's gate and input."""

import torch
from torch import Tensor

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Names of the fused modules, and of their parts in Llama's folders, in the order of the rows."""


def fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of Llama's folders by the names of Phi-3's."""
    found = {}
    parts = {part: (whole, own) for whole, own in FUSED.items() for part in own}
    for name, weight in weights.items():
        layer, module = _split(name)
        if module not in parts:
            found[name] = weight
            continue
        whole, own = parts[module]
        if module == own[0]:
            rows = [weights[f"{layer}.{part}.weight"] for part in own]
            found[f"{layer}.{whole}.weight"] = torch.cat(rows)
    return found


def divided(weights: dict[str, Tensor], heads: int, kv_heads: int) -> dict[str, Tensor]:
    """The weights of Phi-3's folders by the names of Llama's; what cannot be divided so stays as it is."""
    shares = {"self_attn.qkv_proj": (heads, kv_heads, kv_heads), "mlp.gate_up_proj": (1, 1)}
    found = {}
    for name, weight in weights.items():
        layer, module = _split(name)
        share = shares.get(module)
        if share is None or weight.ndim != 2 or len(weight) % sum(share):
            found[name] = weight
            continue
        unit = len(weight) // sum(share)
        rows = weight.split([unit * count for count in share])
        found |= {f"{layer}.{part}.weight": own for part, own in zip(FUSED[module], rows, strict=True)}
    return found


def _split(name: str) -> tuple[str, str]:
    """The layer and the module of a weight, as in "model.layers.0" and "mlp.down_proj"; "" for one outside layers."""
    if not name.startswith("model.layers.") or not name.endswith(".weight"):
        return "", ""
    *layer, module, leaf = name.removesuffix(".weight").rsplit(".", 2)
    return ".".join(layer), f"{module}.{leaf}"
