"""Where a non-finite number first appeared: a second pass with every module watched."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from longmix.data.loaders import Batch
from longmix.mixers.base import MixerOutput


def first_nonfinite(
    model: nn.Module, batch: Batch, precision: Callable[[], AbstractContextManager] = nullcontext
) -> str | None:
    """Repeat one forward and backward pass and name the first module or gradient that is not finite.

    The forward pass is judged in the order of computation, weights before outputs; if all of it is finite, the backward
    pass is judged in its own order, from the loss to the embedding. Gradients are cleared afterwards.

    Returns:
        A phrase such as "the output of blocks.3.mixer in the forward pass", or None if everything was finite.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the weight {name} itself"
    found: list[str] = []
    with _watched(model, found), precision():
        output = model(batch["tokens"], batch["targets"], document_ids=batch["document_ids"])
        if not found and not _finite(output.token_losses):
            found.append("the loss in the forward pass")
        if not found:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the embedding has no input
                output.token_losses.mean().backward()
    model.zero_grad(set_to_none=True)
    return found[0] if found else None


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if any(True for _ in module.children()):
            continue  # a leaf names the place more closely

        def after_forward(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            if not _finite(output):
                found.append(f"the output of {name} in the forward pass")

        def after_backward(_module: nn.Module, gradients: Any, _outputs: Any, name: str = name) -> None:
            if not all(_finite(gradient) for gradient in gradients):
                found.append(f"the gradient through {name} in the backward pass")

        handles.append(module.register_forward_hook(after_forward))
        handles.append(module.register_full_backward_hook(after_backward))
    for name, parameter in model.named_parameters():

        def after_gradient(gradient: Tensor, name: str = name) -> None:
            if not _finite(gradient):
                found.append(f"the gradient of {name} in the backward pass")

        handles.append(parameter.register_hook(after_gradient))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    if isinstance(value, MixerOutput):
        value = value.y
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())
