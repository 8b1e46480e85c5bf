"""`SyntheticData`: examples of a synthetic task in the place of a corpus, made when they are needed."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from longmix.data.corpora.corpus import SPLITS, check_split
from longmix.data.datamodule import TokenData
from longmix.data.synthetic.tasks import SyntheticTask
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import ByteTokenizer, NumberTokenizer, Tokenizer
from longmix.data.windows import Window, check_seq_len
from longmix.errors import ConfigError, DataError

EVALUATED_EXAMPLES = 1000
"""Examples that an evaluation of a split reads by default."""


@dataclass(frozen=True)
class SyntheticWindows:
    """Examples by number, each a pure function of task, seed, split and number; training has no end of them.

    Attributes:
        task: makes the examples.
        seq_len: tokens of one.
        split: "train", "validation" or "test".
        seed: of the training split; the others are the same whatever it is.
        windows_per_epoch: examples that are called an epoch.
    """

    task: SyntheticTask
    seq_len: int
    split: str
    seed: int
    windows_per_epoch: int

    def sample(self, index: int) -> Window:
        """Example number `index`, in a document of its own."""
        seed = self.seed if self.split == "train" else 0
        random = np.random.default_rng([seed, SPLITS.index(self.split), index])
        tokens, targets = self.task.example(random, self.seq_len)
        return Window(tokens.astype(np.int64), targets.astype(np.int64), np.zeros(self.seq_len, np.int32))

    def __len__(self) -> int:
        return self.windows_per_epoch

    def __getitem__(self, index: int) -> Window:
        return self.sample(index)


@dataclass(frozen=True)
class SyntheticCorpus:
    """Name and splits of a synthetic task, in the place of a corpus."""

    name: str
    splits: tuple[str, ...] = SPLITS


class SyntheticData(TokenData):
    """A synthetic task as data to train and evaluate on; see `longmix.data.synthetic.tasks`.

    Args:
        task: makes the examples.
        tokenizer: of numbers, with the task's vocabulary, in evaluation; in training there is none to choose, and
            `ByteTokenizer`, which stands where none was chosen, is passed over.
        seq_len, batch_size, seed, num_workers: see `TokenData`.
        validation_tokens: how much each validation takes.

    Raises:
        ConfigError: the task does not fit into `seq_len`, or is not the one that the model was trained on.
    """

    windows_are_text = False

    def __init__(
        self,
        task: SyntheticTask,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        validation_tokens: int | None = 65536,
    ) -> None:
        name = type(task).__name__
        super().__init__(
            SyntheticCorpus(name),  # type: ignore[arg-type]
            NumberTokenizer(task.vocab_size),
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            validation_tokens=validation_tokens,
        )
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
        self.task = task
        SyntheticWindows(task, seq_len, "train", seed, 1).sample(0)

    @functools.cached_property
    def train_windows(self) -> SyntheticWindows:  # type: ignore[override]
        """Training examples without end."""
        return SyntheticWindows(self.task, self.seq_len, "train", self.seed, 100 * EVALUATED_EXAMPLES)

    @property
    def train_tokens_per_epoch(self) -> int:
        """Tokens of a hundred thousand examples."""
        return self.train_windows.windows_per_epoch * self.seq_len

    def token_file(self, split: str) -> TokenFile:
        """Refused: examples are made when they are needed, so there is no token file.

        Raises:
            DataError: always.
        """
        raise DataError(f"examples of {self.corpus.name} are made when they are needed; there is nothing to prepare.")

    def prepare_data(self) -> None:
        """Do nothing: examples are made when they are needed."""

    def evaluation_windows(self, split: str, seq_len: int, max_tokens: int | None) -> SyntheticWindows:  # type: ignore[override]
        """The examples that an evaluation reads; a thousand without `max_tokens`."""
        check_seq_len(seq_len)
        check_split(self.corpus, split)
        count = EVALUATED_EXAMPLES if max_tokens is None else max(1, max_tokens // seq_len)
        return SyntheticWindows(self.task, seq_len, split, self.seed, count)

    def fingerprint(self) -> dict[str, Any]:
        """What fixes the batch of every step, JSON-able."""
        settings: dict[str, Any] = dataclasses.asdict(self.task)  # type: ignore[call-overload]
        place = {"seq_len": self.seq_len, "batch_size": self.batch_size, "seed": self.seed}
        return {"task": self.corpus.name, **settings, **place}

    def content(self, split: str) -> dict[str, Any]:
        """What fixes the examples of a split, JSON-able."""
        check_split(self.corpus, split)
        settings: dict[str, Any] = dataclasses.asdict(self.task)  # type: ignore[call-overload]
        return {"task": self.corpus.name, **settings, "seed": self.seed if split == "train" else 0, "tokens": None}

    def summary(self) -> dict[str, Any]:
        """The task and its settings for logs and checkpoints, JSON-able."""
        tokens = dict.fromkeys(SPLITS, EVALUATED_EXAMPLES * self.seq_len) | {"train": self.train_tokens_per_epoch}
        return {
            **self.fingerprint(),
            "corpus": self.corpus.name,
            "tokenizer": self.tokenizer.fingerprint(),
            "vocab_size": self.vocab_size,
            "splits": {split: {"tokens": count} for split, count in tokens.items()},
        }
