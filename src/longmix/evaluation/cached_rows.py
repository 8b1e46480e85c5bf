"""Rows of text whose prompt is in a cache, read on with known tokens: what a cache still knows of the prompt."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longmix.caches.cache import CacheKind, PromptReader
from longmix.generation.questions import written_ahead
from longmix.generation.session import Session
from longmix.mixers.parts.states import forked, held_bytes
from longmix.model.backbone import LanguageModel

PIECE = 16
"""Tokens that are read at once after a prompt; one with a kind whose steps choose."""


@dataclass(frozen=True)
class Prompted:
    """Rows with what a cache is to remember, and what is asked of it then.

    Attributes:
        prompt: int64 [B, T], one document each.
        ahead: int64 [B, n], the tokens that follow, at least one.
        targets: int64 [B, 1 + n], what is to be predicted from the prompt and from each token behind it, or
            `IGNORE_INDEX`.
        question: int64 [B, q], what a kind that reads for a question is given as that.
        follows: int64 [B, f], what a kind that looks ahead is shown.
        together: how many tokens of `ahead` are read at once, as a question is.
        groups: of each row, what results are told apart by, such as a depth.
    """

    prompt: Tensor
    ahead: Tensor
    targets: Tensor
    question: Tensor
    follows: Tensor
    together: int = 0
    groups: Sequence[float] = ()

    @property
    def tokens(self) -> int:
        """Tokens of a row that are read."""
        return self.prompt.shape[1] + self.ahead.shape[1]

    def changed(self, change: Callable[[Tensor], Tensor], groups: Sequence[float]) -> "Prompted":
        """The same with `change` applied to every tensor, and other groups."""
        prompt, ahead, targets = change(self.prompt), change(self.ahead), change(self.targets)
        told = change(self.question), change(self.follows)
        return Prompted(prompt, ahead, targets, *told, together=self.together, groups=groups)


class CachedRows:
    """Rows that have read a prompt, which the caches then compressed, and are read on.

    A kind that chooses by what follows is told it: one that reads for a question is given it, one that looks ahead sees
    the tokens that do follow, or those that `draft` writes.

    Args:
        model: in evaluation mode.
        kind: the cache.
        rows: the rows.
        draft: writes the tokens to look ahead at; None takes those that do follow.

    Attributes:
        session: of the rows.
        held: bytes of a row after the prompt, without bookkeeping.
        counted_held: the same as mixers and caches count them.
        counted_read: bytes of a row that the first token after the prompt reads, as they count them.

    Raises:
        ConfigError: no layer takes the kind.
    """

    @torch.no_grad()
    def __init__(
        self, model: LanguageModel, kind: CacheKind, rows: Prompted, draft: LanguageModel | None = None
    ) -> None:
        prompt = rows.prompt
        self.session = Session(model, len(prompt), kind)
        self.session.reserve(rows.tokens)
        reader = kind.reader()
        if reader is not None:
            self.session.state = self._before_question(reader, prompt, rows.question)
            self.session.length = prompt.shape[1]
        else:
            self.session.prefill(list(prompt), lookahead=_lookahead(kind, rows, draft))
        self.held = held_bytes(self.session.state)[0] // len(prompt)
        self.counted_held = self.session.counted_bytes(prompt.shape[1])
        self.counted_read = self.session.counted_read_bytes(prompt.shape[1])
        self._read: list[int] = []

    def _before_question(self, reader: PromptReader, prompt: Tensor, question: Tensor) -> Any:
        """The state after the question has chosen and before it is read for good, which is the reader's last call."""
        model, before = self.session.model, None

        def advance(tokens: Tensor, state: Any) -> Any:
            nonlocal before
            before = forked(state, 1) if tokens is question else None
            output = model(tokens, state=state)
            if tokens is not question:
                self.session.logits = model.logits(output.hidden[:, -1])
            return output.state

        reader(advance, self.session.state, prompt, question)
        assert before is not None, "the question was not read at last"
        return before

    @property
    def read_bytes(self) -> float:
        """Bytes of a row's state that a piece read, the mean over pieces so far."""
        return statistics.fmean(self._read)

    @torch.no_grad()
    def log_probabilities(self, tokens: Tensor, together: int = 0) -> Iterator[Tensor]:
        """Read tokens, int64 [B, n]: the first `together` at once, then the others in pieces, or by steps that choose.

        Yields:
            float32 [B, t, V] of the tokens behind the first `together`, then of those behind each `PIECE`.
        """
        session = self.session
        one = 1 if session.cache.step_by_step else PIECE
        first, rest = tokens[:, :together], tokens[:, together:]
        pieces = [(first, max(1, together))] if together else []
        for piece, width in [*pieces, *((piece, one) for piece in rest.split(PIECE, 1) if piece.shape[1])]:
            found = []
            for part in piece.split(width, 1):
                output = session.model(part, state=session.state)
                session.state, session.length = output.state, session.length + part.shape[1]
                self._read.append(session.read_bytes(bookkeeping=False) // session.batch)
                found.append(session.model.logits(output.hidden))
            yield torch.cat(found, 1).float().log_softmax(-1)

    @torch.no_grad()
    def seconds(self, tokens: Tensor, steps: int) -> float:
        """The median time of `steps` steps with these tokens, int64 [B, n], again and again, after one to warm up."""
        times = []
        for number in range(steps + 1):
            begin = _now(tokens.device)
            self.session.step(tokens[:, number % tokens.shape[1]])
            times.append(_now(tokens.device) - begin)
        return statistics.median(times[1:])


def _lookahead(kind: CacheKind, rows: Prompted, draft: LanguageModel | None) -> Tensor | None:
    """Tokens to look ahead at, int64 [B, n]; None for a kind that does not."""
    count = kind.lookahead_tokens(rows.follows.shape[1])
    if count is None or draft is None:
        return None if count is None else rows.follows[:, :count]
    return written_ahead(draft, list(rows.prompt), count)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
