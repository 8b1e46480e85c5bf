"""`SyntheticData`: examples of a synthetic task in place of a corpus, made when they are needed."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from longmix.data.corpora.corpus import SPLITS, require_split
from longmix.data.documents import Window
from longmix.data.synthetic.tasks import SyntheticTask
from longmix.data.tokens.tokenizers import ByteTokenizer, NumberTokenizer, Tokenizer
from longmix.data.training_data import DataOptions, TrainingData
from longmix.data.windows import check_seq_len
from longmix.errors import ConfigError

EVALUATED_EXAMPLES = 1000
"""Examples that an evaluation of a split reads by default."""


@dataclass(frozen=True)
class SyntheticWindows:
    """Examples by number, each a pure function of task, seed, split and number.

    Attributes:
        task: makes the examples.
        seq_len: tokens of one.
        split: "train", "validation" or "test".
        seed: of the training split; the others are the same whatever it is.
        windows_per_epoch: examples that are called an epoch.
        repeats: whether the example after an epoch is the first again; else there is no end of new ones.
    """

    task: SyntheticTask
    seq_len: int
    split: str
    seed: int
    windows_per_epoch: int
    repeats: bool = False

    def sample(self, index: int) -> Window:
        """Example number `index`, in a document of its own."""
        if self.repeats:
            index %= self.windows_per_epoch
        seed = self.seed if self.split == "train" else 0
        random = np.random.default_rng([seed, SPLITS.index(self.split), index])
        tokens, targets = self.task.example(random, self.seq_len)
        return Window(tokens.astype(np.int64), targets.astype(np.int64), None)

    def __len__(self) -> int:
        return self.windows_per_epoch

    def __getitem__(self, index: int) -> Window:
        return self.sample(index)


class SyntheticData(TrainingData):
    """A synthetic task as data to train and evaluate on; see `longmix.data.synthetic.tasks`.

    Args:
        task: makes the examples.
        tokenizer: of numbers, with the task's vocabulary, in evaluation; in training there is none to choose, and
            `ByteTokenizer`, which stands where none was chosen, is passed over.
        train_examples: training reads so many examples again and again, in one order; None never repeats one.
        options: those of `TrainingData`; `validation_tokens` is how much each validation takes.

    Raises:
        ConfigError: the task does not fit into `seq_len`, or is not the one that the model was trained on; or there are
            no training examples.
    """

    def __init__(
        self,
        task: SyntheticTask,
        tokenizer: Tokenizer,
        train_examples: int | None = None,
        **options: Unpack[DataOptions],
    ) -> None:
        super().__init__(**options)
        if not isinstance(tokenizer, NumberTokenizer | ByteTokenizer):
            raise ConfigError(
                f"data.task makes numbers, not text, so that a tokenizer of text ({type(tokenizer).__name__}) has no "
                "use: leave tokenizer= out, and begin from no model of text."
            )
        if isinstance(tokenizer, NumberTokenizer) and tokenizer.vocab_size != task.vocab_size:
            raise ConfigError(
                f"data.task has {task.vocab_size} tokens and the model {tokenizer.vocab_size}; give the task it was "
                "trained on."
            )
        if train_examples is not None and train_examples < 1:
            raise ConfigError(f"data.train_examples={train_examples} must be at least 1, or null to repeat none.")
        self.task, self.train_examples = task, train_examples
        self._tokenizer = NumberTokenizer(task.vocab_size)
        SyntheticWindows(task, self.seq_len, "train", self.seed, 1).sample(0)

    @property
    def source(self) -> str:
        """The name of the task's class."""
        return type(self.task).__name__

    @property
    def makes_numbers(self) -> bool:
        """They do: the tokens are numbers."""
        return True

    @property
    def splits(self) -> tuple[str, ...]:
        """Any task has all splits."""
        return SPLITS

    @property
    def tokenizer(self) -> NumberTokenizer:
        """Writes the task's tokens as numbers."""
        return self._tokenizer

    @property
    def expected_vocab_size(self) -> int:
        """The task's number of tokens."""
        return self.task.vocab_size

    @functools.cached_property
    def train_windows(self) -> SyntheticWindows:
        """Training examples, without end unless `train_examples` are to be repeated."""
        count, repeats = self.train_examples or 100 * EVALUATED_EXAMPLES, self.train_examples is not None
        return SyntheticWindows(self.task, self.seq_len, "train", self.seed, count, repeats)

    @property
    def train_tokens_per_epoch(self) -> int:
        """Tokens of the training examples; of a hundred thousand where there is no end of them."""
        return self.train_windows.windows_per_epoch * self.seq_len

    def prepare_data(self) -> None:
        """Do nothing: examples are made when they are needed."""

    def evaluation_windows(self, split: str, seq_len: int, max_tokens: int | None) -> SyntheticWindows:
        """The examples that an evaluation reads; a thousand without `max_tokens`."""
        check_seq_len(seq_len)
        require_split(split, self.source, SPLITS)
        count = EVALUATED_EXAMPLES if max_tokens is None else max(1, max_tokens // seq_len)
        return SyntheticWindows(self.task, seq_len, split, self.seed, count)

    def fingerprint(self) -> dict[str, Any]:
        """What fixes the batch of every step, JSON-able."""
        settings: dict[str, Any] = dataclasses.asdict(self.task)
        sizes = {"seq_len": self.seq_len, "batch_size": self.batch_size, "seed": self.seed}
        repeated = {} if self.train_examples is None else {"train_examples": self.train_examples}
        return {"task": self.source, **settings, **sizes, **repeated}

    def content(self, split: str) -> dict[str, Any]:
        """What fixes the examples of a split, JSON-able."""
        require_split(split, self.source, SPLITS)
        settings: dict[str, Any] = dataclasses.asdict(self.task)
        return {"task": self.source, **settings, "seed": self.seed if split == "train" else 0, "tokens": None}

    def summary(self) -> dict[str, Any]:
        """The task and its settings for logs and checkpoints, JSON-able."""
        tokens = dict.fromkeys(SPLITS, EVALUATED_EXAMPLES * self.seq_len) | {"train": self.train_tokens_per_epoch}
        return {
            **self.fingerprint(),
            "corpus": self.source,
            "tokenizer": self.tokenizer.fingerprint(),
            "vocab_size": self.vocab_size,
            "splits": {split: {"tokens": count} for split, count in tokens.items()},
        }
