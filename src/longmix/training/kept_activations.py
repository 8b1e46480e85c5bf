"""Bytes that a token's forward pass keeps for the backward pass, from short passes on fake tensors without memory.

What is kept grows in proportion to the tokens, so the difference between two short windows tells it for any length.
"""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from longmix.model.backbone import LanguageModel

LENGTHS = (256, 512)
"""Tokens of the two passes; both are multiples of every chunk."""


def kept_per_token(model: LanguageModel, precision: str) -> int:
    """Bytes that the layers keep for each token on a CPU; 0 if the model cannot run on fake tensors.

    What a mixer keeps besides autograd's tensors, and what the loss keeps, is not counted.

    Args:
        model: on the meta device; it is not changed.
        precision: as in `TrainerSettings`.
    """
    weights = torch.bfloat16 if precision == "bf16-true" else None
    try:
        own = copy.deepcopy(model).train()
        with FakeTensorMode(allow_non_fake_inputs=True):
            own._apply(lambda x: torch.empty(x.shape, dtype=_dtype(x, weights), device="cpu"))
            short, long = (_kept(own, length, precision == "bf16-mixed") for length in LENGTHS)
    except Exception:  # a mixer of another package may need real numbers; then less is counted
        return 0
    return max(0, (long - short) // (LENGTHS[1] - LENGTHS[0]))


def _dtype(x: Tensor, weights: torch.dtype | None) -> torch.dtype:
    return weights if weights is not None and x.is_floating_point() else x.dtype


def _kept(model: LanguageModel, length: int, mixed: bool) -> int:
    """Bytes of all tensors that autograd keeps of a pass over one window; those that share memory count once."""
    known = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Any:
        kept.setdefault(x.untyped_storage()._cdata, x)
        return x

    tokens = torch.zeros(1, length, dtype=torch.int64)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False) if mixed else contextlib.nullcontext()
    with saved_tensors_hooks(keep, lambda x: x), autocast:
        output = model(tokens)
    total = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in known)
    del output
    return total
