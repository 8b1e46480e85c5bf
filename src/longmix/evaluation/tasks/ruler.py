"""`evaluate.py task=ruler`: RULER's thirteen kinds of questions at any length (Hsieh et al. 2024, arXiv 2404.06654).

The texts are made on this machine, from the split's own text where RULER takes essays. A model goes on from the
beginning of the answer, by its first choices, without a chat's frame. A kind's score is the mean share of the answers
that its text has, in percent; of the right answers to a question about documents one is enough.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table

from longmix.data.synthetic.haystack import stretch
from longmix.data.synthetic.ruler import KINDS, SHORT, Draft, Material
from longmix.data.synthetic.ruler_questions import Questions, read_hotpotqa, read_squad
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.evaluation.prefill import context_lengths_of, text_of
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.files import sha256_of_file
from longmix.generation.session import Session
from longmix.generation.text import Row
from longmix.paths import user_path
from longmix.progress import tracked
from longmix.reporting.plots import AROUND, CELL, draw_cells, drawing, new_figure, tick_labels
from longmix.wording import did_you_mean, nearest

ALL = "all"
QUESTIONS: dict[str, tuple[str, str]] = {"qa_1": ("squad", "SQuAD"), "qa_2": ("hotpotqa", "HotpotQA")}
"""The setting with the file of each kind that needs questions, and the format of that file."""

NAMES = (*KINDS, *QUESTIONS)
MOST_SAMPLES = 10_000
FILLED = 200
"""One over the share of a context that may stay empty."""

MUCH = 0.9
"""The share of a context below which a line says how little of it is filled."""

LEAST_WORDS = 60
"""Words of an example of cwe, and of its shortest question."""

VOCABULARY_TOKENS = 1 << 20
"""Tokens of the split that words to count are taken from."""


@dataclass(frozen=True)
class Asked:
    """A question that fills a context.

    Attributes:
        draft: it scores the answer.
        prompt: with the separator in front, int64 [T].
        tokens: that the model may write.
    """

    draft: Draft
    prompt: torch.Tensor
    tokens: int


class Ruler(Task):
    """Scores of RULER's thirteen kinds of questions by the length of the context.

    Prompt and answer together fill a context without exceeding it. Questions are a function of seed, kind and number
    alone; at another length the same needles lie in more or less text.

    Args:
        tasks: kinds, or "all".
        factors: lengths as multiples of the trained one; the word `seq_len` gives them in tokens instead.
        samples: questions of each kind at each length; the paper has 500.
        seed: of questions and texts.
        squad, hotpotqa: files with the questions of qa_1 and qa_2, in the formats of SQuAD and HotpotQA.

    Raises:
        ConfigError: an impossible setting, or a kind without its file.
    """

    name = "ruler"

    def __init__(
        self,
        tasks: list[str],
        factors: list[float],
        samples: int,
        seed: int,
        squad: str | None = None,
        hotpotqa: str | None = None,
    ) -> None:
        for name in tasks:
            if name not in (ALL, *NAMES):
                meant = did_you_mean(nearest(name, (ALL, *NAMES)))
                raise ConfigError(f"task.tasks: there is no kind {name}.{meant} Kinds are: {ALL}, {', '.join(NAMES)}.")
        if not tasks:
            raise ConfigError(f"task.tasks=[] names no kind; kinds are: {ALL}, {', '.join(NAMES)}.")
        if not 1 <= samples <= MOST_SAMPLES:
            raise ConfigError(f"task.samples={samples} must be from 1 to {MOST_SAMPLES}.")
        if seed < 0:
            raise ConfigError(f"task.seed={seed} must be at least 0.")
        self.tasks, self.factors, self.samples, self.seed = tasks, factors, samples, seed
        self.squad, self.hotpotqa = squad, hotpotqa
        lacking = [kind for kind, (setting, _) in QUESTIONS.items() if getattr(self, setting) is None]
        for kind in lacking:
            if kind in tasks:
                setting, form = QUESTIONS[kind]
                raise ConfigError(
                    f"task.tasks: {kind} asks questions of {form}, which longmix does not ship; give a file in its "
                    f"format, such as task.{setting}=dev.json, or leave {kind} out."
                )
        self.kinds = [kind for kind in NAMES if kind in tasks or (ALL in tasks and kind not in lacking)]
        self.left_out = [kind for kind in lacking if ALL in tasks]

    def ask(self, subject: Subject) -> Answer:
        """Ask all questions of all kinds at every length.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "samples", "left_out", "lengths": {seq_len: {kind: score,
            "average": score}}, "filled": {seq_len: {kind: mean}}}`; scores are from 0 to 100, `filled` is the share of
            the context that prompt and answer take.

        Raises:
            ConfigError: a length has no room for a question, or the data are no text.
            DataError: the split has less text than the longest context; or a file of questions cannot be read.
        """
        lengths = context_lengths_of(subject, self.factors, "task.factors")
        maker = Maker(text_of(subject, "ruler"), subject.data.tokenizer, self.seed, self._questions())
        scores: dict[int, dict[str, float]] = {length: {} for length in lengths}
        filled: dict[int, dict[str, float]] = {length: {} for length in lengths}
        for length, kind in tracked(list(product(lengths, self.kinds)), "ruler"):
            asked = [maker.asked(kind, number, length) for number in range(self.samples)]
            texts = answered(subject, asked, length)
            scores[length][kind] = 100 * fmean(one.draft.score(text) for one, text in zip(asked, texts, strict=True))
            filled[length][kind] = fmean(len(one.prompt) + one.tokens for one in asked) / length
        for found in scores.values():
            found["average"] = fmean(found.values())
        report = {
            **subject.heading(),
            "samples": self.samples,
            "left_out": self.left_out,
            "lengths": scores,
            "filled": filled,
        }
        settings = {"lengths": lengths, "tasks": self.kinds, "samples": self.samples, "seed": self.seed}
        return Answer(report, settings | self._files())

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: the scores."""
        return super().measures(Answer({"lengths": answer.report["lengths"]}))

    def _files(self) -> dict[str, str]:
        """Digests of the files with questions."""
        given = {setting: getattr(self, setting) for kind, (setting, _) in QUESTIONS.items() if kind in self.kinds}
        return {setting: sha256_of_file(user_path(f"task.{setting}", path)) for setting, path in given.items()}

    def _questions(self) -> dict[str, Questions]:
        found = {}
        if self.squad is not None and "qa_1" in self.kinds:
            found["qa_1"] = read_squad("task.squad", self.squad)
        if self.hotpotqa is not None and "qa_2" in self.kinds:
            found["qa_2"] = read_hotpotqa("task.hotpotqa", self.hotpotqa)
        return found

    def tables(self, answer: Answer) -> Iterator[Table | str]:
        """Scores of each kind at each length."""
        report = answer.report
        table = Table(title=f"RULER, {report['samples']} questions a cell: score from 0 to 100")
        table.add_column("kind")
        for length in report["lengths"]:
            table.add_column(f"{length:,} tokens", justify="right")
        for kind in [*self.kinds, "average"]:
            table.add_row(kind, *(f"{found[kind]:.1f}" for found in report["lengths"].values()))
        yield table
        for length, found in report["filled"].items():
            for kind, share in found.items():
                if share < MUCH:
                    yield f"{kind} fills {share:.0%} of {length:,} tokens: there are no more words or documents for it"
        for kind in report["left_out"]:
            setting, form = QUESTIONS[kind]
            yield f"left out: {kind}, for which task.ruler.{setting}=FILE must name questions in the format of {form}"

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """Scores by kind and length."""
        lengths: dict[int, dict[str, float]] = answer.report["lengths"]
        rows = [*self.kinds, "average"]
        grid = np.array([[found[kind] for found in lengths.values()] for kind in rows])
        figure, (axes,) = new_figure(1, height=CELL * len(rows) + AROUND)
        draw_cells(
            axes,
            grid,
            columns=tick_labels(list(lengths)),
            rows=rows,
            limits=(0.0, 100.0),
            colours="viridis",
            words=[[f"{score:.0f}" for score in row] for row in grid],
            title="RULER: score from 0 to 100",
            x_label=f"tokens of context; trained at {answer.report['trained_seq_len']:,}",
            y_label="",
        )
        return figure


class Maker:
    """Makes questions that fill contexts.

    Args:
        text: of the split, for essays and words to count.
        tokenizer: of that text.
        seed: of all questions.
        questions: of others, by the kind that asks them.
    """

    def __init__(
        self, text: TokenFile, tokenizer: Tokenizer, seed: int, questions: dict[str, Questions] | None = None
    ) -> None:
        self.text, self.tokenizer, self.seed, self.questions = text, tokenizer, seed, questions or {}
        self._vocabulary: list[str] | None = None

    def asked(self, kind: str, number: int, length: int) -> Asked:
        """Question `number` of a kind, in as much context as fits into `length` tokens with the answer.

        Raises:
            ConfigError: none fits.
            DataError: there is too little text.
        """
        short = [False, True] if kind == "cwe" and length >= SHORT else [True]
        needed = 0
        for fewer_words in short:  # a tokenizer of bytes may have room for these alone
            draft = self._draft(kind, number, length, fewer_words)
            written = " ".join(f"{place}. {answer}" for place, answer in enumerate(draft.answers, 1))
            tokens = max(draft.tokens, 2 * len(self.tokenizer.encode(written)))
            pieces = most_that_fit(lambda n: len(self._prompt(draft, n)), length - tokens, draft.least, draft.most)  # noqa: B023
            if pieces is not None:
                return Asked(draft, torch.from_numpy(self._prompt(draft, pieces)), tokens)
            needed = len(self._prompt(draft, draft.least)) + tokens
        raise ConfigError(
            f"a context of {length} tokens has no room for {kind}: question and answer take {needed}. Give larger "
            "lengths by seq_len or task.factors, or leave the kind out of task.tasks."
        )

    def _prompt(self, draft: Draft, pieces: int) -> np.ndarray:
        """The tokens before the answer, int64 [T]."""
        return np.concatenate([[self.text.separator_id], self.tokenizer.encode(draft.prompt(pieces))]).astype(np.int64)

    def _draft(self, kind: str, number: int, length: int, fewer_words: bool) -> Draft:
        random = np.random.default_rng([self.seed, NAMES.index(kind), number])
        begins = random.random()
        if kind in self.questions:
            return self.questions[kind].draft(random)
        essay: Sequence[str] = ()
        if kind in KINDS and getattr(KINDS[kind], "haystack", "") == "essay":
            essay = self.tokenizer.decode(stretch(self.text, begins, length)).split()
        words = self._words() if kind == "cwe" else ()
        return KINDS[kind].draft(Material(random, essay, words, length, fewer_words))

    def _words(self) -> list[str]:
        """Different words of the text, of plain small letters."""
        if self._vocabulary is None:
            text = self.tokenizer.decode(stretch(self.text, 0.0, min(VOCABULARY_TOKENS, self.text.num_tokens // 2)))
            found = {word for word in text.split() if word.isascii() and word.isalpha() and word.islower()}
            self._vocabulary = sorted(word for word in found if 3 < len(word) < 13)
            if len(self._vocabulary) < LEAST_WORDS:
                raise DataError(
                    f"the split has {len(self._vocabulary)} different words of 4 to 12 small Latin letters, too few "
                    f"for the {LEAST_WORDS} of cwe; give a split with more text, or leave cwe out of task.ruler.tasks."
                )
        return self._vocabulary


def most_that_fit(size: Callable[[int], int], room: int, least: int, most: int | None) -> int | None:
    """The number of pieces whose size comes near `room` without exceeding it.

    At most a `FILLED`th of the pieces more would fit. None if not even `least` do.
    """
    if size(least) > room:
        return None
    low, high = least, None if most is None else most + 1
    step = 16
    while high is None or high - low > 1:
        probe = min(low + step, high - 1) if high is not None else low + step
        if size(probe) > room:
            high = probe
            break
        low, step = probe, 2 * step
    while high is not None and high - low > max(1, low // FILLED):
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) > room else (middle, high)
    return low


def answered(subject: Subject, asked: Sequence[Asked], length: int) -> list[str]:
    """What the model writes after each prompt by its first choices; a text ends early once it has all answers.

    Args:
        subject: holds the model.
        asked: the questions.
        length: tokens that the longest of them fill.
    """
    texts: list[str] = []
    rows = subject.rows(length)
    for start in range(0, len(asked), rows):
        texts += _continued(subject, asked[start : start + rows])
    return texts


@torch.no_grad()
def _continued(subject: Subject, asked: Sequence[Asked]) -> list[str]:
    restored = subject.restored
    session = Session(restored.model, len(asked))
    rows = [Row(restored.tokenizer, []) for _ in asked]
    left = max(one.tokens for one in asked)
    with restored.autocast():
        session.prefill([one.prompt.to(restored.device) for one in asked])
        while True:
            assert session.logits is not None
            chosen = session.logits.argmax(-1)
            for row, one, token in zip(rows, asked, chosen.tolist(), strict=True):
                if not row.ended and row.count < one.tokens and one.draft.score(row.text) < 1:
                    row.take(token)
            left -= 1
            done = (
                r.ended or r.count >= a.tokens or a.draft.score(r.text) == 1 for r, a in zip(rows, asked, strict=True)
            )
            if left == 0 or all(done):
                break
            session.step(chosen)
    for row in rows:
        row.finish()
    return [row.text for row in rows]
