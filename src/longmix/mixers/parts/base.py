"""The contract of every sequence mixer: one signature for training, prefill and decode."""

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from longmix.caches.cache import Cache, CacheKind
from longmix.distributed.slices import Slices
from longmix.errors import ConfigError
from longmix.mixers.parts.layout import LayoutNeeds
from longmix.mixers.parts.looked_into import EngineCall, ValuePath
from longmix.mixers.parts.metrics import Metric
from longmix.mixers.parts.taken import shared_weights
from longmix.pytrees import pytree

FAR = 2**40
"""More tokens than any row has: a state that is as large after twice as many does not grow."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the model around a mixer."""

    d_model: int
    num_layers: int
    num_heads: int
    norm_eps: float = 1e-6


@pytree
@dataclass
class MixerOutput:
    """The output of a mixer.

    Attributes:
        y: [B, T, D], dtype of the input.
        state: what the next call needs to continue after these tokens; None unless a state was passed in.
        losses: auxiliary losses by name, scalars with gradients, added to the training loss. Each is a mean over rows
            or tokens, so that it is the same however processes and micro-batches divide them.
        metrics: by name, logged per layer without further wiring: each a `Measure`, or a detached scalar that is a
            mean over tokens.
        value_residual: the value [B, T, D] that a mixer with a value residual gives to those after it.
    """

    y: Tensor
    state: Any = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    value_residual: Tensor | None = None


