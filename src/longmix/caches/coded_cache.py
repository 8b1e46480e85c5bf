"""The base of caches in codes: exact until the prompt has ended, then codes of it and of what comes, block after block.

The newest tokens stay exact until `recent_size` of them came; these become a block of codes. Nothing is coded twice.
Rows of any length come to their blocks in the same step: what is left of a row's prompt, less than `group_size` tokens,
stands before the first of them. Forks share the codes of the prompt.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape, NewTokens
from longmix.caches.coded_kind import CodedKind
from longmix.caches.coded_store import CodedStore
from longmix.caches.exact import ExactCache
from longmix.caches.store import Store, taken
from longmix_kernels.attention import Segment, decode_attention

if TYPE_CHECKING:
    from longmix.mixers.parts.attention_state import AttentionState


class CodedCache(ExactCache):
    """See the module.

    Attributes:
        ended: whether the prompt has ended.
        prompt_length: tokens then, padding included.
        prompt: stores of one block, one of each width, never written to; forks share them.
        prompt_count: int64 [B], tokens of a row's document in them, which stand at the end.
        blocks: stores of what came since, one of each width.
        coded: how many blocks came.
        first_block, first_count: int64 [B], the block with which a row's document begins, and its tokens there, which
            stand at the block's end.
        recent_key, recent_value: [B, Hkv, group_size - 1 + recent_size, .], the newest tokens; None before the end.
        recent_first: int64 [B], the slot of a row's first token there.
        recent: tokens since the last block; they stand from slot group_size - 1 on.
        scale: the factor on the scores.
    """

    kind: CodedKind
    tensors: ClassVar[tuple[str, ...]] = (
        *ExactCache.tensors,
        "prompt_count",
        "first_block",
        "first_count",
        "recent_key",
        "recent_value",
        "recent_first",
    )
    numbers: ClassVar[tuple[str, ...]] = (*ExactCache.numbers, "ended", "prompt_length", "coded", "recent")

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.ended = False
        self.prompt_length = self.coded = self.recent = 0
        self.prompt, self.blocks = self._empty_stores(1), self._empty_stores()
        zeros = torch.zeros(shape.batch, dtype=torch.int64, device=shape.device)
        self.prompt_count, self.first_block, self.recent_first = zeros, zeros.clone(), zeros.clone()
        self.first_count = torch.full_like(zeros, self.kind.recent_size)
        self.recent_key: Tensor | None = None
        self.recent_value: Tensor | None = None
        self.scale: float | None = None
        self._wanted = 0  # tokens that there will be

    def _empty_stores(self, wanted: int = 0) -> list[CodedStore]:
        return [CodedStore(bits, wanted=wanted) for bits in self.kind.widths]

    @property
    def margin(self) -> int:
        """Slots before those of the tokens since the last block."""
        return self.kind.group_size - 1

    def encode(self, stores: list[CodedStore], key: Tensor, value: Tensor, count: Tensor | None) -> None:
        """Append a block to the stores.

        Args:
            stores: one of each width.
            key, value: [B, Hkv, n, .], n a multiple of `group_size`.
            count: int64 [B], how many of the last tokens are of a row's document; None for all. The others' codes are
                never read, and change nothing about those of the document.
        """
        raise NotImplementedError(f"{type(self).__name__} lacks encode(stores, key, value, count)")

    def wrote(self, new: NewTokens, part: slice) -> None:
        """Learn from the last of the `recent` tokens, before they become codes.

        Args:
            new: all tokens of a call.
            part: which of them were written last.
        """

    def read(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """As `exact` until the prompt ends; then a single token is written first and finds its own key in place."""
        self.scale = new.scale
        if not self.ended:
            return super().read(new, with_logsumexp)
        if new.count > 1 or new.ids is not None:
            return Cache.read(self, new, with_logsumexp)
        self._write(new, slice(0, 1))
        output, new.logsumexp, _ = decode_attention(
            new.query, self.segments(new), scale=new.scale, return_logsumexp=with_logsumexp
        )
        self._written(new, slice(0, 1))
        return output, new.logsumexp

    def reserve(self, count: int) -> None:
        """See `Cache.reserve`."""
        self._wanted = self.length + count
        if self.ended:
            self._want_blocks()
        else:
            super().reserve(count)

    def _want_blocks(self) -> None:
        more = (self.recent + self._wanted - self.length) // self.kind.recent_size
        for store in self.blocks:
            store.wanted = self.coded + more

    def prompt_ended(self) -> None:
        """Code whole groups of the prompt."""
        if self.ended or self.length == 0:
            return
        key, value = self.whole()
        group, own, length = self.kind.group_size, self.next_position, self.length
        most = length - length % group
        self.prompt_count = own - own % group
        if most:
            count = self.prompt_count if self.ragged else None
            self.encode(self.prompt, self._to_code(key, most), self._to_code(value, most), count)
        self.recent_first = self.margin - own % group
        self.recent_key, self.recent_value = (self._recent_buffer(x) for x in (key, value))
        self.ended, self.prompt_length = True, length
        self._want_blocks()
        self.shared, self.store = [], Store()

    def _to_code(self, x: Tensor, most: int) -> Tensor:
        """The whole groups of each row's document at the end of [B, Hkv, most, .]; any tokens before them."""
        if not self.ragged:
            return x[:, :, :most]
        begins = self.length - self.next_position
        at = (begins + self.prompt_count - most)[:, None] + torch.arange(most, device=x.device)
        return taken(x, at[:, None])

    def _recent_buffer(self, x: Tensor) -> Tensor:
        """Room for the newest tokens, with what is left of the prompt at the end of the margin."""
        margin = self.margin
        buffer = x.new_zeros(*x.shape[:2], margin + self.kind.recent_size, x.shape[3])
        left = min(margin, x.shape[2])
        buffer[:, :, margin - left : margin] = x[:, :, x.shape[2] - left :]
        return buffer

    def append(self, new: NewTokens) -> None:
        """Append in place; each time `recent_size` tokens are there, they become codes."""
        if not self.ended:
            super().append(new)
            return
        restarted = None if new.goes_on is None else ~new.goes_on[:, -1]
        if restarted is not None:
            self.prompt_count = torch.where(restarted, 0, self.prompt_count)
        start = 0
        while start < new.count:
            took = min(new.count - start, self.kind.recent_size - self.recent)
            part = slice(start, start + took)
            if restarted is not None and new.begins is not None:
                self._begin(restarted, new.begins - start, took)
            self._write(new, part)
            self._written(new, part)
            start += took

    def _write(self, new: NewTokens, part: slice) -> None:
        """Write tokens for which there is room behind the others."""
        assert self.recent_key is not None and self.recent_value is not None
        at, took = self.margin + self.recent, part.stop - part.start
        self.recent_key[:, :, at : at + took] = new.key[:, part].transpose(1, 2)
        self.recent_value[:, :, at : at + took] = new.value[:, part].transpose(1, 2)
        self.recent += took

    def _written(self, new: NewTokens, part: slice) -> None:
        """What follows once tokens were written and read."""
        self.wrote(new, part)
        if self.recent == self.kind.recent_size:
            self._code_recent()

    def _begin(self, restarted: Tensor, at: Tensor, took: int) -> None:
        """Begin the document of rows bool [B] with a token int64 [B] of those written, if it is one of them."""
        here = restarted & (at >= 0) & (at < took)
        self.recent_first = torch.where(here, self.margin + self.recent + at, self.recent_first)
        self.first_block = torch.where(here, self.coded, self.first_block)
        self.first_count = torch.where(here, self.kind.recent_size, self.first_count)

    def _code_recent(self) -> None:
        """Make a block of the oldest groups of the newest tokens; the rest moves to the front."""
        assert self.recent_key is not None and self.recent_value is not None
        margin, size, group = self.margin, self.kind.recent_size, self.kind.group_size
        count: Tensor | None = None
        if self.ragged:
            held = margin + size - self.recent_first
            count = held - held % group
            at = (self.recent_first - size + count)[:, None] + torch.arange(size, device=held.device)
            block = [taken(x, at[:, None]) for x in (self.recent_key, self.recent_value)]
            begun = count < size
            self.first_block = torch.where(begun, self.coded, self.first_block)
            self.first_count = torch.where(begun, count, self.first_count)
            self.recent_first = margin - held % group
        else:
            start = margin - self.prompt_length % group
            block = [x[:, :, start : start + size] for x in (self.recent_key, self.recent_value)]
        self.encode(self.blocks, block[0], block[1], count)
        for x in (self.recent_key, self.recent_value):
            x[:, :, :margin] = x[:, :, size:].clone()
        self.coded += 1
        self.recent = 0

    def segments(self, new: NewTokens) -> list[Segment]:
        """The codes of the prompt, those since, and the newest tokens."""
        if not self.ended:
            return super().segments(new)
        found = []
        for store, whole, count in zip(
            self.prompt, self.kind.shares(self._coded_prompt()), self.kind.shares(self.prompt_count), strict=True
        ):
            found.append(store.segment(whole - count if self.ragged else None))
        size, begun = self.kind.shares(self.kind.recent_size), self.kind.shares(self.first_count)
        for store, whole, count in zip(self.blocks, size, begun, strict=True):
            found.append(store.segment((self.first_block + 1) * whole - count if self.ragged else None))
        return [*(each for each in found if each is not None), *self._recent_segment()]

    def _coded_prompt(self) -> int:
        """Tokens of the prompt in codes, padding included."""
        return self.prompt_length - self.prompt_length % self.kind.group_size

    def _recent_segment(self) -> list[Segment]:
        assert self.recent_key is not None and self.recent_value is not None
        start, stop = self._recent_start(), self.margin + self.recent
        if start == stop:
            return []
        first = (self.recent_first - start).clamp(min=0).to(torch.int32) if self.ragged else None
        return [Segment(self.recent_key[:, :, start:stop], self.recent_value[:, :, start:stop], first=first)]

    def _recent_start(self) -> int:
        """The first slot in use of the newest tokens."""
        return 0 if self.ragged else self.margin - self.prompt_length % self.kind.group_size

    def fork(self, count: int) -> Self:
        """See `ExactCache.fork`; codes of the prompt are shared, and what came since is copied."""
        other = super().fork(count)
        index = torch.arange(self.shape.batch, device=self.shape.device).repeat_interleave(count)
        other.blocks = [store.rows(index) for store in self.blocks]
        return other

    def keep(self, rows: Tensor) -> Self:
        """See `Cache.keep`."""
        other = super().keep(rows)
        other.blocks = [store.rows(rows) for store in self.blocks]
        other.prompt = [store.rows(rows // (self.shape.batch // _rows(store))) for store in self.prompt]
        return other

    def truncate(self, length: int) -> None:
        """See `Cache.truncate`; not beyond the last block of codes."""
        if not self.ended:
            super().truncate(length)
            return
        dropped = self.length - length
        if not 0 <= dropped <= self.recent:
            raise ValueError(f"cache={self.kind.name} has codes of all but the last {self.recent} tokens")
        self.recent -= dropped
        self.length = length
        self.next_position = self.next_position - dropped

    def slots_of(self, length: int) -> int:
        """See `ExactCache.slots_of`."""
        return 0 if self.ended else length

    def trimmed(self) -> dict[str, Any]:
        """As in `ExactCache`, with the codes."""
        found = super().trimmed()
        for name, store in self._stores().items():
            found |= {f"{name}_{part}": x.clone() for part, x in store.used.items()}
        if self.recent_key is not None and self.recent_value is not None:
            used = self.margin + self.recent
            found["recent_key"], found["recent_value"] = (
                x[:, :, :used].contiguous() for x in (self.recent_key, self.recent_value)
            )
        return found

    def restore(self, saved: dict[str, Any], name: str) -> None:
        """See `Cache.restore`."""
        for key in ("ended", "prompt_length", "coded", "recent"):  # what the number of tokens in codes follows from
            if type(saved.get(key)) is not type(getattr(self, key)) or saved[key] < 0:
                raise ValueError(f"it holds {saved.get(key)!r} as {name}.{key}")
            setattr(self, key, saved[key])
        if self.recent >= self.kind.recent_size:
            raise ValueError(f"{name} holds {self.recent} tokens that should be codes")
        for store_name, store in self._stores().items():
            self._restore_store(store, store_name, saved, name)
        super().restore(saved, name)
        self._restore_recent(name)

    def _restore_store(self, store: CodedStore, store_name: str, saved: dict[str, Any], name: str) -> None:
        of_prompt, number = store_name.startswith("prompt"), self.kind.widths.index(store.bits)
        tokens = self._coded_prompt() if of_prompt else self.kind.recent_size
        slots = self.kind.shares(tokens)[number]
        blocks = int(self.ended and slots > 0) if of_prompt else self.coded if slots else 0
        if not blocks:
            return
        rows = None
        for part, sizes in self.kind.entries(self.shape, store.bits, slots).items():
            x = saved.pop(f"{store_name}_{part}", None)
            dtype = torch.uint8 if part in ("key", "value") else self.kind.dtype
            heads, entries, width = sizes
            rows = rows or (x.shape[0] if isinstance(x, Tensor) and x.ndim == 4 else 0)
            wanted = (rows, heads, entries * blocks, width)
            if not isinstance(x, Tensor) or x.layout != torch.strided or x.shape != wanted or x.dtype != dtype:
                raise ValueError(f"{name}.{store_name}_{part} is no part of a state of this model")
            store.parts[part], store.sizes[part] = x, entries
        if not rows or self.shape.batch % rows or (rows != self.shape.batch and not of_prompt):
            raise ValueError(f"{name}.{store_name} has {rows} rows")
        store.blocks = blocks

    def _restore_recent(self, name: str) -> None:
        """Give the newest tokens their room back."""
        shape, used = self.shape, self.margin + self.recent
        if (self.recent_key is None) == self.ended or (self.recent_value is None) == self.ended:
            raise ValueError(f"{name} does not hold its newest tokens")
        if self.recent_key is None or self.recent_value is None:
            return
        for part, width in (("recent_key", shape.key_dim), ("recent_value", shape.value_dim)):
            x: Tensor = getattr(self, part)
            if x.shape != (shape.batch, shape.key_heads, used, width) or not x.is_floating_point():
                raise ValueError(f"{name}.{part} has the shape {list(x.shape)}, which is no state of this model")
            buffer = x.new_zeros(*x.shape[:2], self.margin + self.kind.recent_size, width)
            buffer[:, :, :used] = x
            setattr(self, part, buffer)

    def _stores(self) -> Mapping[str, CodedStore]:
        """All stores by name."""
        found = {f"prompt_{number}": store for number, store in enumerate(self.prompt)}
        return found | {f"blocks_{number}": store for number, store in enumerate(self.blocks)}

    def adopt(self, state: "AttentionState", length: int) -> None:
        """Refused, since such a state does not say where the prompt ended."""
        Cache.adopt(self, state, length)

    def held_bytes(self) -> int:
        """Codes, their parameters, and the newest tokens; what is shared counts once."""
        found = super().held_bytes() + sum(store.held_bytes() for store in self._stores().values())
        return found + self._recent_bytes(self.margin + self.recent - self._recent_start())

    def spare_bytes(self) -> int:
        """Room for later tokens and blocks."""
        found = super().spare_bytes() + sum(store.spare_bytes() for store in self._stores().values())
        return found + self._recent_bytes(self._recent_start() + self.kind.recent_size - self.recent)

    def _recent_bytes(self, slots: int) -> int:
        parts = (self.recent_key, self.recent_value)
        return sum(0 if x is None else x[:, :, :1].numel() * x.element_size() * slots for x in parts)

    def bookkeeping_bytes(self) -> int:
        """See `Cache.bookkeeping_bytes`."""
        more = (self.prompt_count, self.first_block, self.first_count, self.recent_first)
        return super().bookkeeping_bytes() + sum(x.nbytes for x in more)


def _rows(store: CodedStore) -> int:
    """The rows of a store; 1 of an empty one."""
    return next(iter(store.parts.values())).shape[0] if store.parts else 1
