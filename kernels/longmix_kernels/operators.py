"""Registering an engine's forward and backward as torch operators, so that autograd and torch.compile see two nodes."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longmix_kernels import flop_formulas

Function = Callable[..., tuple[torch.Tensor, ...]]


def deferred(path: str) -> Function:
    """Return a function by its dotted path, whose module is imported when it is called: importing Triton takes long."""
    module, _, name = path.rpartition(".")

    def call(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return getattr(importlib.import_module(module), name)(*arguments)

    return call


def differentiable(
    operator: str,
    inputs: str,
    *,
    forward: Function,
    backward: Function,
    empty: Function,
    results: int,
    incoming: int,
    saved: Sequence[int],
    outgoing: int,
    flops: Callable[..., int],
) -> Function:
    """Register `operator` and `operator`_backward, both with autocast off, and return the first.

    Args:
        operator: name with namespace.
        inputs: schema of the inputs; the first is the tensor whose device counts.
        forward: computes the results from the inputs.
        backward: computes the gradients of the first `outgoing` inputs, in their shapes and dtypes, an empty tensor for
            an input that is None. It gets the gradients of the first `incoming` results, None for zero but in the first
            place, then the saved results, then the inputs.
        empty: makes the results without computing them.
        results: how many tensors the forward returns.
        incoming: how many results have a gradient; they come first.
        saved: which results the backward gets.
        outgoing: how many inputs have a gradient; they come first and are tensors.
        flops: what `FlopCounterMode` counts for a forward, from the inputs; see `flop_formulas`.
    """

    def run(first: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        with torch.autocast(first.device.type, enabled=False):
            return forward(first, *rest)

    def run_backward(grad: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return backward(grad, *rest)

    grads = ", ".join(f"Tensor{'?' if index else ''} grad_{index}" for index in range(incoming))
    kept = "".join(f", Tensor saved_{index}" for index in saved)
    schema = f"({inputs}) -> ({', '.join(['Tensor'] * results)})"
    node = torch.library.custom_op(operator, run, mutates_args=(), schema=schema)
    schema = f"({grads}{kept}, {inputs}) -> ({', '.join(['Tensor'] * outgoing)})"
    backward_node = torch.library.custom_op(f"{operator}_backward", run_backward, mutates_args=(), schema=schema)
    node.register_fake(empty)

    @backward_node.register_fake
    def _(grad, *rest):
        given = rest[incoming - 1 + len(saved) :][:outgoing]
        return tuple(grad.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)

    def save(ctx, inputs, output):
        ctx.places = [index for index, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.save_for_backward(*(output[index] for index in saved), *(inputs[index] for index in ctx.places))
        ctx.set_materialize_grads(False)

    def differentiate(ctx, *grads):
        kept = ctx.saved_tensors  # activation checkpointing hands these out once
        results, tensors = kept[: len(saved)], kept[len(saved) :]
        inputs = list(ctx.others)
        for index, x in zip(ctx.places, tensors, strict=True):
            inputs[index] = x
        first = torch.zeros_like(empty(*inputs)[0]) if grads[0] is None else grads[0]
        found = backward_node(first, *grads[1:incoming], *results, *inputs)
        given = [None if x is None else grad for grad, x in zip(found, inputs[:outgoing], strict=True)]
        return *given, *(None for _ in inputs[outgoing:])

    node.register_autograd(differentiate, setup_context=save)
    flop_formulas.register(operator, flops, incoming + len(saved))
    return node
