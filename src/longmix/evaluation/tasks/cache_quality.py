"""`evaluate.py task=cache_quality`: what caches of keys and values lose, over the bytes that they hold and read.

A prompt goes through each cache, which compresses it, and known tokens are read behind it: the second half of a window
of text; the question for a needle, and its value; or all that follows the first part of an example of synthetic data.
A question is read in two places, because they differ: after the prompt was compressed, and before, as its end.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import Tensor

from longmix.batch import IGNORE_INDEX
from longmix.caches.cache import CacheKind
from longmix.caches.kinds import settings_of
from longmix.caches.named import kinds_of
from longmix.data.synthetic.base import SyntheticData
from longmix.data.synthetic.haystack import Needle, draw_needle, haystack_rows, stretch
from longmix.errors import ConfigError
from longmix.evaluation.cache_comparison import EXACT, Tally, compare
from longmix.evaluation.cached_rows import CachedRows, Prompted
from longmix.evaluation.memory import check_memory
from longmix.evaluation.prefill import text_of
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.evaluation.tasks.cache_tables import draw_quality, quality_tables
from longmix.evaluation.tasks.needle import MOST_NEEDLES, forms_of
from longmix.model.backbone import LanguageModel
from longmix.paths import check_path
from longmix.progress import tracked
from longmix.reporting.plots import drawing
from longmix.restore import restore

LARGEST = 2**40
"""The largest length of a row, and number of rows or steps."""

Question = Literal["after", "before"] | None
"""Where a question was read: after the prompt was compressed, or before; None is of rows without one."""


@dataclass(frozen=True)
class Rows:
    """Rows of one kind, to be read through every cache.

    Attributes:
        question: where a question stands in them.
        batches: makes them.
        whole: `found` is of rows, and not of tokens.
        asks: whether there is anything to be found, as in no text.
        count: how many batches there are.
    """

    question: Question
    batches: Callable[[], Iterator[Prompted]]
    whole: bool
    asks: bool
    count: int


class CacheQuality(Task):
    """Loss, needles found or accuracy with each of several caches, beside what the cache holds, reads and takes.

    Args:
        caches: words such as `h2o:budget=0.25:recent=0.1`; `exact` is added where it lacks.
        contexts: tokens of a row; None takes the word `seq_len`.
        windows: rows of text, or examples of synthetic data.
        depths: where needles lie, from 0 (first) to 1 (last in the prompt).
        needles: how many at each depth.
        prompt: of synthetic data, tokens that go through the cache; None for all before the first target of any
            example, or half where that is the first token.
        apart: of synthetic data, every target is asked for by itself: behind the prompt comes the one token in whose
            place it is to be predicted.
        steps: how many are timed.
        draft: a run whose model writes the tokens that caches look ahead at; None shows them those that do follow.
        seed: of needles and texts.
        statement, question: see `Needle`.

    Raises:
        ConfigError: an impossible or unknown setting.
    """

    name = "cache_quality"

    def __init__(
        self,
        caches: Sequence[str] = (EXACT,),
        contexts: list[int] | None = None,
        windows: int = 32,
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        needles: int = 8,
        prompt: int | None = None,
        apart: bool = False,
        steps: int = 8,
        draft: str | None = None,
        seed: int = 0,
        statement: str | None = None,
        question: str | None = None,
    ) -> None:
        if not depths or min(depths) < 0 or max(depths) > 1:
            raise ConfigError(f"task.depths={list(depths)} must be a list of numbers from 0 to 1.")
        if contexts == [] or any(not 2 <= context <= LARGEST for context in contexts or []):
            raise ConfigError(f"task.contexts={contexts} must be whole numbers from 2 to {LARGEST}.")
        for name, number, least, most in (
            ("windows", windows, 1, LARGEST),
            ("needles", needles, 0, MOST_NEEDLES),
            ("prompt", prompt, 1, LARGEST),
            ("steps", steps, 1, LARGEST),
            ("seed", seed, 0, LARGEST),
        ):
            if number is not None and not least <= number <= most:
                raise ConfigError(f"task.{name}={number} must be from {least} to {most}.")
        self.caches, self.contexts, self.windows, self.needles = list(caches), contexts, windows, needles
        self.depths = list(depths)
        self.prompt, self.apart, self.steps, self.draft, self.seed = prompt, apart, steps, draft, seed
        self.statement, self.question = statement, question
        self.kinds = kinds_of(self.caches if EXACT in caches else [EXACT, *caches], "task.caches")
        if draft is not None:
            check_path("task.draft", draft)
        if draft is not None and not any(_looks_ahead(kind) for kind in self.kinds.values()):
            raise ConfigError(f"task.draft={draft} writes ahead for caches such as speckv, and task.caches has none.")

    def ask(self, subject: Subject) -> Answer:
        """Read the rows of every context through every cache.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "data", "draft", "cells": [cell]}`. A cell is
            `{"cache", "kind", "settings", "context", "prompt", "question", "told", "rows", "loss", "kl", "found",
            "token_accuracy", "held_bytes", "counted_held_bytes", "read_bytes", "counted_read_bytes", "milliseconds",
            "by_distance", "by_depth"}`. `prompt` is tokens, the mean over rows; `question` None, "after" or "before";
            `told` what a cache knew beyond the prompt: None, "question", "truth" or "draft". `loss` and `kl`, the
            divergence from the distributions with `exact`, are in nats a target. `found` is the share of values found,
            or of targets of synthetic data, and None of windows of text. Bytes are of a row of these, and
            `milliseconds` of a step of one.

        Raises:
            ConfigError: a cache that no layer takes, a row without room for a needle, or more memory than there is.
            DataError: the split has less text than the longest context.
        """
        draft, cells, places = self._draft(subject), [], (None, "after", "before")
        for context in self.contexts or subject.seq_lens():
            tokens = min(subject.rows(context), max(self.windows, len(self.depths) * self.needles)) * context
            check_memory(subject.model, tokens, subject.restored, f"task.contexts={context}")
            found = [
                cell for rows in self._rows(subject, context) for cell in self._cells(subject, rows, context, draft)
            ]
            order = list(self.kinds).index
            cells += sorted(found, key=lambda cell: (places.index(cell["question"]), order(cell["cache"])))
        heading = {**subject.heading(), "data": subject.data.label}
        return Answer({**heading, "draft": self.draft, "cells": cells})

    def _draft(self, subject: Subject) -> LanguageModel | None:
        """The model of `draft`.

        Raises:
            ConfigError: it has another tokenizer.
            LongmixError: see `restore`.
        """
        if self.draft is None:
            return None
        words, own = subject.config, subject.restored
        draft = restore(self.draft, device=words.device, precision=words.precision, trust=words.trust)
        if draft.tokenizer.fingerprint() != own.tokenizer.fingerprint():
            raise ConfigError(f"task.draft={self.draft} has another tokenizer than the model that is evaluated.")
        return draft.model

    def _rows(self, subject: Subject, context: int) -> Iterator[Rows]:
        if isinstance(subject.data, SyntheticData):
            examples = _examples(subject, subject.data, context, self.windows, self.prompt)
            examples = _apart(examples) if self.apart else examples
            yield Rows(None, lambda: _batches(subject, examples), False, True, _count(subject, examples))
            return
        subject.check_length(context, "task.contexts")
        windows = _windows(subject, context, self.windows)
        yield Rows(None, lambda: _batches(subject, windows), False, False, _count(subject, windows))
        if not self.needles:
            return
        text, forms = text_of(subject, self.name), forms_of(subject, self.statement, self.question)
        drawn = [draw_needle(subject.data.tokenizer, [self.seed, number], forms) for number in range(self.needles)]
        hidden = [haystack_rows(one, text, subject.data.tokenizer, self.depths, context)[1:] for one in drawn]
        for question in ("after", "before"):
            parts = [
                _with_needle(one, torch.from_numpy(rows), question == "before", self.depths)
                for one, rows in zip(drawn, hidden, strict=True)
            ]
            yield Rows(question, lambda parts=parts: _moved(subject, parts), True, True, len(parts))  # type: ignore[misc]

    def _cells(
        self, subject: Subject, rows: Rows, context: int, draft: LanguageModel | None
    ) -> Iterator[dict[str, Any]]:
        """A cell for each cache. A kind that reads for a question has it before, wherever the others have it."""
        kinds = {name: kind for name, kind in self.kinds.items() if rows.question != "before" or kind.reader() is None}
        batches = tracked(rows.batches(), f"{rows.question or 'windows'} of {context}", rows.count)
        with subject.restored.autocast():
            tallies = compare(subject.model, kinds, batches, draft)
            first = next(rows.batches()).changed(lambda x: x[:1], ())
            for name, kind in kinds.items():
                reader = CachedRows(subject.model, kind, first, draft)
                milliseconds = 1000 * reader.seconds(first.ahead, self.steps)
                question = "before" if rows.question and kind.reader() is not None else rows.question
                told = _told(kind, rows.question, draft)
                yield {
                    **{"cache": name, "kind": kind.name, "settings": settings_of(kind), "context": context},
                    **{"question": question, "told": told},
                    **_numbers(tallies[name], rows),
                    "milliseconds": milliseconds,
                }

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: those of each cell, by context."""
        found = {}
        for cell in answer.report["cells"]:
            place = "_".join(word for word in (cell["question"], cell["cache"]) if word)
            for name in ("loss", "kl", "found"):
                if cell[name] is not None:
                    found[f"{name}_{place}/{cell['context']}"] = cell[name]
        return found

    def tables(self, answer: Answer) -> Iterator[RenderableType]:
        """A table for each context and place of the question; the best of their bytes are marked."""
        yield from quality_tables(answer.report)

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """Share found and loss over bytes held and read, at the longest context."""
        return draw_quality(answer.report)


def _looks_ahead(kind: CacheKind) -> bool:
    return kind.lookahead_tokens(1) is not None


def _told(kind: CacheKind, question: Question, draft: LanguageModel | None) -> str | None:
    """What a kind knows beyond the prompt when it chooses."""
    if kind.reader() is not None:
        return "truth" if question is None else "question"
    if not _looks_ahead(kind):
        return None
    return "truth" if draft is None else "draft"


def _numbers(tally: Tally, rows: Rows) -> dict[str, Any]:
    return {
        "prompt": round(tally.prompts / len(tally.found)),
        "rows": len(tally.found),
        "loss": tally.mean("nats"),
        "kl": tally.mean("divergences"),
        "found": tally.share_found() if rows.whole else tally.mean("hits") if rows.asks else None,
        "token_accuracy": tally.mean("hits"),
        **tally.bytes(),
        "by_distance": None if rows.whole else tally.by_distance(),
        "by_depth": [{"depth": depth, "found": share} for depth, share in tally.by_group()] if rows.whole else None,
    }


def _windows(subject: Subject, context: int, count: int) -> Prompted:
    """Rows of text, evenly spread over the split, of which the first half is the prompt."""
    text, half = text_of(subject, CacheQuality.name), context // 2
    rows = [stretch(text, number / count, context) for number in range(count)]
    tokens = torch.from_numpy(np.stack([np.concatenate([[text.separator_id], row]) for row in rows]).astype(np.int64))
    targets = tokens[:, half:].clone()
    targets[:, 0] = IGNORE_INDEX  # the prompt alone predicts it
    ahead = tokens[:, half:-1]
    return Prompted(tokens[:, :half], ahead, targets, ahead, ahead)


def _examples(subject: Subject, data: SyntheticData, context: int, count: int, prompt: int | None) -> Prompted:
    """Examples of synthetic data, of which the first `prompt` tokens go through the cache.

    Raises:
        ConfigError: the prompt is the whole example.
    """
    found = data.evaluation_windows(subject.split, context, count * context)
    samples = [found.sample(number) for number in range(count)]
    tokens, targets = (
        torch.from_numpy(np.stack([getattr(sample, name) for sample in samples])) for name in ("tokens", "targets")
    )
    if prompt is None:
        asked = (targets != IGNORE_INDEX).any(0).nonzero()
        prompt = (int(asked[0]) if len(asked) else 0) or context // 2
    if prompt >= context:
        raise ConfigError(f"task.prompt={prompt} leaves nothing of {context} tokens to be asked; give fewer.")
    targets = targets[:, prompt - 1 :].clone()
    targets[:, 0] = IGNORE_INDEX
    ahead = tokens[:, prompt:]
    return Prompted(tokens[:, :prompt], ahead, targets, ahead, ahead)


def _apart(rows: Prompted) -> Prompted:
    """A row for every target, in which nothing but the token in its place follows the prompt."""
    row, place = (rows.targets != IGNORE_INDEX).nonzero(as_tuple=True)
    targets = torch.stack((torch.full_like(row, IGNORE_INDEX), rows.targets[row, place]), 1)
    asking = rows.ahead[row, place - 1][:, None]
    return Prompted(rows.prompt[row], asking, targets, rows.question[row], rows.follows[row])


def _with_needle(one: Needle, rows: Tensor, before: bool, depths: list[float]) -> Prompted:
    """Rows of `haystack_rows` with the needle: the prompt with the question as its end, or without; then the value."""
    value = torch.from_numpy(one.value.astype(np.int64)).expand(len(rows), -1)
    whole = torch.cat((rows, value[:, -1:]), 1)
    prompt = whole.shape[1] - value.shape[1] - (0 if before else len(one.question))
    targets = torch.full((len(rows), 1 + whole.shape[1] - prompt), IGNORE_INDEX)
    targets[:, -1 - value.shape[1] : -1] = value
    ahead = whole[:, prompt:]
    question = ahead[:, : ahead.shape[1] - value.shape[1]]
    return Prompted(whole[:, :prompt], ahead, targets, question, ahead, question.shape[1], depths)


def _batches(subject: Subject, rows: Prompted) -> Iterator[Prompted]:
    """The rows, as many at once as the subject says."""
    each = subject.rows(rows.tokens)
    parts = [rows.changed(lambda x, at=at: x[at : at + each], ()) for at in range(0, len(rows.prompt), each)]  # type: ignore[misc]
    return _moved(subject, parts)


def _count(subject: Subject, rows: Prompted) -> int:
    return -(-len(rows.prompt) // subject.rows(rows.tokens))


def _moved(subject: Subject, parts: list[Prompted]) -> Iterator[Prompted]:
    """The same on the model's device."""
    device = subject.restored.device
    for part in parts:
        yield part.changed(lambda x: x.to(device), part.groups)
