"""Calls of modules without what `nn.Module.__call__` adds to them, where nobody could tell the difference.

For a single token a module's call takes about as long as what it computes. Without hooks, gradients and a compiler it
does nothing but to run `forward`, and a linear layer's `forward` nothing but to look up its weights.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from longmix.mixers.parts.rms_norm import RMSNorm

_MODULE_CALL = nn.Module.__call__


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module now is one of its class's `forward`: gradients are off and nothing hangs on it.

    What may hang on it: hooks of its own or of all modules, a compiler, and a `forward` or a `__call__` of its own.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _has_any_global_hook():
        return False
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    return "forward" not in own and module._compiled_call_impl is None and type(module).__call__ is _MODULE_CALL


def call_of(module: nn.Module) -> Callable[..., Any]:
    """What to call in the module's place, with the same arguments: its `forward` where it is bare, else itself."""
    return module.forward if is_bare(module) else module


def applied(module: nn.Module, x: Tensor) -> Tensor:
    """The output of a module of one input, `module(x)`."""
    if not is_bare(module):
        output: Tensor = module(x)
        return output
    kind, parameters = type(module), module._parameters
    if kind is nn.Linear:
        return F.linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
    if kind in (RMSNorm, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, parameters["weight"], module.eps)  # type: ignore[arg-type]
    result: Tensor = x if kind is nn.Identity else module.forward(x)
    return result
