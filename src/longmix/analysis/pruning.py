"""Greedy pruning: which layers' branches and heads a model can do without (after AxFormer, arXiv 2010.03688).

From the last layer down, a layer's channel mixer is left out, then its mixer; where the mixer stays, its heads one by
one, and where the channel mixer stays, groups of its channels if they are asked for. What is left out stays out if the
held-out loss is at most the best so far plus a margin; the best follows down. A part is left out by a factor of 0 on
what it adds to the residual stream, so no weight changes and the model is whole again afterwards.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from longmix.mixers.parts.base import Mixer, MixerOutput
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Block

Kind = Literal["mlp", "mixer", "head", "channels"]


class Part(NamedTuple):
    """A part of a model: a branch of a layer, a head of its mixer, or a group of its channel mixer's channels.

    Attributes:
        kind: "mlp", the channel mixer; "mixer"; "head"; or "channels".
        layer: from 0.
        number: of the head or the group.
    """

    kind: Kind
    layer: int
    number: int | None = None

    def __str__(self) -> str:
        number = "" if self.number is None else f" {self.number}"
        return f"layer {self.layer} {self.kind}{number}"


@dataclass(frozen=True)
class Trial:
    """One part, the loss without it and everything that was left out before, and whether it stays out."""

    part: Part
    loss: float
    removed: bool


@dataclass(frozen=True)
class Pruned:
    """What a greedy search left out, in this order, the loss without it, and all that was tried."""

    removed: tuple[Part, ...]
    loss: float
    trials: tuple[Trial, ...]


def greedy(
    heads: Sequence[int],
    loss: Callable[[frozenset[Part]], float],
    margin: float,
    groups: Sequence[int] | None = None,
    tried: Callable[[], None] = lambda: None,
) -> Pruned:
    """Leave out parts one after the other, from the last layer down.

    Args:
        heads: of each layer's mixer; 0 where they cannot be told apart.
        loss: held out, without a set of parts.
        margin: what a removal may cost.
        groups: of channels of each layer's channel mixer; None for none.
        tried: called after every trial, for a progress bar.
    """
    removed: list[Part] = []
    trials: list[Trial] = []
    best = now = loss(frozenset())

    def leave_out(part: Part) -> bool:
        nonlocal best, now
        found = loss(frozenset([*removed, part]))
        stays_out = found <= best + margin
        if stays_out:
            removed.append(part)
            best, now = min(best, found), found
        trials.append(Trial(part, found, stays_out))
        tried()
        return stays_out

    for layer in reversed(range(len(heads))):
        without_mlp = leave_out(Part("mlp", layer))
        if not leave_out(Part("mixer", layer)):
            for head in range(heads[layer]):
                leave_out(Part("head", layer, head))
        if groups is not None and not without_mlp:
            for group in range(groups[layer]):
                leave_out(Part("channels", layer, group))
    return Pruned(tuple(removed), now, tuple(trials))


def head_exit(mixer: Mixer) -> tuple[nn.Module, int] | None:
    """The layer that is given a mixer's heads side by side, and how many; None where a mixer has no such layer."""
    path = mixer.value_path()
    if path is not None:
        return path.leave, path.heads
    layer = getattr(mixer, "output", None)
    heads = getattr(mixer, "num_value_heads", getattr(mixer, "num_heads", None))  # several may share one's keys
    if isinstance(layer, nn.Linear) and isinstance(heads, int) and layer.in_features % heads == 0:
        return layer, heads
    return None


def channel_exit(mlp: Mixer) -> tuple[nn.Linear, int] | None:
    """The layer that is given a SwiGLU's hidden channels, and how many; None for another channel mixer."""
    layer = getattr(mlp, "down", None)
    return (layer, layer.in_features) if isinstance(layer, nn.Linear) else None