class Mixer(nn.Module):
    """Base of the sequence mixers. A subclass is one file: projections, gates, ordering; an engine does the work.

    `forward` with a state continues the sequence: a prefill in any split followed by single-token steps gives the same
    outputs as one full pass. Without a state it is a full pass from the beginning and returns no state.

    Attributes:
        value_residual: whether `forward` also takes `value_residual`, what the first such layer returned as that, or
            None in that layer itself (Zhou et al. 2024, arXiv 2410.17897).
        leaky: whether later tokens change outputs before them; training warns of it, and evaluation refuses it
            unless every prefix is run alone.
        leaky_setting: the setting that makes it so, such as "mixer.mode=sequence_topk"; None if the class is so.
        sliced: whether `forward` takes `Slices` as its state. Without it context parallelism hands whole rows to every
            process, which is as exact, but divides neither the mixer's work nor its memory.
        carries_in_slices: whether `Slices` may also have a state before the rows, `Slices.carried`; the state after the
            slice then comes back. Without it context parallelism with carried state hands over whole rows.
        sizes: settings that say how many tokens are seen or stay together, and the least of each. A scale model has
            smaller ones, so that short rows have something outside them.
        small: settings at which rows of a few dozen tokens show what rows of thousands do with the usual ones; tests
            take them, besides smaller `sizes`.
        changeable: settings that may change after training, because no weight's shape or meaning depends on them:
            `checkpoint=RUN mixer.NAME=VALUE` takes them, and so do stages of a run. Stages need what is made of them in
            `__init__` to be plain attributes: numbers, texts, and dataclasses, tuples or dicts of these.
        roles: submodules that mean what those of the same name mean in other mixers, so that a model with other mixers
            may take their weights (`convert=true`).
        inherits: settings that such a model takes too of a mixer of another class that also has them here, where the
            command does not say them: what the weights of `roles` were trained with.
        kind: what tells layers apart that need unlike memory or time although their weights have the same shapes. The
            builder sets it to the place of the mixer's settings in the configuration.
        tunes_states: whether `tune_states` is there, which `trainable=states` needs. The submodule `tuned` then holds
            all that it trains and nothing else; a `states.pt` holds its weights.
        usual_place: what its messages call its settings by; in a pattern they name the member instead.
        takes_layout: whether `forward` takes `layout`; each class notes it by itself.
        recompiles: whether a compiled step is of no use, since each length of the state needs a graph of its own.
        watch: is given every call of the engine while somebody looks into the mixer; None otherwise.
    """

    value_residual = False
    leaky = False
    leaky_setting: str | None = None
    sliced = False
    carries_in_slices = False
    sizes: ClassVar[dict[str, int]] = {}
    small: ClassVar[dict[str, Any]] = {}
    changeable: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[tuple[str, ...]] = ("query", "key", "value", "output", "query_norm", "key_norm")
    inherits: ClassVar[tuple[str, ...]] = ()
    kind: Hashable = None
    usual_place = "mixer"
    tunes_states = False
    watch: Callable[[EngineCall], None] | None = None
    takes_layout: ClassVar[bool] = False
    recompiles: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Note whether `forward` of the class takes `layout`; a subclass may lack it where its base class has it."""
        super().__init_subclass__(**options)
        parameters = inspect.signature(cls.forward).parameters.values()
        cls.takes_layout = any(each.name == "layout" or each.kind is each.VAR_KEYWORD for each in parameters)

    def forward(self, x: Tensor, *, state: Any = None, document_ids: Tensor | None = None) -> MixerOutput:
        """Mix `x` [B, T, D] along T; `document_ids` int32 [B, T] is non-decreasing along T, and may begin anywhere.

        With a state, `document_ids` continue the ids passed before; None continues each row's last document, which is
        document 0 where no ids were passed yet. Where `sliced` is set, a state may be
        `longmix.distributed.slices.Slices`: then x is this process's slice of longer rows, and no state comes back.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks forward(x, *, state, document_ids)")

    def init_state(self, batch: int) -> Any:
        """The state before the first token, for `batch` rows: a pytree whose tensors begin with the row."""
        raise NotImplementedError(f"{type(self).__name__} lacks init_state(batch)")

    def taken_from(self, teacher: "Mixer", weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this mixer takes of another one's weights, by its own names; the rest stays as it is.

        Args:
            teacher: the other mixer, which may be without memory.
            weights: its weights by name.
        """
        return shared_weights(self, teacher, self.roles, weights)

    def takes_cache(self, kind: CacheKind) -> bool:
        """Whether `decoding_state` returns a cache of this kind."""
        return False

    def decoding_state(self, batch: int, kind: CacheKind) -> Any:
        """The state before the first token, for `batch` rows of generated text, without gradients.

        Args:
            batch: rows.
            kind: the cache to keep keys and values in.

        Returns:
            A `longmix.caches.cache.Cache` where `takes_cache` says so, else what `init_state` returns.
        """
        return self.init_state(batch)

    def state_bytes(self, length: int) -> int:
        """Bytes of state one row holds after `length` tokens."""
        raise NotImplementedError(f"{type(self).__name__} lacks state_bytes(length)")

    def state_is_bounded(self) -> bool:
        """Whether the state stops growing with the length, so that training can carry it from window to window."""
        return self.state_bytes(FAR) == self.state_bytes(2 * FAR)

    def state_between_documents(self, batch: int) -> Any:
        """A state for `batch` rows after which any next token begins a document; training carries it at first.

        What tuned states are made of is not in it: they belong to each forward pass.
        """
        return self.init_state(batch)

    def step_bytes(self, length: int) -> int:
        """Bytes of state that decoding one token after `length` others reads and writes; all of it by default."""
        return self.state_bytes(length)

    def decoding_bytes(self, length: int, steps: int) -> int:
        """The sum of `step_bytes` over the steps that decode `steps` tokens after `length` others."""
        return sum(self.step_bytes(length + step) for step in range(steps))

    def shared_bytes(self, prompt: int, steps: int) -> int:
        """Bytes of `steps` steps after a prompt that are of the prompt, whatever was generated; 0 by default.

        Several generations that go on from one prompt can read these together.
        """
        return 0

    def flops(self, length: int) -> int:
        """Floating-point operations of one forward pass over one row of `length` tokens, projections included."""
        raise NotImplementedError(f"{type(self).__name__} lacks flops(length)")

    def layout_needs(self) -> LayoutNeeds | None:
        """What of a `Layout` the mixer uses; None for nothing.

        With it `forward` also takes `layout`, or None to make that itself. Layers that need the same share one.
        """
        return None

    def prepare(self, length: int) -> None:
        """Prepare whatever depends only on the length of rows; nothing by default.

        The planner calls this before it runs the mixer on tensors without memory.
        """

    def tune_states(self, features: int = 0, decorrelation: float = 0.0) -> None:
        """Make what the mixer remembers before each document trainable, as the submodule `tuned`; see `tunes_states`.

        Args:
            features, decorrelation: of a memory besides; see `longmix.mixers.parts.state_tuning`.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks tune_states(features, decorrelation)")

    def value_path(self) -> ValuePath | None:
        """The layers between which the mixer is linear in its values; None where its engine is given the values."""
        return None

    def call_engine(
        self,
        engine: Callable[..., tuple[Tensor, Any]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """Call an engine, and show the call to an analysis that looks into the mixer.

        Args:
            engine: such as `longmix_kernels.linear.linear_attention`; linear in `value`, given everything else.
            query, key, value, options: the engine's arguments.
        """
        result = engine(query, key, value, **options)
        if self.watch is not None:
            self.watch(EngineCall(engine, query, key, value, options, result[0]))
        return result


def checked_sizes(
    x: Tensor, width: int, document_ids: Tensor | None = None, state: Any = None, states: tuple[type, ...] = ()
) -> tuple[int, int]:
    """B and T of a mixer's input, after checks of all arguments.

    Args:
        x, document_ids, state: see `Mixer.forward`.
        width: the model's.
        states: the classes that a state may have.

    Raises:
        ValueError: `x` is not [B, T, width], or has no row or no token; `document_ids` are not integers [B, T]; the
            state is another mixer's, or has another number of rows.
    """
    if x.dim() != 3 or x.shape[2] != width or 0 in x.shape:
        raise ValueError(f"x has shape {list(x.shape)}; allowed is [B, T, {width}] with every size at least 1")
    batch, length, _ = x.shape
    if document_ids is not None:
        kind, shape = document_ids.dtype, list(document_ids.shape)
        if kind not in (torch.int32, torch.int64) or shape != [batch, length]:
            raise ValueError(f"document_ids is {kind} {shape}; allowed is torch.int32 [{batch}, {length}], as x")
    if state is not None and states and not isinstance(state, states):
        raise ValueError(f"state is a {type(state).__name__}; allowed is {states[0].__name__}, from init_state")
    if state is not None and not isinstance(state, Slices):
        rows = batch
        if isinstance(state, Cache):  # which would have to form its positions
            rows = state.shape.batch
        elif (positions := getattr(state, "next_position", None)) is not None:
            rows = len(positions)
        if rows != batch:
            raise ValueError(f"state has {rows} rows and x has {batch}; allowed are as many")
    return batch, length


TOKENS, COUNT, FACTOR, SEED, REAL = 2**30, 2**16, 64, 2**32, 1e6
"""The most that settings may be: lengths in tokens; features, ranks and the like; widths over the model's; seeds, of
either sign; and other numbers, of either sign. What makes sense is far below; what is beyond overflows somewhere."""


def at_most(most: float, **settings: float | None) -> None:
    """Refuse settings of a mixer beyond plus or minus `most`; None is fine.

    Raises:
        ConfigError: naming the setting.
    """
    for name, value in settings.items():
        if value is not None and not -most <= value <= most:
            raise ConfigError(f"mixer.{name}={value} is out of range; it must be from {-most:,} to {most:,}.")


def divided(whole: int, parts: int, whole_key: str, parts_key: str) -> int:
    """`whole // parts`, or a `ConfigError` that names both keys and lists divisors when it does not divide."""
    if parts < 1 or whole % parts:
        divisors = [d for d in range(1, min(whole, 128) + 1) if whole % d == 0]
        raise ConfigError(
            f"{parts_key}={parts} does not divide {whole_key}={whole}; use one of {', '.join(map(str, divisors))}."
        )
    return whole // parts
