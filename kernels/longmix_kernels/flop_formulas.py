"""Letting torch's `FlopCounterMode` count the engines: the products of their mathematics, not of how they are tiled.

A forward counts two operations for each multiply-add of a score, a value, an update or a reading of a state; a backward
counts twice its forward, and nothing that is computed again. So a count does not depend on backend or chunk size, and
is what the mixers' own `flops` say: exactly where positions decide what a token sees, and by the pairs that there are
where content does. Bounds are read for that, which waits for the device; fake tensors count as plain causal rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils.flop_counter import register_flop_formula


def register(operator: str, formula: Callable[..., int], before_inputs: int) -> None:
    """Let torch count an operator of `operators.differentiable` and its backward.

    Args:
        operator: name with namespace.
        formula: operations of a forward, from its inputs.
        before_inputs: how many gradients and results come before the inputs of the backward.
    """
    namespace, name = operator.split("::")
    operators = getattr(torch.ops, namespace)

    def forward(*inputs: Any, out_val: Any = None) -> int:
        with unset_fake_temporarily():
            return formula(*inputs)

    def backward(*inputs: Any, out_val: Any = None) -> int:
        return 2 * forward(*inputs[before_inputs:])

    register_flop_formula(getattr(operators, name), get_raw=True)(forward)
    register_flop_formula(getattr(operators, f"{name}_backward"), get_raw=True)(backward)


def has_values(x: torch.Tensor) -> bool:
    """Say whether a tensor holds numbers, and not shapes alone."""
    return x.device.type != "meta" and not isinstance(x, FakeTensor)
