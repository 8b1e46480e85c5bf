"""Register attention with few queries and no gradient as a torch operator of its own.

`split_launch` says which calls that are, and how their keys are divided.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import register_flop_formula

from longmix_kernels.attention.cost import call_flops
from longmix_kernels.attention.inputs import Inputs
from longmix_kernels.launch import with_room
from longmix_kernels.operators import deferred

Results = tuple[torch.Tensor, torch.Tensor]


def register(
    empty: Callable[[Inputs], tuple[torch.Tensor, ...]], check: Callable[[Inputs], None]
) -> Callable[[Inputs], Results]:
    """Register the operator `longmix::attention_split`, and return a function that calls it.

    Args:
        empty: makes the results without computing them.
        check: called before the computation, when tensors have values.

    Returns:
        A function from the inputs of a call to its output [B, Tq, Hq, Dv] and logsumexp [B, Tq, Hq].
    """
    forward = with_room(deferred("longmix_kernels.attention.triton_split.triton_split"))

    def run(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        inputs = Inputs.of((query, *rest))
        check(inputs)
        with torch.autocast(query.device.type, enabled=False):
            return forward(inputs)

    schema = f"({Inputs.schema()}) -> (Tensor, Tensor)"
    node = torch.library.custom_op("longmix::attention_split", run, mutates_args=(), schema=schema)
    node.register_fake(lambda *flat: empty(Inputs.of(flat)))

    @register_flop_formula(torch.ops.longmix.attention_split, get_raw=True)
    def _(*flat: Any, out_val: Any = None) -> int:
        with unset_fake_temporarily():
            return call_flops(Inputs.of(flat))

    return lambda inputs: node(*inputs.flat())
