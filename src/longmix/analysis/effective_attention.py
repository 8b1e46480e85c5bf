"""The matrix by which a mixer mixes its values: how much token j counts for token i in each head, whatever the mixer.

Given its queries, keys and gates, every mixer here is linear in its values v, o = A v. So values that are the columns
of the identity give A itself, exactly and with no formula for any mixer (the kernel of Sieber et al. 2024, arXiv
2405.15731). Buckets, clusters and other choices are those of the tokens, which no value changes.

    softmax mixers     v = W_v x, and o is what W_o is given: gates of values and of outputs are in A
    recurrent mixers   v and o are what the engine is given and returns: after convolutions and the value residual,
                       before tuned memory, head-wise norm, output gate and RWKV-7's bonus (r . k) v

What does not depend on v, from learned sinks and tuned states, is no part of A but of `Mixing.offset`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.recurrent import RecurrentMixer
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.model.backbone import LanguageModel

ENGINES = ("linear_attention", "delta_rule")
"""The engines of the recurrent mixers, as the modules of the mixers name them."""


@dataclass(frozen=True)
class Mixing:
    """How a mixer mixed the values of some tokens.

    Attributes:
        value: [B, T, Hv, W], which it mixed; Hv divides the number of heads H.
        output: [B, T, H, W], of that.
        offset: [B, T, H, W], what it would have been of values that are all 0.
        run: any values of this shape to what they become.
    """

    value: Tensor
    output: Tensor
    offset: Tensor
    run: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """[B, H, T, T], W columns at a time: output = matrix @ value + offset, in the dtype of the values."""
        batch, length, heads, width = self.value.shape
        identity = torch.eye(length, dtype=self.value.dtype, device=self.value.device)
        found = self.value.new_empty(batch, self.output.shape[2], length, length)
        for start in range(0, length, width):
            columns = identity[:, start : start + width]
            columns = F.pad(columns, (0, width - columns.shape[1]))
            values = columns[:, None].expand(batch, length, heads, width).contiguous()
            part = (self.run(values) - self.offset).transpose(1, 2)
            found[..., start : start + width] = part[..., : length - start]
        return found


@dataclass(frozen=True)
class EngineCall:
    """One call of the engine of a recurrent mixer.

    Attributes:
        engine: the function.
        query, key, value: what it was given, [B, T, H, .].
        options: its other arguments by name, the gates among them.
        output: [B, T, H, V], what it returned first.
    """

    engine: Callable[..., tuple[Tensor, Any]]
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    output: Tensor


@contextmanager
def recorded_calls(mixer: Mixer) -> Iterator[list[EngineCall]]:
    """Note every call that the mixer's class, or a base of it, makes to an engine of `ENGINES` meanwhile."""
    calls: list[EngineCall] = []

    def recording(engine: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
        def run(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Any]:
            result = engine(query, key, value, **options)
            calls.append(EngineCall(engine, query, key, value, options, result[0]))
            return result

        return run

    modules = {sys.modules[kind.__module__] for kind in type(mixer).__mro__}
    held = [(module, name, getattr(module, name)) for module in modules for name in ENGINES if hasattr(module, name)]
    with ExitStack() as undone:
        for module, name, engine in held:
            undone.callback(setattr, module, name, engine)
            setattr(module, name, recording(engine))
        yield calls


def mixing(mixer: Mixer, x: Tensor, **options: Any) -> Mixing:
    """Run a mixer in evaluation mode on `x` [B, T, D] and say how it mixed.

    Args:
        mixer: recurrent or softmax.
        x: its input.
        options: its other arguments, such as `document_ids`; no state.

    Raises:
        ValueError: the mixer is of another kind, or asks its engine more than once.
    """
    if isinstance(mixer, RecurrentMixer):
        call = engine_call(mixer, x, **options)

        def run_engine(values: Tensor) -> Tensor:
            return call.engine(call.query, call.key, values, **call.options)[0]

        return Mixing(call.value, call.output, run_engine(torch.zeros_like(call.value)), run_engine)
    if not isinstance(mixer, SoftmaxAttention):
        raise ValueError(
            f"{type(mixer).__name__} derives from neither RecurrentMixer (longmix.mixers.parts.recurrent), whose "
            "engine takes the values, nor SoftmaxAttention (longmix.mixers.parts.softmax), which has projections "
            "`value` and `output`; so it is not known which values it mixes"
        )

    def run(values: Tensor | None) -> tuple[Tensor, Tensor]:
        return _between(mixer, values, lambda: mixer(x, **options))

    value, output = run(None)
    return Mixing(value, output, run(torch.zeros_like(value))[1], lambda values: run(values)[1])


def engine_call(mixer: RecurrentMixer, x: Tensor, **options: Any) -> EngineCall:
    """The call that a recurrent mixer makes to its engine for `x`, see `mixing`.

    Raises:
        ValueError: there is not one such call.
    """
    with recorded_calls(mixer) as calls:
        mixer(x, **options)
    if len(calls) != 1:
        raise ValueError(f"{type(mixer).__name__} made {len(calls)} calls to {' or '.join(ENGINES)}; allowed is 1")
    return calls[0]


def _between(mixer: SoftmaxAttention, values: Tensor | None, forward: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Values of the projection, or others in their place, and the heads that reach the output projection."""
    seen: dict[str, Tensor] = {}

    def enter(module: Any, inputs: Any, projected: Tensor) -> Tensor:
        seen["value"] = projected
        return projected if values is None else values.flatten(2).to(projected)

    def leave(module: Any, inputs: tuple[Tensor]) -> None:
        seen["output"] = inputs[0]

    with ExitStack() as undone:
        undone.callback(mixer.value.register_forward_hook(enter).remove)
        undone.callback(mixer.output.register_forward_pre_hook(leave).remove)
        forward()
    return seen["value"].unflatten(-1, (-1, mixer.head_dim)), seen["output"].unflatten(-1, (mixer.num_heads, -1))


def layer_inputs(model: LanguageModel, tokens: Tensor, document_ids: Tensor | None) -> list[tuple[Tensor, dict]]:
    """What each layer's mixer is given when the model reads `tokens` [B, T]: the input, and its other arguments."""
    found: list[tuple[Tensor, dict]] = []

    def note(module: Any, inputs: tuple[Tensor], options: dict[str, Any]) -> None:
        found.append((inputs[0], {name: option for name, option in options.items() if name != "state"}))

    with ExitStack() as undone:
        for mixer in model.mixers():
            undone.callback(mixer.register_forward_pre_hook(note, with_kwargs=True).remove)
        model(tokens, document_ids=document_ids)
    return found
