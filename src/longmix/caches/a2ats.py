"""`cache=a2ats`: everything is held, and a token reads what it scores best by the codes of keys (He et al. 2025,
arXiv 2502.12665).

At the prompt's end each key head gets a codebook of its keys, and every key the number of the nearest code in it, its
own code (see `codebooks`). Keys are coded as they are before their rotation, and a query that chooses is rotated as if
all stood `distance` tokens behind it. It scores the codes instead of the keys, and each query head chooses the best
`share` of the tokens outside the first `sinks` and the newest `window`. Heads that share keys read what any of them
chose, with ordinary scores: all that differs from `exact` is what is left out.

The authors make one codebook of 64k tokens of other text; here a row's is made of its own prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, CacheShape, NewTokens
from longmix.caches.clusters import label_dtype
from longmix.caches.codebooks import best_tokens, code_scores, codebook_of, metric_factor, nearest_codes
from longmix.caches.exact import Exact, ExactCache
from longmix.caches.places import moved
from longmix.caches.scores import check_budget, tokens_of
from longmix.caches.segments import of_slots
from longmix.caches.store import of_every_row, of_rows
from longmix.errors import ConfigError
from longmix_kernels.attention import decode_attention

if TYPE_CHECKING:
    from longmix.mixers.parts.attention_state import AttentionState

LEAST_CODES = 2
"""A row whose prompt allows fewer has no codebook, and all of it is read."""

MOST_DISTANCE = 2048
"""The distance of the paper; no query is to be farther away than half of its text is long."""

RUN = 4096
"""Tokens whose keys or queries are turned back at once."""


@dataclass(frozen=True, kw_only=True)
class A2ATS(CacheKind):
    """The settings of `a2ats`.

    Args:
        sinks: first tokens of a text, which are always read.
        window: newest tokens, which are always read.
        share: tokens that each query head chooses of the others, as a share of all tokens so far.
        codes: size of the codebook of each key head, at most the tokens of the prompt; below 1 a share of them.
        distance: tokens that every key is taken to be behind a query, when it chooses; None for half of the prompt, at
            most 2,048.
        rounds: the most rounds of k-means.
        seed: of the first centroids.

    Raises:
        ConfigError: a setting is out of range.
    """

    name: ClassVar[str] = "a2ats"
    step_by_step: ClassVar[bool] = True
    takes_star: ClassVar[bool] = True
    takes_bias: ClassVar[bool] = False  # what a bias adds to a score is in no code
    sinks: int = 8
    window: int = 64
    share: float = 0.03
    codes: float = 0.0625
    distance: int | None = None
    rounds: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget("codes", self.codes, LEAST_CODES, "codes")
        for name, least in (("sinks", 0), ("window", 1), ("rounds", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"cache.{name}={getattr(self, name)} must be at least {least}.")
        if self.distance is not None and self.distance < 0:
            raise ConfigError(f"cache.distance={self.distance} must be at least 0, or null for half of the prompt.")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"cache.share={self.share} must be from 0 to 1.")

    def size(self, length: int) -> int:
        """Codes of a row whose prompt has `length` tokens; 0 for no codebook."""
        count = min(length, tokens_of(self.codes, length))
        return count if count >= LEAST_CODES else 0

    def distance_of(self, length: int) -> int:
        """The distance of a row whose prompt has `length` tokens."""
        return min(MOST_DISTANCE, length // 2) if self.distance is None else self.distance

    def build(self, shape: CacheShape) -> Cache:
        """An empty cache."""
        return A2ATSCache(self, shape)

    def bytes(self, shape: CacheShape, length: int) -> int:
        """All keys and values, and their codes with what makes them."""
        return shape.token_bytes * length + self._code_bytes(shape, length, length)

    def step_bytes(self, shape: CacheShape, length: int) -> int:
        """Codes, the newest and first tokens, and what query heads choose, as if no two of a group chose the same."""
        if not self.size(length):
            return self.bytes(shape, length + 1)
        read = self.sinks + self.window + shape.group * int(self.share * (length + 1))
        return shape.token_bytes * min(length + 1, read) + self._code_bytes(shape, length, length + 1)

    def _code_bytes(self, shape: CacheShape, prompt: int, length: int) -> int:
        """Bytes of the codebooks of a prompt, and of the codes of `length` tokens."""
        count, exact = self.size(prompt), torch.promote_types(shape.dtype, torch.float32)
        if not count:
            return 0
        made = shape.key_dim * (count * shape.dtype.itemsize + shape.key_dim * exact.itemsize)
        return shape.key_heads * (made + length * label_dtype(count).itemsize)


class CodeCache(ExactCache):
    """The codes of the tokens of another cache, slot by slot: "keys" of one channel, and "values" of none."""

    @classmethod
    def of(cls, shape: CacheShape) -> Self:
        """An empty one beside a cache of this shape."""
        wanted = CacheShape(shape.batch, shape.key_heads, shape.group, 1, 0, torch.int16, shape.device)
        return cls(Exact(), wanted)

    def add(self, codes: Tensor) -> None:
        """Append codes [B, Hkv, T]."""
        key = codes.transpose(1, 2).unsqueeze(-1)
        self.store.append(key, key[..., :0])
        self.length += codes.shape[2]

    def _check_part(self, key: Any, value: Any, name: str) -> None:
        """See `ExactCache`; codes are whole numbers."""
        if not isinstance(key, Tensor) or key.dtype not in (torch.int16, torch.int32):
            raise ValueError(f"{name} holds no codes")
        super()._check_part(key.double(), value.double() if isinstance(value, Tensor) else value, name)


class A2ATSCache(ExactCache):
    """See `A2ATS`. Exact until the prompt ends, and in pieces behind it; then each token chooses.

    Attributes:
        moment: float64 [B, Hkv, K, K], the sum of q q^T over the prompt's queries as if they stood at position 0; None
            before the first and after the end.
        ended: whether the prompt has ended.
        prompt_slots: slots that there were then; a document that begins behind them is read whole.
        codebooks: by name, of R rows, which forks share; empty without: `codebook` [R, Hkv, C, K] in the metric of the
            queries, `factor` [R, Hkv, K, K] of that metric, `sizes` int32 [R], codes of a row, `distances` int32 [R].
        codes: the codes of all slots, if there are codebooks.
        slots_read: int64 [B], how many slots of all heads the last token read; None where that is all.
    """

    kind: A2ATS
    tensors: ClassVar[tuple[str, ...]] = (*ExactCache.tensors, "moment")
    numbers: ClassVar[tuple[str, ...]] = (*ExactCache.numbers, "ended", "prompt_slots")

    def __init__(self, kind: CacheKind, shape: CacheShape) -> None:
        super().__init__(kind, shape)
        self.moment: Tensor | None = None
        self.ended, self.prompt_slots = False, 0
        self.codebooks: dict[str, Tensor] = {}
        self.codes = CodeCache.of(shape)
        self.slots_read: Tensor | None = None

    def read(self, new: NewTokens, with_logsumexp: bool) -> tuple[Tensor, Tensor | None]:
        """Choose for one token; a piece reads all."""
        if not self.codebooks or new.count > 1:
            self.slots_read = None
            return super().read(new, with_logsumexp)
        self.append(new)
        chosen, segments, start = self.chosen(new), [], 0
        self.slots_read = chosen.sum((1, 2))
        for key, value in self._parts():
            segments.append(of_slots(key, value, chosen[..., start : start + key.shape[2]]))
            start += key.shape[2]
        return decode_attention(new.query, segments, scale=new.scale, return_logsumexp=with_logsumexp)[:2]

    def append(self, new: NewTokens) -> None:
        """Append in place, with codes once there are codebooks; until then queries say what counts."""
        super().append(new)
        if self.codebooks:
            self.codes.add(self._codes_of(new.key, new.positions))
        elif not self.ended:
            self._add_queries(new)

    def reserve(self, count: int) -> None:
        """See `Cache.reserve`."""
        super().reserve(count)
        self.codes.reserve(count)

    def _add_queries(self, new: NewTokens) -> None:
        """Add q q^T of the queries of each row's last document to its moment."""
        batch, key_heads, width = len(new.query), self.shape.key_heads, new.query.shape[3]
        own = new.query.new_zeros(batch, key_heads, width, width, dtype=torch.float64)
        for start in range(0, new.count, RUN):
            some = slice(start, start + RUN)
            query = self._turned(new.query[:, some], new.positions[:, some]).double()
            if new.begins is not None:
                place = torch.arange(start, start + query.shape[1], device=query.device)
                query = query * (place >= new.begins[:, None])[..., None, None]
            rows = query.unflatten(2, (key_heads, -1)).transpose(1, 2).flatten(2, 3)
            own += torch.matmul(rows.transpose(-1, -2), rows)
        if self.moment is not None:
            before = self.moment if new.goes_on is None else self.moment * new.goes_on[:, -1, None, None, None]
            own = before + own
        self.moment = own

    def _turned(self, x: Tensor, before: Tensor, after: Tensor | None = None) -> Tensor:
        """Queries or keys [B, T, H, K] as if their positions [B, T] were others, 0 by default; float32 or better."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return moved(exact, before, torch.zeros_like(before) if after is None else after, self.shape.rotary)

    def _moment_at(self, moment: Tensor, distances: Tensor) -> Tensor:
        """The moment of the same queries if they stood at these positions [B] instead of 0: R M R^T, R the rotation."""
        after = distances[:, None]
        rows = self._turned(moment.transpose(1, 2), torch.zeros_like(after), after)
        return self._turned(rows.transpose(1, 3), torch.zeros_like(after), after).transpose(1, 2)

    def prompt_ended(self) -> None:
        """Make each row's codebook of its keys and queries."""
        if self.ended:
            return
        moment, self.moment, self.ended, self.prompt_slots = self.moment, None, True, self.length
        lengths = self.next_position.tolist()
        sizes = [self.kind.size(length) for length in lengths]
        if moment is None or not any(sizes):
            return
        key = self.whole()[0]
        distances, counts = (
            torch.tensor(x, dtype=torch.int32, device=key.device)
            for x in ([*map(self.kind.distance_of, lengths)], sizes)
        )
        factor = metric_factor(self._moment_at(moment, distances))
        exact = torch.promote_types(key.dtype, torch.float32)
        codebook = key.new_zeros(*key.shape[:2], max(sizes), key.shape[3])
        for row, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
            if size:
                own = key[row : row + 1, :, self.length - length :].transpose(1, 2)
                keys = self._turned(own, torch.arange(length, device=key.device)[None])[0].transpose(0, 1)
                points = torch.matmul(keys, factor[row].to(exact))
                codebook[row, :, :size] = codebook_of(points, size, rounds=self.kind.rounds, seed=self.kind.seed)
        self.take_codebooks(codebook, factor.to(exact), counts, distances)

    def take_codebooks(self, codebook: Tensor, factor: Tensor, sizes: Tensor, distances: Tensor) -> None:
        """Choose by these codebooks from now on.

        Args:
            codebook, factor, sizes, distances: see `codebooks`.
        """
        self.codebooks = {"codebook": codebook, "factor": factor, "sizes": sizes, "distances": distances}
        key = self.whole()[0].transpose(1, 2)
        slot = torch.arange(self.length, device=key.device)
        positions = (slot - (self.length - self.next_position)[:, None]).clamp(min=0)
        for start in range(0, self.length, RUN):
            some = slice(start, start + RUN)
            self.codes.add(self._codes_of(key[:, some], positions[:, some]))

    def _codes_of(self, key: Tensor, positions: Tensor) -> Tensor:
        """The codes [B, Hkv, T] of keys [B, T, Hkv, K]."""
        codebook, factor = self.codebooks["codebook"], self.codebooks["factor"]
        rows = self._folded(self._turned(key, positions))
        points = torch.matmul(rows, factor.to(rows.dtype))
        codes = nearest_codes(points, codebook.to(rows.dtype), self.codebooks["sizes"][:, None])
        return self._unfolded(codes).to(label_dtype(codebook.shape[2]))

    def _folded(self, x: Tensor) -> Tensor:
        """Of x [B, T, Hkv * G, K] the rows of each codebook, [R, Hkv, B / R * G * T, K]."""
        heads, rows = self.shape.key_heads, len(self.codebooks["sizes"])
        parts = x.unflatten(2, (heads, -1)).unflatten(0, (rows, -1))  # [R, B / R, T, Hkv, G, K]
        return parts.permute(0, 3, 1, 4, 2, 5).flatten(2, 4)

    def _unfolded(self, x: Tensor) -> Tensor:
        """[B, Hkv, G * T, ...] of what was found for the rows of `_folded`."""
        repeats = self.shape.batch // len(x)
        return x.unflatten(2, (repeats, -1)).transpose(1, 2).flatten(0, 1)

    def chosen(self, new: NewTokens) -> Tensor:
        """Which slots one token of each row reads, itself among them, bool [B, Hkv, S]; after it was appended."""
        kind, slots = self.kind, self.codes.length
        positions = new.positions[:, 0]
        slot = torch.arange(slots, device=positions.device)
        place = slot - (slots - 1 - positions)[:, None]  # in the row's document
        others = (place >= kind.sinks) & (slot < slots - kind.window)
        counts = (kind.share * (positions + 1).double()).long()
        codes = self.codes.whole()[0].squeeze(-1).long()
        best = best_tokens(self._scores(new), codes, others, counts).any(2)
        coded = of_every_row(self.codebooks["sizes"], self.shape.batch) > 0
        coded = coded & (slots - 1 - positions < self.prompt_slots)
        always = ~others | ~coded[:, None]
        return (best | always[:, None]) & (place >= 0)[:, None]

    def _scores(self, new: NewTokens) -> Tensor:
        """The scores [B, Hkv, G, C] of codes, by one query of each row, as far from position 0 as `distances` say."""
        after = of_every_row(self.codebooks["distances"], self.shape.batch)[:, None]
        query = self._folded(self._turned(new.query, new.positions, after))
        codebook, factor = (self.codebooks[name].to(query.dtype) for name in ("codebook", "factor"))
        scale = new.query.shape[-1] ** -0.5 if new.scale is None else new.scale
        return self._unfolded(code_scores(query, codebook, factor, scale))

    def fork(self, count: int) -> Self:
        """See `ExactCache.fork`; codes and codebooks are shared too."""
        other = super().fork(count)
        other.codes, other.slots_read = self.codes.fork(count), None
        return other

    def keep(self, rows: Tensor) -> Self:
        """See `ExactCache.keep`."""
        other = super().keep(rows)
        other.codes, other.slots_read = self.codes.keep(rows), None
        other.codebooks = {name: of_rows(x, rows, self.shape.batch) for name, x in self.codebooks.items()}
        return other

    def truncate(self, length: int) -> None:
        """See `ExactCache.truncate`."""
        super().truncate(length)
        if self.codebooks:
            self.codes.truncate(length)

    def trimmed(self) -> dict[str, Any]:
        """As in `ExactCache`, with codes and codebooks."""
        found = super().trimmed()
        if self.codebooks:
            found |= {f"codes_{name}": x for name, x in self.codes.trimmed().items()}
            found |= {f"codebooks_{name}": x.clone() for name, x in self.codebooks.items()}
        return found

    def restore(self, saved: dict[str, Any], name: str) -> None:
        """See `Cache.restore`."""
        codes, codebooks = (
            {key.removeprefix(part): saved.pop(key) for key in list(saved) if key.startswith(part)}
            for part in ("codes_", "codebooks_")
        )
        super().restore(saved, name)
        if codebooks:
            self._check_codebooks(codebooks, name)
            self.codes.restore(codes, f"{name}.codes")
            keys = [key for key, _ in self.codes._parts()]
            limit = codebooks["codebook"].shape[2]
            wrong = any(bool(((key < 0) | (key >= limit)).any()) for key in keys)
            if wrong or self.codes.length != self.length:
                raise ValueError(f"{name} does not hold the codes of its keys")
        elif codes:
            raise ValueError(f"{name} holds codes of no codebook")
        self.codebooks = codebooks

    def _check_codebooks(self, found: dict[str, Any], name: str) -> None:
        if set(found) != {"codebook", "factor", "sizes", "distances"} or not all(
            isinstance(x, Tensor) for x in found.values()
        ):
            raise ValueError(f"{name} does not hold its codebooks")
        codebook, factor, sizes, distances = (found[key] for key in ("codebook", "factor", "sizes", "distances"))
        rows, heads, width = len(sizes) if sizes.ndim else 0, self.shape.key_heads, self.shape.key_dim
        wrong = rows < 1 or self.shape.batch % rows or codebook.ndim != 4 or sizes.dtype != torch.int32
        wrong = wrong or codebook.shape != (rows, heads, codebook.shape[2], width) or sizes.shape != (rows,)
        wrong = wrong or factor.shape != (rows, heads, width, width)
        wrong = wrong or distances.shape != sizes.shape or distances.dtype != sizes.dtype
        wrong = wrong or not (codebook.is_floating_point() and factor.is_floating_point())
        if wrong or not bool(((sizes >= 0) & (sizes <= codebook.shape[2])).all()):
            raise ValueError(f"{name}.codebooks are no part of a state of this model")

    def adopt(self, state: "AttentionState", length: int) -> None:
        """Refused, since the queries of a prompt are not in such a state."""
        Cache.adopt(self, state, length)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Refused; see `Cache.joined`."""
        raise ConfigError(f"cache={parts[0].kind.name} keeps no prompts of different lengths that were read apart.")

    def held_bytes(self) -> int:
        """Everything, and what chooses of it."""
        moment = 0 if self.moment is None else self.moment.nbytes
        codes = self.codes.held_bytes() + sum(
            self.codebooks[name].nbytes for name in ("codebook", "factor") if self.codebooks
        )
        return super().held_bytes() + moment + codes

    def spare_bytes(self) -> int:
        """Room behind the last token, and behind its code."""
        return super().spare_bytes() + self.codes.spare_bytes()

    def read_bytes(self) -> int:
        """The slots that were read last, and all that chooses."""
        if self.slots_read is None:
            return self.held_bytes()
        key, value = self._parts()[0]
        both, whole = key[0, 0, :1].nbytes + value[0, 0, :1].nbytes, super().held_bytes()
        return self.held_bytes() - whole + min(whole, int(self.slots_read.sum()) * both)

    def bookkeeping_bytes(self) -> int:
        """See `Cache.bookkeeping_bytes`."""
        numbers = sum(self.codebooks[name].nbytes for name in ("sizes", "distances") if self.codebooks)
        return super().bookkeeping_bytes() + self.codes.bookkeeping_bytes() + numbers
