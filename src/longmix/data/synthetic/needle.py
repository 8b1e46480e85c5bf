"""`NeedleData`: needle in a haystack to train on, real text with facts hidden in it and questions after it.

The words are those of `evaluate.py task=needle`, after RULER (arXiv 2404.06654). A row of the training split is a
separator, a stretch of text with the needles' statements somewhere between its sentences, and then question and value
of every needle.
"""

import functools
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from longmix.batch import IGNORE_INDEX
from longmix.data.corpora.corpus import Corpus, check_split
from longmix.data.synthetic.base import EVALUATED_EXAMPLES, SyntheticWindows
from longmix.data.synthetic.haystack import KEYS, LARGEST_VALUE, QUESTION, STATEMENT, Forms, draw_value, hidden, stretch
from longmix.data.synthetic.tasks import Example
from longmix.data.text_data import TextData, TextOptions
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.data.windows import check_seq_len
from longmix.errors import ConfigError


@dataclass(frozen=True)
class NeedleRows:
    """Makes rows from the text of one split; a `SyntheticTask`.

    Attributes:
        text: where haystacks are cut from, across documents.
        tokenizer: of that text.
        forms: the words of statements and questions.
        counts: how many needles a row hides; rows take each number equally often.
        answer_share: share of the values' tokens among those that are to be predicted; None predicts every token.
    """

    text: TokenFile
    tokenizer: Tokenizer
    forms: Forms
    counts: list[int]
    answer_share: float | None

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        return self.tokenizer.vocab_size

    def example(self, random: np.random.Generator, length: int) -> Example:
        """One row of `length` tokens. Keys differ; the order of the questions is independent of the depths.

        Raises:
            ConfigError: the needles leave no room for text.
            DataError: the split has less text than a row.
        """
        keys = random.choice(KEYS, int(random.choice(self.counts)), replace=False)
        needles = [self.forms.needle(self.tokenizer, str(key), draw_value(random)) for key in keys]
        statements = [one.statement for one in needles]
        end = [part for one in needles for part in (one.question, one.value)]
        taken = sum(map(len, statements + end))
        _require_room(len(needles), taken, length)
        haystack = stretch(self.text, random.random(), length - taken)
        depths = random.random(len(needles)).tolist()
        parts = [np.array([self.text.separator_id]), hidden(haystack, statements, depths, self.tokenizer), *end]
        is_value = np.repeat([False, False, *[False, True] * len(needles)], [len(part) for part in parts])
        row = np.concatenate(parts)
        wanted = is_value[1:]
        others = np.flatnonzero(~wanted)
        wanted[random.choice(others, self._others_for(wanted.sum(), len(others)), replace=False)] = True
        return Example(row[:-1], np.where(wanted, row[1:], IGNORE_INDEX))

    def _others_for(self, answers: int, most: int) -> int:
        """The number of tokens, besides `answers`, that the model has to predict."""
        if self.answer_share is None:
            return most
        return min(most, round(answers * (1 / self.answer_share - 1)))


def _require_room(needles: int, taken: int, seq_len: int) -> None:
    if taken >= seq_len:
        raise ConfigError(
            f"seq_len={seq_len} has no room for a haystack: needles and questions, {needles} of each, take {taken} "
            "tokens. Give a larger seq_len, fewer data.needles, or a shorter data.statement and data.question."
        )


class NeedleData(TextData):
    """Rows with facts hidden in the text of a corpus as data to train and evaluate on; see the module.

    A row is a pure function of seed, split and number. All but the training split predict values alone, so that their
    loss and `task=accuracy` are of what is recalled.

    Args:
        corpus: gives the text.
        tokenizer: how it becomes tokens.
        needles: how many a row hides, or several numbers that rows take equally often.
        answer_share: share of the values' tokens among those that training predicts; the others are drawn at random. 1
            trains on nothing but answers; None on every token, of which values are so few in a long row that recall is
            learned late or never.
        statement, question: see `Forms`.
        options: see `TextData`.

    Raises:
        ConfigError: an impossible setting; from `prepare_data`: needles and questions take more than `seq_len` tokens.
    """

    windows_are_text = False

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        needles: int | list[int] = 1,
        answer_share: float | None = 0.5,
        statement: str = STATEMENT,
        question: str = QUESTION,
        **options: Unpack[TextOptions],
    ) -> None:
        super().__init__(corpus, tokenizer, **options)
        self.counts = needles if isinstance(needles, list) else [needles]
        self.answer_share = answer_share
        self.forms = Forms(statement, question)
        self.forms.check("data")
        if not self.counts or min(self.counts) < 1 or max(self.counts) > len(KEYS):
            raise ConfigError(f"data.needles={needles} must be from 1 to {len(KEYS)}, the number of keys.")
        if answer_share is not None and not 0 < answer_share <= 1:
            raise ConfigError(
                f"data.answer_share={answer_share} must be above 0 and at most 1; null predicts every token."
            )

    @property
    def label(self) -> str:
        """The name that results on these data carry."""
        return f"needles_{self.corpus.name}"

    @functools.cached_property
    def train_windows(self) -> SyntheticWindows:
        """Training rows; an epoch has as many rows as the text would fill."""
        rows = -(-self.train_tokens_per_epoch // self.seq_len)
        return SyntheticWindows(self._rows("train", self.answer_share), self.seq_len, "train", self.seed, rows)

    def _rows(self, split: str, answer_share: float | None) -> NeedleRows:
        return NeedleRows(self.token_file(split), self.tokenizer, self.forms, self.counts, answer_share)

    def prepare_data(self) -> None:
        """Make the token files, then refuse rows that are too short for the longest keys."""
        super().prepare_data()
        needles = [self.forms.needle(self.tokenizer, key, LARGEST_VALUE) for key in KEYS]
        sizes = sorted(len(one.statement) + len(one.question) + len(one.value) for one in needles)
        _require_room(max(self.counts), sum(sizes[-max(self.counts) :]), self.seq_len)

    def evaluation_windows(self, split: str, seq_len: int, max_tokens: int | None) -> SyntheticWindows:
        """The rows that an evaluation reads; a thousand without `max_tokens`."""
        check_seq_len(seq_len)
        check_split(self.corpus, split)
        count = EVALUATED_EXAMPLES if max_tokens is None else max(1, max_tokens // seq_len)
        return SyntheticWindows(self._rows(split, 1.0), seq_len, split, self.seed, count)

    def fingerprint(self) -> dict[str, Any]:
        """What fixes the batch of every step, JSON-able."""
        words = {"statement": self.forms.statement, "question": self.forms.question}
        return {**super().fingerprint(), "needles": self.counts, "answer_share": self.answer_share, **words}

    def content(self, split: str) -> dict[str, Any]:
        """What fixes the rows of a split, JSON-able."""
        words = {"statement": self.forms.statement, "question": self.forms.question}
        return {**super().content(split), "needles": self.counts, **words}

    def summary(self) -> dict[str, Any]:
        """The task, its settings and the text for logs and checkpoints, JSON-able."""
        return {**super().summary(), **self.fingerprint()}
