"""`TrainingData`: everything that training and evaluation ask of data, and the Lightning datamodule for it."""

from abc import ABC, abstractmethod
from typing import Any, NotRequired, TypedDict

import lightning
import numpy as np
from torch.utils.data import DataLoader, Dataset

from longmix.batch import Batch
from longmix.config import Choice
from longmix.data.loaders import EvaluationBatches, TrainSteps, load, local_share
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.data.windows import FiniteWindows, OrderedWindows, check_seq_len
from longmix.distributed.ranks import MOST_ON_A_MACHINE
from longmix.errors import ConfigError


class DataOptions(TypedDict):
    """The options of all kinds of data; see `TrainingData`."""

    seq_len: int
    batch_size: int
    seed: int
    num_workers: NotRequired[int]
    validation_tokens: NotRequired[int | None]


class TrainingData(lightning.LightningDataModule, ABC):
    """Training windows, evaluation windows and the batches made from them. Each kind of data is a class of its own.

    A kind of data answers the abstract members. Batches, processes' shares and Lightning's hooks are the same for all.

    Nothing is read or written before `prepare_data`, `setup`, or the first use of what depends on it.

    Args:
        seq_len: tokens per training window.
        batch_size: sequences per optimizer step, over all processes together.
        seed: fixes the order of the training windows.
        num_workers: processes that read training batches ahead; 0 reads in the main process.
        validation_tokens: how much of the validation split `val_dataloader` takes, evenly spread; None for all.

    Attributes:
        start_step: first optimizer step that `train_dataloader` yields; a resumed run sets it.
        num_steps: optimizer step that `train_dataloader` ends before; None for one epoch from `start_step`.
        evaluation_batch_size: sequences per batch of `val_dataloader`, per process.
        processes_per_row: neighbouring processes that are given the same rows.

    Raises:
        ConfigError: a setting is impossible; names it.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        validation_tokens: int | None = 65536,
    ) -> None:
        super().__init__()
        check_seq_len(seq_len)
        local_share(batch_size, rank=0, world_size=1)
        if num_workers < 0:
            raise ConfigError(f"data.num_workers must not be negative, got {num_workers}")
        if num_workers > MOST_ON_A_MACHINE:
            raise ConfigError(f"data.num_workers={num_workers} must be at most {MOST_ON_A_MACHINE:,}.")
        if validation_tokens is not None and validation_tokens < 1:
            raise ConfigError(f"data.validation_tokens must be at least 1, or null for all, got {validation_tokens}")
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.validation_tokens = validation_tokens
        self.start_step = 0
        self.num_steps: int | None = None
        self.evaluation_batch_size = 1
        self.processes_per_row = 1
        self._has_room = False

    @property
    @abstractmethod
    def source(self) -> str:
        """The name of the corpus or task, for messages."""

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, "train" first."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, trained first if it is one that learns from the corpus."""

    @property
    @abstractmethod
    def expected_vocab_size(self) -> int:
        """The vocabulary size before anything is read. A tokenizer that is trained later may have fewer ids."""

    @property
    @abstractmethod
    def train_windows(self) -> OrderedWindows:
        """The training windows that all steps are cut from."""

    @property
    @abstractmethod
    def train_tokens_per_epoch(self) -> int:
        """Tokens of one epoch of training."""

    @abstractmethod
    def evaluation_windows(self, split: str, seq_len: int, max_tokens: int | None) -> FiniteWindows:
        """The windows that an evaluation of a split reads.

        Args:
            split: one of `splits`.
            seq_len: tokens per window.
            max_tokens: about so many tokens are read; None for the kind's own default.

        Raises:
            ConfigError: a setting is impossible.
            DataError: there is no such split.
        """

    def strided_windows(self, split: str, seq_len: int, max_tokens: int | None, stride: int) -> FiniteWindows:
        """Windows that overlap, see `EvaluationWindows`.

        Raises:
            ConfigError: a setting is impossible, or these data are rows of their own and no running text.
            DataError: there is no such split.
        """
        raise ConfigError(
            f"stride={stride} moves a window over running text, and each row of {self.label} is one of its own. Leave "
            "stride out."
        )

    @abstractmethod
    def prepare_data(self) -> None:
        """Make what training needs. Lightning calls it in one process of each machine; a second call does nothing."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What fixes the batch of every step, JSON-able. A run resumes only if this is unchanged."""

    @abstractmethod
    def content(self, split: str) -> dict[str, Any]:
        """What fixes the tokens of a split, JSON-able, and `tokens`, how many there are; None if they never end.

        Raises:
            DataError: there is no such split.
        """

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Settings, hashes and counts of the splits in use, JSON-able, for logs and checkpoints."""

    @property
    def reads_on(self) -> bool:
        """Whether each row of a step goes on where the row of the step before ended."""
        return False

    @property
    def positions_go_on(self) -> bool:
        """Whether the positions of a document that is cut go on from window to window in training."""
        return False

    @property
    def makes_numbers(self) -> bool:
        """Whether these are examples of a synthetic task, in which a target is met or not, and no text."""
        return False

    @property
    def label(self) -> str:
        """The name that results on these data carry."""
        return self.source

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each token id stands for, int32 [vocab_size]."""
        return self.tokenizer.token_bytes()

    def setup(self, stage: str | None = None) -> None:
        """Open the same files in every process. Called twice, it does nothing the second time.

        Raises:
            ConfigError: the stage is "fit", and training windows do not fit the data.
        """
        self.prepare_data()
        if stage == "fit" and not self._has_room:
            self._check_room()
            self._has_room = True

    def _check_room(self) -> None:
        """Refuse training windows that the data cannot fill. Examples that are made to measure fill any."""

    def train_loader(self, start_step: int, num_steps: int, rank: int = 0, world_size: int = 1) -> DataLoader[Any]:
        """A sized iterable over the optimizer steps start_step..num_steps-1; each item is this process's whole share.

        Returns:
            A loader of length `num_steps - start_step` whose items are dicts of `tokens` and `targets`, int64
            [batch_size / world_size, seq_len], and of `document_ids` and `document_starts`, which are None where
            rows are never packed; see `longmix.batch.Batch`.

        Raises:
            ConfigError: `batch_size` is not a multiple of `world_size`.
        """
        return load(self.train_steps(rank, world_size), range(start_step, num_steps), self.num_workers)

    def train_steps(self, rank: int, world_size: int) -> Dataset[Batch]:
        """One process's share of every optimizer step, by the step's number.

        Raises:
            ConfigError: `batch_size` is not a multiple of `world_size`.
        """
        return TrainSteps(self.train_windows, self.batch_size, rank, world_size, self.positions_go_on)

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer that is ready for use in place of the given one; call it before anything is read."""

    def share_files(self, other: "TrainingData") -> None:
        """Use the files that data of equal settings have opened; call it before anything is read."""

    def evaluation_loader(
        self,
        split: str,
        seq_len: int | None = None,
        batch_size: int = 1,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        stride: int | None = None,
    ) -> DataLoader[Any]:
        """A sized iterable over this process's share of a split's windows, in order; items as in `train_loader`.

        Every window comes exactly once over all processes; the last batch may be smaller.

        Args:
            split: one of `splits`.
            seq_len: tokens per window; the training length when not given.
            batch_size: sequences per batch of this process.
            max_tokens: take evenly spread windows of about so many tokens; None for the whole split.
            rank: number of this process.
            world_size: number of processes.
            stride: see `strided_windows`; None lets windows not overlap.

        Raises:
            ConfigError: a setting is impossible.
            DataError: there is no such split.
        """
        length = self.seq_len if seq_len is None else seq_len
        if stride is None:
            windows = self.evaluation_windows(split, length, max_tokens)
        else:
            windows = self.strided_windows(split, length, max_tokens, stride)
        batches = EvaluationBatches(windows, batch_size, rank, world_size)
        return load(batches, range(len(batches)), num_workers=0)

    def train_dataloader(self) -> DataLoader[Any]:
        """Lightning's hook for `train_loader`, from `start_step` to `num_steps`."""
        one_epoch = -(-self.train_windows.windows_per_epoch // self.batch_size)
        num_steps = self.start_step + one_epoch if self.num_steps is None else self.num_steps
        (rank, world_size), sharing = self._rank_and_world_size(), self.processes_per_row
        return self.train_loader(self.start_step, num_steps, rank // sharing, world_size // sharing)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Lightning's hook for `evaluation_loader` on the validation split; empty where there is none."""
        if "validation" not in self.splits:
            return []
        return self.evaluation_loader(
            "validation",
            self.seq_len,
            self.evaluation_batch_size,
            self.validation_tokens,
            *self._rank_and_world_size(),
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


INTERFACE = f"{TrainingData.__module__}.{TrainingData.__name__}"


def build_data(choice: Choice, tokenizer: Tokenizer, *, seq_len: int, batch_size: int, seed: int) -> TrainingData:
    """The data that the choice `data` of a configuration describes. Nothing is read or written.

    Args:
        choice: what to train on.
        tokenizer: how text becomes tokens.
        seq_len, batch_size, seed: see `TrainingData`.

    Raises:
        ConfigError: a setting is wrong, or what the choice names makes no `TrainingData`.
    """
    choice.check({"tokenizer", "seq_len", "batch_size", "seed"})
    lacking = sorted(getattr(choice.located(), "__abstractmethods__", ()))
    if lacking:
        raise ConfigError(f"data._target_={choice.target} lacks {', '.join(lacking)}; {INTERFACE} says what each is.")
    data = choice.build(tokenizer=tokenizer, seq_len=seq_len, batch_size=batch_size, seed=seed)
    if not isinstance(data, TrainingData):
        raise ConfigError(
            f"data._target_={choice.target} is a {type(data).__name__}; it must be a subclass of {INTERFACE}."
        )
    return data
