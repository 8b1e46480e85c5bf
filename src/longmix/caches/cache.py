"""The contract of caches: what one layer of attention remembers while text is generated.

A `CacheKind` holds settings and builds a `Cache` for a layer. A mixer calls `Cache.attend` with new tokens: they see
what the cache lets them read and each other, and are then appended, in place. So a cache that was handed on is used up;
whoever needs it again forks it first. Keys have their positions in them, so that slots stand in any order.

Rows of a batch may differ in length, and a row may begin a new document, which sees nothing of the one before. What a
row gets is what it would get alone: no budget, choice, scale or random number depends on the other rows.

A kind is one file with these two classes, and one `configs/cache/NAME.yaml`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

import torch
from torch import Tensor

from longmix.caches.segments import attend_segments, merged
from longmix.caches.star import StarReading
from longmix.errors import ConfigError
from longmix_kernels.attention import Segment, attention, decode_attention
from longmix_kernels.attention.decode import MOST_QUERIES

if TYPE_CHECKING:
    from longmix.mixers.parts.attention_state import AttentionState
    from longmix.mixers.parts.rotary import Rotary


Advance: TypeAlias = Callable[[Tensor, Any], Any]
"""Passes tokens, int64 [B, T], through the model after a state, and returns the state after them."""

PromptReader: TypeAlias = Callable[[Advance, Any, Tensor, Tensor | None], Any]
"""Reads prompts, int64 [B, T], from a state and then a question, int64 [B, t] or None; returns the state after them."""


@dataclass(frozen=True)
class CacheShape:
    """The sizes of what a layer caches.

    Attributes:
        batch: rows.
        key_heads: Hkv; `group` query heads share each.
        key_dim, value_dim: channels of a key and of a value.
        dtype: of keys and values; those of the first tokens decide, which under autocast have another.
        device: where they are.
        layer: index of the layer, from 0.
        rotary: the rotation that is in the keys; None for none.
        window: how many of the latest tokens a query sees, its own among them; None for all.
    """

    batch: int
    key_heads: int
    group: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    layer: int = 0
    rotary: "Rotary | None" = None
    window: int | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values of all heads."""
        return self.key_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class CacheKind:
    """The settings of a kind of cache; a subclass adds its own as fields.

    Args:
        exact_layers: indices of layers that keep everything, whatever the kind.

    Attributes:
        name: the word of `cache=`.
        when: what has been read when `Cache.prompt_ended` is called: the whole prompt, which the cache holds until
            then, or each piece of it, and the whole again at the end.
        takes_bias: whether keys may have the columns of a bias (`mixer.bias`) behind their channels.
        step_by_step: whether tokens see something else when they are read one at a time than in a piece, as where each
            step chooses.
        takes_star: whether prompts may be read as `prefill=star` says, since the cache holds all of one until it ends.
    """

    name: ClassVar[str]
    when: ClassVar[Literal["prompt", "piece"]] = "prompt"
    takes_bias: ClassVar[bool] = True
    step_by_step: ClassVar[bool] = False
    takes_star: ClassVar[bool] = False
    exact_layers: Sequence[int] = ()

    @property
    def piece_tokens(self) -> int | None:
        """Tokens of a prompt to be read at once, counted from its end; None for as many as memory allows."""
        return None

    def lookahead_tokens(self, max_tokens: int) -> int | None:
        """How many tokens that may follow a prompt help to choose what is kept; None for no such choice.

        Args:
            max_tokens: that will be generated.
        """
        return None

    def reader(self) -> "PromptReader | None":
        """What reads prompts of one length, where that is more than passing them through the model; None for that."""
        return None

    def build(self, shape: CacheShape) -> "Cache":
        """An empty cache."""
        raise NotImplementedError(f"{type(self).__name__} lacks build(shape)")

    def prompts_ended(self, caches: "Sequence[Cache]") -> None:
        """Compress further what needs all layers, after `Cache.prompt_ended` of each; nothing by default.

        Args:
            caches: those of this kind, of a model's layers.
        """

    def bytes(self, shape: CacheShape, length: int) -> int:
        """Bytes that one row holds after a prompt of `length` tokens, as `Cache.held_bytes` measures them."""
        raise NotImplementedError(f"{type(self).__name__} lacks bytes(shape, length)")

    def step_bytes(self, shape: CacheShape, length: int) -> int:
        """Bytes that one row reads for the token after `length` others, its own among them; all by default."""
        return self.bytes(shape, length + 1)


