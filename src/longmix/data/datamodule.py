"""`TokenData`: everything a training run asks of its data, behind one Lightning datamodule."""

import functools
import logging
from typing import Any, TypedDict

import lightning
import numpy as np
from torch.utils.data import DataLoader

from longmix.data.corpora.corpus import Corpus
from longmix.data.corpora.local_files import user_path
from longmix.data.loaders import EvaluationBatches, TrainSteps, load, local_share
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.data.windows import EvaluationWindows, TrainWindows, check_seq_len, order_key
from longmix.errors import ConfigError

logger = logging.getLogger(__name__)


class DataOptions(TypedDict, total=False):
    """What `TokenData` takes besides corpus and tokenizer; see there."""

    seq_len: int
    batch_size: int
    seed: int
    cache_dir: str
    num_workers: int
    validation_tokens: int | None


class TokenData(lightning.LightningDataModule):
    """Token files of a corpus and the batches made from them.

    Nothing is read or written before `prepare_data`, `setup`, or the first use of what depends on it; each piece of
    work is done once and kept in `cache_dir`, which any number of runs and ranks may share.

    Args:
        corpus: where the documents come from.
        tokenizer: how they become tokens.
        seq_len: tokens per training window.
        batch_size: sequences per optimizer step, over all ranks together.
        seed: fixes the order of the training windows.
        cache_dir: folder for token files and trained tokenizers.
        num_workers: processes that read training batches ahead; 0 reads in the main process.
        validation_tokens: how much of the validation split `val_dataloader` takes, evenly spread; None for all.

    Attributes:
        start_step: first optimizer step `train_dataloader` yields; a resumed run sets it.
        num_steps: optimizer step `train_dataloader` ends before; None for one epoch from `start_step`.
        evaluation_batch_size: sequences per batch of `val_dataloader`, per rank.
        processes_per_row: neighbouring ranks that are given the same rows.
        preparation: how token files are made that are not there.
        windows_are_text: a training window is a piece of the train split, which must therefore be longer.

    Raises:
        ConfigError: a setting is impossible; names it.
        DataError: from the methods: the corpus, tokenizer or a cached file cannot be used.
    """

    windows_are_text = True

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        cache_dir: str = "~/.cache/longmix",
        num_workers: int = 0,
        validation_tokens: int | None = 65536,
    ) -> None:
        super().__init__()
        check_seq_len(seq_len)
        local_share(batch_size, rank=0, world_size=1)
        if num_workers < 0:
            raise ConfigError(f"data.num_workers must not be negative, got {num_workers}")
        if validation_tokens is not None and validation_tokens < 1:
            raise ConfigError(f"data.validation_tokens must be at least 1, or null for all, got {validation_tokens}")
        self.corpus = corpus
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.cache_dir = user_path("data.cache_dir", cache_dir)
        self.num_workers = num_workers
        self.validation_tokens = validation_tokens
        self.start_step = 0
        self.num_steps: int | None = None
        self.evaluation_batch_size = 1
        self.processes_per_row = 1
        self.preparation = Preparation()
        self._given_tokenizer = tokenizer
        self._has_room = False
        self._token_files: dict[str, TokenFile] = {}
        self._evaluation_windows: dict[tuple[str, int, int | None], EvaluationWindows] = {}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, trained first if it is one that learns from the corpus."""
        return self._given_tokenizer.prepare(self.corpus, self.cache_dir)

    @property
    def expected_vocab_size(self) -> int:
        """The vocabulary size before anything is read. A tokenizer that is trained later may have fewer ids."""
        return self._given_tokenizer.vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes each token id stands for, int32 [vocab_size]."""
        return self.tokenizer.token_bytes()

    @property
    def label(self) -> str:
        """The name that results on these data carry."""
        return self.corpus.name

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the corpus."""
        return self.corpus.splits

    @property
    def train_tokens_per_epoch(self) -> int:
        """Tokens of the train split, separators included."""
        return self.token_file("train").num_tokens

    @functools.cached_property
    def train_windows(self) -> TrainWindows:
        """The training windows all steps are cut from."""
        return TrainWindows(self.token_file("train"), self.seq_len, self.seed)

    def token_file(self, split: str) -> TokenFile:
        """The token file of a split, made when first asked for."""
        if split not in self._token_files:
            self._token_files[split] = prepare(self.corpus, self.tokenizer, split, self.cache_dir, self.preparation)
        return self._token_files[split]

    @property
    def part_names(self) -> list[str]:
        """The user's name for the corpus of each of `token_files`."""
        return [self.corpus.name]

    def token_files(self, split: str) -> list[TokenFile]:
        """All token files of a split. A single corpus has one."""
        return [self.token_file(split)]

    def prepare_data(self) -> None:
        """Make the token files that training needs; Lightning calls it on one rank of each node."""
        for split in ("train", "validation"):
            if split in self.splits:
                self.token_files(split)

    def setup(self, stage: str | None = None) -> None:
        """Open the same files on every rank. Called twice, it does nothing the second time.

        Raises:
            ConfigError: the stage is "fit", and there is less text to train on than one window holds.
        """
        self.prepare_data()
        if stage == "fit" and self.windows_are_text and not self._has_room:
            self._check_room()
            self._has_room = True

    def _check_room(self) -> None:
        """Refuse windows longer than the train split; log it if they are longer than the validation split."""
        for split in ("train", "validation"):
            files = self.token_files(split) if split in self.splits else []
            for name, token_file in zip(self.part_names, files, strict=False):
                if token_file.num_tokens >= self.seq_len:
                    continue
                place = f"the {split} split of {name}, which has {token_file.num_tokens:,} tokens"
                if split == "train":
                    raise ConfigError(
                        f"seq_len={self.seq_len} is longer than {place}. Take at most that, or train on more text."
                    )
                logger.warning(
                    "seq_len=%d is longer than %s: its one window is not filled, so that the figures of this "
                    "validation are those of a shorter context",
                    *(self.seq_len, place),
                )

    def fingerprint(self) -> dict[str, Any]:
        """What fixes the batch of every step, JSON-able. A run resumes only if this is unchanged."""
        return {
            "train_key": order_key(self.token_file("train")),
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def content(self, split: str) -> dict[str, Any]:
        """What fixes the tokens of a split, JSON-able, and `tokens`, how many there are (None: as many as one likes).

        Raises:
            DataError: there is no such split.
        """
        files = self.token_files(split)
        return {"keys": [file.manifest["key"] for file in files], "tokens": sum(file.num_tokens for file in files)}

    def summary(self) -> dict[str, Any]:
        """Settings, hashes and counts of the splits in use, JSON-able, for logs and checkpoints."""
        return {
            "corpus": self.corpus.name,
            "tokenizer": self.tokenizer.fingerprint(),
            "vocab_size": self.vocab_size,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "splits": {split: token_file.manifest for split, token_file in self._token_files.items()},
        }

    def evaluation_windows(self, split: str, seq_len: int, max_tokens: int | None) -> EvaluationWindows:
        """The windows that an evaluation of a split reads. They know how many of its tokens they cover."""
        key = (split, seq_len, max_tokens)
        if key not in self._evaluation_windows:
            windows = EvaluationWindows(self.token_file(split), seq_len, max_tokens)
            logger.info(
                "evaluation covers %s of the %s tokens of the %s split, in %s windows of %s",
                f"{windows.covered_tokens:,}",
                f"{windows.total_tokens:,}",
                split,
                f"{len(windows):,}",
                f"{seq_len:,}",
            )
            self._evaluation_windows[key] = windows
        return self._evaluation_windows[key]

    def train_loader(self, start_step: int, num_steps: int, rank: int = 0, world_size: int = 1) -> DataLoader[Any]:
        """A sized iterable over the optimizer steps start_step..num_steps-1; each item is this rank's whole share.

        Returns:
            A loader of length `num_steps - start_step` whose items are dicts of `tokens` and `targets`, int64
            [batch_size / world_size, seq_len], and `document_ids`, int32 of the same shape or None where no row
            holds a document boundary.

        Raises:
            ConfigError: `batch_size` is not a multiple of `world_size`.
        """
        steps = TrainSteps(self.train_windows, self.batch_size, rank, world_size)
        return load(steps, range(start_step, num_steps), self.num_workers)

    def evaluation_loader(
        self,
        split: str,
        seq_len: int | None = None,
        batch_size: int = 1,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> DataLoader[Any]:
        """A sized iterable over this rank's share of a split's windows, in order; items as in `train_loader`.

        Every window comes exactly once over all ranks; the last batch may be smaller.

        Args:
            split: one of `splits`.
            seq_len: tokens per window; the training length when not given.
            batch_size: sequences per batch on this rank.
            max_tokens: take evenly spread windows of about so many tokens; None for the whole split.
            rank: this rank.
            world_size: number of ranks.

        Raises:
            ConfigError: a setting is impossible.
            DataError: there is no such split.
        """
        windows = self.evaluation_windows(split, self.seq_len if seq_len is None else seq_len, max_tokens)
        batches = EvaluationBatches(windows, batch_size, rank, world_size)
        return load(batches, range(len(batches)), num_workers=0)

    def train_dataloader(self) -> DataLoader[Any]:
        """Lightning's hook for `train_loader`, from `start_step` to `num_steps`."""
        one_epoch = -(-self.train_windows.windows_per_epoch // self.batch_size)
        num_steps = self.start_step + one_epoch if self.num_steps is None else self.num_steps
        place, sharing = self._place(), self.processes_per_row
        return self.train_loader(self.start_step, num_steps, place["rank"] // sharing, place["world_size"] // sharing)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Lightning's hook for `evaluation_loader` on the validation split; empty where the corpus has none."""
        if "validation" not in self.splits:
            return []
        return self.evaluation_loader(
            "validation", self.seq_len, self.evaluation_batch_size, self.validation_tokens, **self._place()
        )

    def _place(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
