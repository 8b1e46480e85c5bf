"""`StagedData`: the data of a run with stages, each of which reads its own windows."""

import functools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from longmix.batch import Batch
from longmix.config import STAGES, Course, StagePart, with_stage
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.data.training_data import TrainingData, build_data
from longmix.data.windows import FiniteWindows, OrderedWindows
from longmix.errors import ConfigError


class StagedSteps(Dataset[Batch]):
    """Item `step` is one process's share of that optimizer step of the run, whichever stage it belongs to.

    Args:
        steps: of each stage, numbered from 0 in it.
        starts: steps of the run before each stage.
    """

    def __init__(self, steps: Sequence[Dataset[Batch]], starts: Sequence[int]) -> None:
        self._steps, self._starts = steps, starts

    def __getitem__(self, step: int) -> Batch:
        number = bisect_right(self._starts, step) - 1
        return self._steps[number][step - self._starts[number]]


class StagedData(TrainingData):
    """The data of all stages. What is asked of it without a stage is that of the first one.

    The windows of a stage are numbered from 0 in it and ordered by a seed of its own, so that a batch is a function of
    seed, stage and step alone. All stages have the first one's tokenizer.

    Args:
        parts: the data of each stage.
        starts: steps of the run before each stage.

    Raises:
        ConfigError: the parts have other numbers of token ids.
    """

    def __init__(self, parts: Sequence[TrainingData], starts: Sequence[int]) -> None:
        first = parts[0]
        super().__init__(
            seq_len=first.seq_len,
            batch_size=first.batch_size,
            seed=first.seed,
            num_workers=first.num_workers,
            validation_tokens=first.validation_tokens,
        )
        for number, part in enumerate(parts):
            if part.expected_vocab_size != first.expected_vocab_size:
                raise ConfigError(
                    f"{STAGES}[{number}].data has {part.expected_vocab_size} tokens and the first stage "
                    f"{first.expected_vocab_size}: the model is one, and so must be its tokens."
                )
            if part.makes_numbers != first.makes_numbers:
                raise ConfigError(f"{STAGES}[{number}].data: a run trains on text or on a synthetic task, not on both.")
        self.parts, self.starts = list(parts), list(starts)

    @property
    def first(self) -> TrainingData:
        """The data of the first stage."""
        return self.parts[0]

    @property
    def source(self) -> str:
        """The names of all corpora or tasks."""
        return ", ".join(dict.fromkeys(part.source for part in self.parts))

    @property
    def reads_on(self) -> bool:
        """Whether each row of a step goes on where the row of the step before ended; in no stage's first step."""
        return self.first.reads_on

    @property
    def makes_numbers(self) -> bool:
        """Whether these are examples of a synthetic task."""
        return self.first.makes_numbers

    @property
    def label(self) -> str:
        """The names that results on these data carry."""
        return ", ".join(dict.fromkeys(part.label for part in self.parts))

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that all stages have."""
        return tuple(split for split in self.first.splits if all(split in part.splits for part in self.parts))

    @property
    def tokenizer(self) -> Tokenizer:
        """The first stage's, which all have."""
        return self.first.tokenizer

    @property
    def expected_vocab_size(self) -> int:
        """The vocabulary size before anything is read."""
        return self.first.expected_vocab_size

    @property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each token id stands for, int32 [vocab_size]."""
        return self.first.token_bytes

    @property
    def train_windows(self) -> OrderedWindows:
        """The first stage's training windows."""
        return self.first.train_windows

    @property
    def train_tokens_per_epoch(self) -> int:
        """Tokens of one epoch of the first stage's data."""
        return self.first.train_tokens_per_epoch

    def evaluation_windows(self, split: str, seq_len: int, max_tokens: int | None) -> FiniteWindows:
        """The windows that an evaluation of the first stage's data reads."""
        return self.first.evaluation_windows(split, seq_len, max_tokens)

    def strided_windows(self, split: str, seq_len: int, max_tokens: int | None, stride: int) -> FiniteWindows:
        """Windows of the first stage's data that overlap."""
        return self.first.strided_windows(split, seq_len, max_tokens, stride)

    def prepare_data(self) -> None:
        """Make what all stages need, so that none of them fails for it hours later."""
        self.first.prepare_data()
        for part in self.parts[1:]:
            part.use_tokenizer(self.first.tokenizer)
            part.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Open the same files in every process.

        Raises:
            ConfigError: the windows of one of the stages do not fit the data; names the stage.
        """
        self.prepare_data()
        for number, part in enumerate(self.parts):
            with_stage(number, functools.partial(part.setup, stage))

    def train_steps(self, rank: int, world_size: int) -> Dataset[Batch]:
        """One process's share of every step."""
        return StagedSteps([part.train_steps(rank, world_size) for part in self.parts], self.starts)

    def fingerprint(self) -> dict[str, Any]:
        """What fixes the batch of every step of each stage, JSON-able."""
        return {STAGES: [part.fingerprint() for part in self.parts]}

    def content(self, split: str) -> dict[str, Any]:
        """What fixes the tokens of a split of the first stage's data, JSON-able."""
        return self.first.content(split)

    def summary(self) -> dict[str, Any]:
        """Settings, hashes and counts of the first stage's data, and of what others have besides, JSON-able."""
        return {**self.first.summary(), **self.fingerprint()}


def data_of(course: Course, tokenizer: Tokenizer) -> TrainingData:
    """The data of a run. Nothing is read or written.

    Args:
        course: the run's stages.
        tokenizer: how text becomes tokens.

    Raises:
        ConfigError: a setting is wrong; of a run with stages, the message names the stage.
    """

    def of(part: StagePart) -> TrainingData:
        config = part.config
        return build_data(
            config.data, tokenizer, seq_len=config.seq_len, batch_size=config.batch_size, seed=part.data_seed
        )

    if not course.staged:
        return of(course.parts[0])
    parts: list[TrainingData] = []
    for part in course.parts:
        data = with_stage(part.number, functools.partial(of, part))
        for earlier, other in zip(course.parts, parts, strict=False):
            if earlier.config.data == part.config.data:
                data.share_files(other)
                break
        parts.append(data)
    return StagedData(parts, [part.start for part in course.parts])


def by_stage(fingerprint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fingerprints of the data of each stage; of a run without stages, which is one stage, its own."""
    stages = fingerprint.get(STAGES)
    if isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages):
        return stages
    return [dict(fingerprint)]
