"""Finds where a non-finite number first appeared, by a second pass with every module watched."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longmix.batch import Batch
from longmix.checkpoints.tensors import Name, own_part, split
from longmix.distributed.agreement import Processes
from longmix.mixers.parts.base import MixerOutput
from longmix.model.backbone import ModelOutput


def first_nonfinite(
    model: nn.Module,
    batches: Sequence[Batch],
    run: Callable[[Batch], ModelOutput],
    processes: Processes | None = None,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> str | None:
    """Repeat forward and backward passes and name the first module or gradient that is not finite, and its process.

    The forward pass is judged in the order of computation, weights before outputs; if all of it is finite, the backward
    pass is judged in its own order, from the loss to the embedding. Gradients are cleared afterwards. Running the model
    may be work of all processes together, so all go through the same passes and stop after the same one.

    Args:
        model: whose modules are watched.
        batches: of this process, as many as every process has.
        run: the model's output for a batch.
        processes: all that train, which must all call this; None for one.
        precision: context of the forward pass.

    Returns:
        A phrase such as "the output of blocks.3.mixer in the forward pass, on process 1", or None if everything was
        finite.
    """
    processes = processes or Processes()
    finds = Finds(processes)
    for name, weight in model.named_parameters():
        finds.judge(weight, f"the weight {name} itself")
    model.zero_grad(set_to_none=True)
    where = finds.earliest()
    for batch in batches:
        where = where or _watched_pass(model, batch, run, finds, precision)
    model.zero_grad(set_to_none=True)
    return where


def nonfinite_tensor(state: dict[str, Any], processes: Processes | None = None) -> str | None:
    """Name a weight, buffer or optimizer value that is not finite, in what `named_state` gave; all must call it.

    Each process looks at its part of what is divided, once, and waits for its device once.

    Returns:
        A phrase such as "the weight head.weight" or "exp_avg of the weight head.weight in the optimizer on process 1".
    """
    named = {name: own_part(tensor) for name, tensor in split(state)[0].items()}
    named = {name: part for name, part in named.items() if part.is_floating_point() and part.numel()}
    by_device: dict[torch.device, dict[Name, Tensor]] = {}
    for name, part in named.items():
        # the extremes of NaN are NaN; on a CPU this is many times faster than torch.isfinite
        by_device.setdefault(part.device, {})[name] = torch.stack(torch.aminmax(part)).double()
    suspects = set()
    for extremes in by_device.values():
        finite = torch.isfinite(torch.stack(list(extremes.values()))).all(-1).tolist()
        suspects |= {name for name, is_finite in zip(extremes, finite, strict=True) if not is_finite}
    found = next((name for name in named if name in suspects), None)
    place = None if found is None else _described(found)
    places = [place] if processes is None else processes.each(lambda: place)
    rank, place = next(((rank, place) for rank, place in enumerate(places) if place is not None), (0, None))
    return place if place is None or len(places) == 1 else f"{place} on process {rank}"


def _described(name: Name) -> str:
    part, _, rest = name.partition("/")
    if part == "model":
        return f"the weight {rest}"
    weight, _, value = rest.split("/", 2)[-1].rpartition("/")
    return f"{value} of the weight {weight} in the optimizer"


class Finds:
    """The finding of this process and its number: all processes look at the same places in the same order."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.looks = 0
        self.first: tuple[int, str] | None = None

    def judge(self, value: Any, place: str) -> None:
        """Note `place` if it is the first whose `value` is not finite, of which this process may have a part."""
        self.looks += 1
        if isinstance(value, MixerOutput):
            value = value.y
        if isinstance(value, DTensor):
            value = value.to_local()
        if self.first is None and isinstance(value, Tensor) and not torch.isfinite(value).all():
            self.first = (self.looks, place)

    def earliest(self) -> str | None:
        """The first finding of all processes, with the process if there are several; all must call it."""
        firsts = self.processes.each(lambda: self.first)
        found = [(*first, rank) for rank, first in enumerate(firsts) if first is not None]
        if not found:
            return None
        _, place, rank = min(found, key=lambda find: (find[0], find[2]))
        return place if self.processes.size == 1 else f"{place}, on process {rank}"


def _watched_pass(
    model: nn.Module,
    batch: Batch,
    run: Callable[[Batch], ModelOutput],
    finds: Finds,
    precision: Callable[[], AbstractContextManager],
) -> str | None:
    with _watched(model, finds), precision():
        output = run(batch)
        finds.judge(output.token_losses, "the loss in the forward pass")
        where = finds.earliest()
        if where is not None:
            return where
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the embedding has no input
            output.token_losses.mean().backward()
    where = finds.earliest()
    if where is not None:
        return where
    for name, weight in model.named_parameters():  # the hooks see no gradients of weights divided over processes
        finds.judge(weight.grad, f"the gradient of {name} in the backward pass")
    return finds.earliest()


@contextmanager
def _watched(model: nn.Module, finds: Finds) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if any(True for _ in module.children()):
            continue  # a leaf names the place more closely

        def after_forward(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            finds.judge(output, f"the output of {name} in the forward pass")

        def after_backward(_module: nn.Module, gradients: Any, _outputs: Any, name: str = name) -> None:
            for gradient in gradients:
                finds.judge(gradient, f"the gradient through {name} in the backward pass")

        handles.append(module.register_forward_hook(after_forward))
        handles.append(module.register_full_backward_hook(after_backward))
    for name, parameter in model.named_parameters():

        def after_gradient(gradient: Tensor, name: str = name) -> None:
            finds.judge(gradient, f"the gradient of {name} in the backward pass")

        handles.append(parameter.register_hook(after_gradient))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