@contextmanager
def without(model: LanguageModel, parts: Iterable[Part], group: int | None = None) -> Iterator[None]:
    """Within the context the model computes without these parts.

    Args:
        model: any; its weights stay as they are.
        parts: what to leave out.
        group: channels of a group of "channels".
    """
    numbers: dict[tuple[Kind, int], list[int]] = {}
    for part in parts:
        numbers.setdefault((part.kind, part.layer), []).append(part.number or 0)
    with ExitStack() as undone:
        for (kind, layer), of_kind in numbers.items():
            block = cast(Block, model.blocks[layer])
            if kind in ("mlp", "mixer"):
                branch = block.mlp if kind == "mlp" else block.mixer
                undone.callback(branch.register_forward_hook(_silenced).remove)
                continue
            found = head_exit(block.mixer) if kind == "head" else channel_exit(block.mlp)
            assert found is not None
            leave, count = found
            width = None if kind == "head" else group
            undone.callback(leave.register_forward_pre_hook(_masking(of_kind, count, width)).remove)
        yield


def _silenced(module: nn.Module, inputs: Any, output: MixerOutput) -> MixerOutput:
    return replace(output, y=torch.zeros_like(output.y))


def _masking(numbers: list[int], count: int, width: int | None) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    """A hook that sets some of `count` heads to 0, or of `count` channels the groups of `width`."""

    def mask(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs
        size = x.shape[-1] // count if width is None else width
        kept = x.clone()
        for number in numbers:
            kept[..., number * size : (number + 1) * size] = 0
        return (kept,)

    return mask


@dataclass(frozen=True)
class Savings:
    """Parameters and forward floating-point operations over a row that a model does without."""

    parameters: int
    flops: int


def savings(model: LanguageModel, parts: Iterable[Part], length: int, group: int | None = None) -> Savings:
    """What leaving out these parts saves.

    A branch counts with its norm. A head counts as its share of its mixer, a group of channels as its share of its
    channel mixer: what cutting them out would save, where heads do not share keys.
    """
    parameters = flops = 0.0
    for part in parts:
        block = cast(Block, model.blocks[part.layer])
        is_mlp = part.kind in ("mlp", "channels")
        branch, norm = (block.mlp, block.mlp_norm) if is_mlp else (block.mixer, block.mixer_norm)
        share = 1.0
        if part.kind == "head":
            found = head_exit(block.mixer)
            assert found is not None
            share = 1 / found[1]
        elif part.kind == "channels":
            found = channel_exit(block.mlp)
            assert found is not None and group is not None and part.number is not None
            share = min(group, found[1] - part.number * group) / found[1]
        parameters += share * _weights(branch) + (_weights(norm) if share == 1.0 else 0)
        flops += share * branch.flops(length)
    return Savings(round(parameters), round(flops))


def _weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def masks(model: LanguageModel, removed: Iterable[Part], group: int | None = None) -> dict[str, Any]:
    """The factors of all parts: `{"mixer": [layer], "mlp": [layer], "heads": [layer][head], "channels": ...}`.

    Each is 1 or 0. Heads and channels of a layer are null where they cannot be told apart, or were not asked for.
    """
    gone = set(removed)
    layers = range(len(model.blocks))
    heads, channels = parts_of(model, group)
    return {
        "mixer": [int(Part("mixer", layer) not in gone) for layer in layers],
        "mlp": [int(Part("mlp", layer) not in gone) for layer in layers],
        "heads": [[int(Part("head", i, n) not in gone) for n in range(heads[i])] or None for i in layers],
        "channel_group": group,
        "channels": None
        if channels is None
        else [[int(Part("channels", i, n) not in gone) for n in range(channels[i])] or None for i in layers],
    }


def parts_of(model: LanguageModel, group: int | None) -> tuple[list[int], list[int] | None]:
    """How many heads each layer has, and how many groups of channels; None without a size of groups."""
    blocks = [cast(Block, block) for block in model.blocks]
    heads = [0 if (found := head_exit(block.mixer)) is None else found[1] for block in blocks]
    if group is None:
        return heads, None
    return heads, [0 if (found := channel_exit(block.mlp)) is None else -(-found[1] // group) for block in blocks]
