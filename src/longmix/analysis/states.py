"""How large recurrent states are, and what gates do: how long heads remember, how much they write and remove."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from longmix.mixers.parts.looked_into import EngineCall

QUANTILES = {"half_life_low": 0.1, "half_life": 0.5, "half_life_high": 0.9}
"""Quantiles of the channels of a head."""

REMEMBERED = 1e12
"""A half-life above so many tokens counts as none, since the decay is 1 up to rounding."""


def log_root_mean_square(carried: Any) -> Tensor:
    """Natural logarithm of the root mean square of each head's state, float64 [B, H], minus infinity for zeros.

    Args:
        carried: a recurrent engine's state: a tensor [B, H, K, V], or several of which `memory` is that and stands for
            exp(`log_scale`) times as much.
    """
    memory = carried if isinstance(carried, Tensor) else carried.memory
    # Divided by the largest entry before squaring, since a state that grows may overflow.
    largest = memory.detach().double().abs().amax((-2, -1))
    safe = largest.masked_fill(largest == 0, 1.0)
    size = largest.log() + 0.5 * (memory.detach().double() / safe[..., None, None]).square().mean((-2, -1)).log()
    size = size.masked_fill(largest == 0, -math.inf)
    log_scale = None if isinstance(carried, Tensor) else carried.log_scale
    return size if log_scale is None else size + log_scale.detach().to(torch.float64)


def gate_statistics(calls: Iterable[EngineCall]) -> list[dict[str, float | None]]:
    """Statistics of each head of one mixer, means over the tokens of some calls.

    Returns:
        for each head `half_life`, in tokens, from the geometric mean of the decay: the median over channels, and with
        `_low` and `_high` 10 and 90 % of them; None where nothing decays. `input_gate`, the mean of what the `linear`
        engine multiplies writes by. `removal`, for the delta rule, the mean of minus `low_rank_read . low_rank_write`:
        the share of what the state holds at a key that one token takes out. Of the last two only what there is.
    """
    decays, others = [], dict[str, list[Tensor]]()
    for call in calls:
        decays.append(_per_head(call, call.options["log_decay"]))
        log_input = call.options.get("log_input")
        if log_input is not None:
            others.setdefault("input_gate", []).append(log_input.double().exp().mean((0, 1)))
        read, write = (call.options.get(f"low_rank_{name}") for name in ("read", "write"))
        if read is not None and write is not None:
            removal = -(read.double() * write.double()).sum(-1)
            others.setdefault("removal", []).append(removal.mean((0, 1)))
    mean_decay = torch.stack(decays).mean(0)
    half_lives = math.log(2) / -mean_decay
    means = {name: torch.stack(found).mean(0) for name, found in others.items()}
    heads: list[dict[str, float | None]] = []
    for head, of_channels in enumerate(half_lives):
        found = {name: torch.quantile(of_channels, share).item() for name, share in QUANTILES.items()}
        heads.append({name: life if life < REMEMBERED else None for name, life in found.items()})
        heads[-1].update({name: mean[head].item() for name, mean in means.items()})
    return heads


def _per_head(call: EngineCall, log_decay: Tensor) -> Tensor:
    """Mean log decay over tokens, float64 [H, channels], of a log decay [H], [B, T, H] or [B, T, H, K]."""
    exact = log_decay.detach().double()
    if exact.dim() == 1:
        exact = exact.expand(*call.query.shape[:2], -1)
    mean = exact.mean((0, 1))
    return mean.unsqueeze(-1) if mean.dim() == 1 else mean
