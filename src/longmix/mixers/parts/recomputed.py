"""Computing cheap things again in the backward pass, where memory is what limits: on a GPU.

What lies between the projections of a mixer and its engine is many small steps, each of which keeps its inputs: several
times what the projections themselves are. Computed again, they cost a few passes over memory. Engines and what they
return are not: they are kept. A CPU has memory enough and no such speed, so there nothing is computed again; nor is it
in a compiled graph, for which the compiler decides.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longmix_kernels.runtime import on_gpu

Result = TypeVar("Result")

ENGINES = "longmix"
"""The namespace of the engines' operators."""

_left: ContextVar[bool] = ContextVar("left", default=False)


def recomputed(function: Callable[..., Result], x: Tensor, *others: Any) -> Result:
    """What `function` returns for these arguments, computed again in the backward pass but for its engines.

    Args:
        function: it draws no random numbers, waits for no other process, and gets every tensor with a gradient, other
            than weights, as an argument.
        x: decides by its device.
        others: tensors and anything else.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _left.get() or not on_gpu(x):
        return function(x, *others)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    result: Result = checkpoint(
        function, x, *others, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return result


def leaving_all(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function with nothing in it recomputed on its own, since all of it is."""

    def run(*arguments: Any) -> Result:
        token = _left.set(True)
        try:
            return function(*arguments)
        finally:
            _left.reset(token)

    return run


def _policy(_: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = operator.namespace == ENGINES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
