"""Selective activation checkpointing: a block keeps what is dear to compute, and computes the rest again.

Kept are the results of the engines and of attention, of products with weights, and the block's input. Norms, gates,
rotations, activations and casts are computed again in the backward pass: they take a pass over memory, and no product.
Two kinds of products are computed again as well. One has few input channels, as the low-rank ones of RWKV-7: it is
cheap for what it would keep. The other is the last of the block, whose result no backward pass reads.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longmix.mixers.parts.recomputed import ENGINES, leaving_all

Result = TypeVar("Result")

PRODUCTS = {"mm": (0, 1), "addmm": (1, 2)}
"""Operators that multiply by a weight, with the places of both factors."""

ATTENTION = ("_scaled_dot_product_", "_flash_attention_forward", "_efficient_attention_forward", "_varlen_attn")
"""Beginnings of the names of torch's attention operators."""

COMPILER = "torch._higher_order_ops.wrap"
ADVICE = "Detected that context_fn is passed to torch.utils.checkpoint under torch.compile."
"""The logger of torch that gives the advice once in each process, and how this begins."""

LEAST_SHARE = 0.5
"""A product is kept if it sums over at least this share of the model's width."""


def keeping_products(function: Callable[..., Result], width: int, closing: Tensor | None, *inputs: Any) -> Result:
    """What `function` returns for these inputs; its backward pass computes the cheap operators again.

    Args:
        function: a block.
        width: of the residual stream.
        closing: the weight of the product that ends the block, if there is one.
        inputs: of the function.
    """
    last = None if closing is None else (closing.shape[1], closing.shape[0])
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(policy, width, last))
    run = function if torch.compiler.is_compiling() else leaving_all(function)
    result: Result = checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)
    return result


def silence_advice() -> None:
    """Keep the compiler from advising against in-place operators in what is computed again; a block has none."""
    logging.getLogger(COMPILER).addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return ADVICE not in record.getMessage()


def policy(
    width: int, last: tuple[int, int] | None, _: Any, operator: Any, *arguments: Any, **options: Any
) -> CheckpointPolicy:
    """Whether an operator's result is kept, as torch's selective checkpointing asks.

    Args:
        width: of the residual stream.
        last: channels that go into the product that ends the block, and come out of it.
        operator: torch's.
        arguments, options: of the operator.
    """
    name = operator.name().partition("::")[2].partition(".")[0]
    if operator.namespace == ENGINES:
        kept = True
    elif name in PRODUCTS:
        channels = tuple(arguments[PRODUCTS[name][1]].shape)
        kept = channels[0] >= LEAST_SHARE * width and channels != last
    else:
        kept = name.startswith(ATTENTION) and not _draws(operator, arguments, options)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether attention drops weights at random.

    What draws is computed again like all else that does: left out, it would not move the generator on, and later
    operators of the block would draw other numbers than in the forward pass.
    """
    for place, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":
            given = arguments[place] if place < len(arguments) else options.get("dropout_p", argument.default_value)
            return bool(given)
    return False
