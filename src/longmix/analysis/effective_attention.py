"""The matrix by which a mixer mixes its values: how much token j counts for token i in each head, whatever the mixer.

Given its queries, keys and gates, every mixer here is linear in its values v, o = A v. So values that are the columns
of the identity give A itself, exactly and with no formula for any mixer (the kernel of Sieber et al. 2024, arXiv
2405.15731). Buckets, clusters and other choices are those of the tokens, which no value changes.

    with a `value_path`   v = W_v x, and o is what W_o is given: gates of values and outputs are in A (softmax mixers)
    by `call_engine`      v and o are what the engine is given and returns: after convolutions and the value residual,
                          before tuned memory, head-wise norm, output gate and RWKV-7's bonus (r . k) v

What does not depend on v, from learned sinks and tuned states, is no part of A but of `Mixing.offset`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longmix.batch import Batch, documents_of
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.looked_into import EngineCall, ValuePath
from longmix.model.backbone import LanguageModel


@dataclass(frozen=True)
class Mixing:
    """The linear map from values to outputs by which a mixer mixed some tokens.

    Attributes:
        value: [B, T, Hv, W], the values; Hv divides the number of heads H. Where a token has several values a head, it
            is a multiple of it, the first value of all heads first; how much a token counts is the sum over its values.
        output: [B, T, H, W], the output for these values.
        offset: [B, T, H, W], the output for values that are all 0.
        run: the output for any values of this shape.
    """

    value: Tensor
    output: Tensor
    offset: Tensor
    run: Callable[[Tensor], Tensor]

    @property
    def writes(self) -> int:
        """How many values a token has for each head."""
        return max(1, self.value.shape[2] // self.output.shape[2])

    @torch.no_grad()
    def matrix(self, write: int | None = None) -> Tensor:
        """[B, H, T, T], W columns at a time: output = matrix @ value + offset, in the dtype of the values.

        Args:
            write: number of the one of a token's `writes` values that counts; None for all, each with the same value.
        """
        batch, length, heads, width = self.value.shape
        identity = torch.eye(length, dtype=self.value.dtype, device=self.value.device)
        found = self.value.new_empty(batch, self.output.shape[2], length, length)
        for start in range(0, length, width):
            columns = identity[:, start : start + width]
            columns = F.pad(columns, (0, width - columns.shape[1]))
            values = columns[:, None].repeat(batch, 1, heads, 1)
            if write is not None:
                each = heads // self.writes
                values[:, :, : write * each] = 0
                values[:, :, (write + 1) * each :] = 0
            part = (self.run(values) - self.offset).transpose(1, 2)
            found[..., start : start + width] = part[..., : length - start]
        return found


@contextmanager
def recorded_calls(mixer: Mixer) -> Iterator[list[EngineCall]]:
    """Record every call that a mixer makes to an engine within the context, see `Mixer.call_engine`."""
    calls: list[EngineCall] = []
    before, mixer.watch = mixer.watch, calls.append
    try:
        yield calls
    finally:
        mixer.watch = before


def mixing(mixer: Mixer, x: Tensor, **options: Any) -> Mixing:
    """Run a mixer in evaluation mode on `x` [B, T, D] and say how it mixed.

    Args:
        mixer: one that calls its engine by `call_engine`, or has a `value_path`.
        x: its input.
        options: its other arguments, such as `document_ids`; no state.

    Raises:
        ValueError: the mixer does neither, or calls its engine more than once.
    """
    path = mixer.value_path()
    if path is None:
        call = engine_call(mixer, x, **options)

        def run_engine(values: Tensor) -> Tensor:
            return call.engine(call.query, call.key, values, **call.options)[0]

        return Mixing(call.value, call.output, run_engine(torch.zeros_like(call.value)), run_engine)

    def run(values: Tensor | None) -> tuple[Tensor, Tensor]:
        return _between(path, values, lambda: mixer(x, **options))

    value, output = run(None)
    return Mixing(value, output, run(torch.zeros_like(value))[1], lambda values: run(values)[1])


def engine_call(mixer: Mixer, x: Tensor, **options: Any) -> EngineCall:
    """The call that a mixer makes to its engine for `x`, see `mixing`.

    Raises:
        ValueError: there is not one such call.
    """
    with recorded_calls(mixer) as calls:
        mixer(x, **options)
    if not calls:
        raise ValueError(
            f"{type(mixer).__name__} neither calls its engine by `call_engine` nor has a `value_path` "
            "(longmix.mixers.parts.base.Mixer says what each is), so it is not known which values it mixes"
        )
    if len(calls) > 1:
        raise ValueError(f"{type(mixer).__name__} made {len(calls)} calls to its engine; allowed is 1")
    return calls[0]


def _between(path: ValuePath, values: Tensor | None, forward: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Values of a path, or others in their place, and the heads that leave it."""
    seen: dict[str, Tensor] = {}

    def enter(module: Any, inputs: Any, projected: Tensor) -> Tensor:
        seen["value"] = projected
        return projected if values is None else values.flatten(2).to(projected)

    def leave(module: Any, inputs: tuple[Tensor]) -> None:
        seen["output"] = inputs[0]

    with ExitStack() as undone:
        undone.callback(path.enter.register_forward_hook(enter).remove)
        undone.callback(path.leave.register_forward_pre_hook(leave).remove)
        forward()
    return seen["value"].unflatten(-1, (path.value_heads, -1)), seen["output"].unflatten(-1, (path.heads, -1))


def layer_inputs(model: LanguageModel, batch: Batch) -> list[tuple[Tensor, dict]]:
    """What each layer's mixer is given when the model reads a batch: the input, and its other arguments."""
    found: list[tuple[Tensor, dict]] = []

    def note(module: Any, inputs: tuple[Tensor], options: dict[str, Any]) -> None:
        found.append((inputs[0], {name: option for name, option in options.items() if name != "state"}))

    with ExitStack() as undone:
        for mixer in model.mixers():
            undone.callback(mixer.register_forward_pre_hook(note, with_kwargs=True).remove)
        model(batch["tokens"], **documents_of(batch))
    return found