@dataclass
class NewTokens:
    """Tokens that a call brings, T of each row.

    Attributes:
        query: [B, T, Hq, K], key: [B, T, Hkv, K], value: [B, T, Hkv, V]; what has to do with positions is in them.
        positions: int64 [B, T], the position of each token in its document.
        scale: the factor on the scores; None for K ** -0.5.
        ids: integer [B, T], documents; None where each row's document goes on.
        begins: int64 [B], the first token of the document that the row ends with, 0 if it goes on from before; None
            without ids.
        goes_on: bool [B, T], whether a token is of the document that the cache holds; None for all of them.
        logsumexp: [B, T, Hq], of the scores of each query, while `Cache.append` runs; None where nobody wants it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    scale: float | None = None
    ids: Tensor | None = None
    begins: Tensor | None = None
    goes_on: Tensor | None = None
    logsumexp: Tensor | None = None

    @property
    def count(self) -> int:
        """T."""
        return self.query.shape[1]


class Cache:
    """The cache of one layer.

    A subclass writes `append` and `segments`, or all of `read` where it knows better, and says which attributes it
    holds. It never reads numbers of a tensor on the host in a step, which would wait for the device.

    Args:
        kind: its settings.
        shape: its sizes.

    Attributes:
        length: tokens seen, padding included.
        document: int32 [B], the document of the last token.
        ragged: whether documents were ever told apart, so that rows may differ in length.
        carried: [B, ...], what else the mixer needs of the tokens before; None for nothing.
        reading: which keys of a prompt its tokens see, while it is read; None for all before them.
        tensors: names of the attributes that are tensors [B, ...] or None; a subclass adds its own.
        numbers: names of the attributes that are numbers; likewise.
    """

    tensors: ClassVar[tuple[str, ...]] = ("next_position", "document", "carried")
    numbers: ClassVar[tuple[str, ...]] = ("length", "ragged")
    reading: StarReading | None = None
    one_document = True  # a mixer need not repeat the ids of a document that goes on

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        self.kind, self.shape = kind, shape
        self.length = 0
        self.ragged = False
        self._last_position = torch.full((shape.batch, 1), -1, dtype=torch.int64, device=shape.device)
        self.document = torch.zeros(shape.batch, dtype=torch.int32, device=shape.device)
        self.carried: Tensor | None = None

    @property
    def next_position(self) -> Tensor:
        """int64 [B], the position in its document that the next token of each row takes."""
        return self._last_position[:, 0] + 1

    @next_position.setter
    def next_position(self, positions: Tensor) -> None:
        self._last_position = positions[:, None] - 1

    @property
    def last_id(self) -> Tensor | None:
        """int32 [B], the document of the last token; None before the first."""
        return self.document if self.length else None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        ids: Tensor | None = None,
        *,
        scale: float | None = None,
        return_logsumexp: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from new tokens to the cache and to each other, and append them.

        Args:
            query, key, value, scale: see `NewTokens`.
            positions: integer [B or 1, T].
            ids: integer [B, T], the documents of the tokens; None where each row's last one goes on.
            return_logsumexp: whether to return the logsumexp of each query's scores.

        Returns:
            The output [B, T, Hq, V], and the logsumexp [B, T, Hq] or None.

        Raises:
            ConfigError: gradients are on.
        """
        if torch.is_grad_enabled():
            raise ConfigError(
                f"cache={self.kind.name} is for inference and keeps no gradients; call the model under "
                "torch.no_grad(), or go on from `init_state`."
            )
        batch, length = query.shape[:2]
        if positions.shape != (batch, length) or positions.dtype != torch.int64:
            positions = positions.long().expand(batch, length)
        new = NewTokens(query, key, value, positions, scale, ids)
        if ids is not None:
            self.ragged = True
            new.begins = (length - 1 - positions[:, -1]).clamp(min=0)
            new.goes_on = positions > torch.arange(length, device=positions.device)
        found = self.read(new, return_logsumexp)
        self.length += length
        # a step's are those of all layers; of a piece not a view of all
        self._last_position = positions if length == 1 else positions[:, -1:].clone()
        if ids is not None:
            self.document = ids[:, -1].to(torch.int32)
        return found

    def read(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """Attend from new tokens, then append them: by default to the segments and causally to each other.

        `length` and `next_position` are still those before the tokens.
        """
        segments = self.segments(new)
        if new.count <= MOST_QUERIES and new.ids is None:
            own_tokens = (new.key, new.value)
            output, logsumexp, _ = decode_attention(
                new.query, segments, scale=new.scale, new=own_tokens, return_logsumexp=with_logsumexp
            )
        else:
            own = attention(new.query, new.key, new.value, document_ids=new.ids, scale=new.scale, return_logsumexp=True)
            read = attend_segments(new.query, segments, scale=new.scale, goes_on=new.goes_on)
            output, logsumexp = merged([*read, own])
        new.logsumexp = logsumexp
        self.append(new)
        return output, logsumexp

    def append(self, new: NewTokens) -> None:
        """Remember new tokens, in place; of a row that began a new document, those of the last one alone."""
        raise NotImplementedError(f"{type(self).__name__} lacks append(new)")

    def segments(self, new: NewTokens) -> list[Segment]:
        """What these queries read besides the new tokens, before those are appended; none for an empty cache."""
        raise NotImplementedError(f"{type(self).__name__} lacks segments(new)")

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens, which are then appended without a copy of the rest."""

    def prompt_ended(self) -> None:
        """Compress; see `CacheKind.when`."""

    def prompt_ended_before(self, ahead: "Cache") -> None:
        """Compress, knowing tokens that may come.

        Args:
            ahead: what `looking_ahead` returned, after it read them.
        """
        self.prompt_ended()

    def looking_ahead(self, count: int) -> Self:
        """A fork that reads `count` tokens which may come, for `prompt_ended_before`."""
        return self.fork(1)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The cache of the rows of several caches, which may have seen different numbers of tokens.

        Raises:
            ConfigError: the kind cannot.
        """
        raise ConfigError(f"cache={parts[0].kind.name} keeps no prompts of different lengths that were read apart.")

    @classmethod
    def _joined(cls, parts: Sequence[Self]) -> Self:
        """The part of `joined` that is common to all kinds."""
        longest = max(parts, key=lambda part: part.length)
        other = longest._changed(sum(part.shape.batch for part in parts), lambda x: x)
        for name in Cache.tensors:
            rows = [getattr(part, name) for part in parts]
            setattr(other, name, None if rows[0] is None else torch.cat(rows))
        other.ragged = True
        return other

    def fork(self, count: int) -> Self:
        """Every row `count` times, rows of one text behind each other; this cache and the other go on independently."""
        return self._changed(self.shape.batch * count, lambda x: x.repeat_interleave(count, 0))

    def keep(self, rows: Tensor) -> Self:
        """The cache of these rows, int64 [n], each any number of times; independent of this one."""
        return self._changed(len(rows), lambda x: x.index_select(0, rows.to(x.device)))

    def _changed(self, batch: int, change: Any) -> Self:
        other = copy.copy(self)
        other.shape = replace(self.shape, batch=batch)
        for name in self.tensors:
            x = getattr(self, name)
            setattr(other, name, None if x is None else change(x))
        return other

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`, padding included; no document may have begun behind them.

        Raises:
            ValueError: the kind cannot take tokens back.
        """
        raise ValueError(f"cache={self.kind.name} cannot take tokens back")

    def trimmed(self) -> dict[str, Any]:
        """What has to be saved to go on, by name: tensors [B, ...] without spare room, numbers, and None."""
        found = {name: getattr(self, name) for name in (*self.tensors, *self.numbers)}
        return {name: x.clone() if isinstance(x, Tensor) else x for name, x in found.items()}

    def restore(self, saved: dict[str, Any], name: str) -> None:
        """Become what `trimmed` gave, of a cache of the same kind and shape.

        Args:
            saved: from a file that anybody may have written.
            name: of the cache, for messages.

        Raises:
            ValueError: it is no such thing.
        """
        for key in (*self.tensors, *self.numbers):
            if key not in saved:
                raise ValueError(f"it lacks {name}.{key}")
            setattr(self, key, self._checked(saved.pop(key), getattr(self, key), f"{name}.{key}"))
        if saved:
            raise ValueError(f"it holds {next(iter(saved))!r} of {name}, which is in no state of this model")
        if self.length < 0:
            raise ValueError(f"its {name}.length is {self.length}")

    def _checked(self, found: Any, like: Any, name: str) -> Any:
        """What a file holds, if it can stand where `like` stands in an empty cache; None there is for keys or values.

        Raises:
            ValueError: it cannot.
        """
        if isinstance(like, bool | int | float):
            if type(found) is not type(like):
                raise ValueError(f"it holds {found!r} in the place of a {type(like).__name__}")
            return found
        if found is None and like is None:
            return found
        if not isinstance(found, Tensor):
            raise ValueError(f"it holds {found!r} in the place of a tensor")
        wrong = found.layout != torch.strided or found.is_meta or found.is_quantized
        wrong = wrong or found.ndim < 1 or found.shape[0] != self.shape.batch
        if isinstance(like, Tensor):
            wrong = wrong or found.shape != like.shape or found.dtype != like.dtype
        if wrong:
            raise ValueError(f"{name} has the shape {list(found.shape)}, which is no state of this model")
        return found

    def adopt(self, state: "AttentionState", length: int) -> None:
        """Take over the keys and values of a mixer's own state after `length` tokens, as earlier versions saved them.

        Raises:
            ValueError: the kind cannot.
        """
        raise ValueError(f"cache={self.kind.name} cannot go on from a state of keys and values")

    def _adopt(self, state: "AttentionState", length: int) -> None:
        """The part of `adopt` that is common to all kinds."""
        self.length, self.ragged = length, state.document_ids is not None
        self.next_position, self.carried = state.next_position, state.carried
        if state.last_id is not None:
            self.document = state.last_id.to(torch.int32)

    def held_bytes(self) -> int:
        """Bytes of what is remembered of the tokens, over all rows: without spare room, ids, counts and `carried`."""
        kept = set(self.tensors) - set(Cache.tensors)
        return sum(x.nbytes for x in (getattr(self, name) for name in kept) if x is not None)

    def spare_bytes(self) -> int:
        """Bytes of the room for later tokens, over all rows."""
        return 0

    def bookkeeping_bytes(self) -> int:
        """Bytes of what says where rows are and what is valid, over all rows."""
        return self._last_position.nbytes + self.document.nbytes

    def read_bytes(self) -> int:
        """Bytes of keys, values and what chooses them that the last token read, over all rows; all by default."""
        return self.held_bytes()
