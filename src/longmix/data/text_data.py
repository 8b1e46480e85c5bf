"""`TextData`: data that are read from token files; `TokenData`: windows of the text of one corpus."""

import functools
import logging
from dataclasses import asdict
from typing import Any, Unpack

from longmix.data.corpora.corpus import Corpus
from longmix.data.packing import Packing, Shares, UndividedWindows
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.data.training_data import DataOptions, TrainingData
from longmix.data.windows import EvaluationWindows, OrderedWindows, TextWindows, order_key
from longmix.errors import ConfigError, DataError
from longmix.paths import user_path

MUCH = 0.5
"""The share of dropped tokens from which on there is a warning."""

logger = logging.getLogger(__name__)


class TextOptions(DataOptions, total=False):
    """The options of `TextData` besides corpus and tokenizer; see there."""

    cache_dir: str


class TextData(TrainingData):
    """Token files of one or several corpora, made when first asked for. Subclasses say which windows are cut from them.

    Each token file is made once and kept in `cache_dir`, which any number of runs and processes may share.

    Args:
        corpus: where the documents come from.
        tokenizer: how they become tokens.
        cache_dir: folder for token files and trained tokenizers.
        options: those of `TrainingData`.

    Attributes:
        preparation: how missing token files are made.
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
        cache_dir: str = "~/.cache/longmix",
        **options: Unpack[DataOptions],
    ) -> None:
        super().__init__(**options)
        self.corpus = corpus
        self.cache_dir = user_path("data.cache_dir", cache_dir)
        self.preparation = Preparation()
        self._given_tokenizer = tokenizer
        self._token_files: dict[str, list[TokenFile]] = {}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, trained first if it is one that learns from the corpus."""
        return self._given_tokenizer.prepare(self.corpus, self.cache_dir)

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer that is ready for use in place of the given one; call it before anything is read."""
        self._given_tokenizer = tokenizer

    def share_files(self, other: TrainingData) -> None:
        """Use the token files that data of equal settings have opened; call it before anything is read."""
        if isinstance(other, TextData):
            self._token_files = other._token_files

    @property
    def expected_vocab_size(self) -> int:
        """The vocabulary size before anything is read. A tokenizer that is trained later may have fewer ids."""
        return self._given_tokenizer.vocab_size

    @property
    def source(self) -> str:
        """The name of the corpus."""
        return self.corpus.name

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the corpus."""
        return self.corpus.splits

    @property
    def part_names(self) -> list[str]:
        """The user's name for the corpus of each of `token_files`."""
        return [self.corpus.name]

    def token_files(self, split: str) -> list[TokenFile]:
        """The token files of a split, one of each corpus, made or opened when first asked for.

        Raises:
            DataError: there is no such split, or a token file cannot be made or used.
        """
        if split not in self._token_files:
            self._token_files[split] = [self._token_file_of(name, split) for name in self.part_names]
        return self._token_files[split]

    def token_file(self, split: str) -> TokenFile:
        """The one token file of a split, for a task that reads whole documents.

        Raises:
            DataError: there are several corpora; or see `token_files`.
        """
        if len(self.part_names) > 1:
            names = ", ".join(self.part_names)
            raise DataError(f"a mixture of {names} is not one text; give the data of one of them.")
        return self.token_files(split)[0]

    def _token_file_of(self, name: str, split: str) -> TokenFile:
        """The token file of one corpus, which `name` of `part_names` stands for."""
        return prepare(self.corpus, self.tokenizer, split, self.cache_dir, self.preparation)

    @property
    def train_tokens_per_epoch(self) -> int:
        """Tokens of the train splits, separators included."""
        return sum(token_file.num_tokens for token_file in self.token_files("train"))

    def prepare_data(self) -> None:
        """Make the token files that training needs; Lightning calls it in one process of each machine."""
        for split in ("train", "validation"):
            if split in self.splits:
                self.token_files(split)

    def _check_room(self) -> None:
        """Refuse windows longer than the train split; log it if they are longer than the validation split."""
        if not self.windows_are_text:
            return
        for split in ("train", "validation"):
            files = self.token_files(split) if split in self.splits else []
            for name, token_file in zip(self.part_names, files, strict=False):
                if token_file.num_tokens >= self.seq_len:
                    continue
                subject = f"the {split} split of {name}, which has {token_file.num_tokens:,} tokens"
                if split == "train":
                    raise ConfigError(
                        f"seq_len={self.seq_len} is longer than {subject}. Take at most that, or train on more text."
                    )
                logger.warning(
                    "seq_len=%d is longer than %s: its one window is not filled, so that the results of this "
                    "validation are those of a shorter context",
                    *(self.seq_len, subject),
                )

    def content(self, split: str) -> dict[str, Any]:
        """What fixes the tokens of a split, JSON-able, and `tokens`, how many there are.

        Raises:
            DataError: there is no such split.
        """
        files = self.token_files(split)
        return {"keys": [file.manifest["key"] for file in files], "tokens": sum(file.num_tokens for file in files)}

    def fingerprint(self) -> dict[str, Any]:
        """What fixes the batch of every step, JSON-able. A run resumes only if this is unchanged."""
        return {
            "train_key": order_key(self.token_file("train")),
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def summary(self) -> dict[str, Any]:
        """Settings, hashes and counts of the splits in use, JSON-able, for logs and checkpoints."""
        return {
            "corpus": self.corpus.name,
            "tokenizer": self.tokenizer.fingerprint(),
            "vocab_size": self.vocab_size,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "splits": {split: token_file.manifest for split, (token_file,) in self._token_files.items()},
        }


class PackedOptions(TextOptions, total=False):
    """The options of `PackedText` besides corpus and tokenizer; see there."""

    packing: str
    max_document_tokens: int | None
    long_documents: int | None
    long_document_visits: int
    document_mask: bool
    positions_go_on: bool


class PackedText(TextData):
    """Text as training windows that are packed with documents; see `longmix.data.packing.Packing`.

    Evaluation windows are cut from the stream of whole documents, whatever training reads.

    Args:
        corpus: where the documents come from.
        tokenizer: how they become tokens.
        packing, max_document_tokens, long_documents, long_document_visits: see `Packing`.
        document_mask, positions_go_on: likewise.
        options: see `TextData`.

    Raises:
        ConfigError: a setting that `Packing` or `TextData` refuses.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        packing: str = "stream",
        max_document_tokens: int | None = None,
        long_documents: int | None = None,
        long_document_visits: int = 2,
        document_mask: bool = True,
        positions_go_on: bool = False,
        **options: Unpack[TextOptions],
    ) -> None:
        super().__init__(corpus, tokenizer, **options)
        self.packing = Packing(
            packing, max_document_tokens, long_documents, long_document_visits, document_mask, positions_go_on
        )

    @property
    def positions_go_on(self) -> bool:
        """Whether the positions of a document that is cut go on from window to window in training."""
        return self.packing.positions_go_on

    @functools.cached_property
    def part_windows(self) -> list[TextWindows]:
        """The training windows of each of `token_files`."""
        return [self._windows_of(token_file) for token_file in self.token_files("train")]

    def _windows_of(self, token_file: TokenFile) -> TextWindows:
        return self.packing.windows(token_file, self.seq_len, self.seed)

    @functools.cached_property
    def shares(self) -> dict[str, Shares]:
        """What packing costs, by the user's name of each corpus."""
        files = self.token_files("train")
        return {
            name: self.packing.shares(windows, file, self.seq_len)
            for name, windows, file in zip(self.part_names, self.part_windows, files, strict=True)
        }

    @property
    def train_tokens_per_epoch(self) -> int:
        """Tokens of the windows of an epoch; those of the documents if windows are cut from their stream."""
        if self.packing.packing == "stream":
            return sum(self.packing.documents(file).num_tokens for file in self.token_files("train"))
        return self.seq_len * sum(windows.windows_per_epoch for windows in self.part_windows)

    def _check_room(self) -> None:
        super()._check_room()
        _ = self.part_windows  # in a contiguous order, refuses more rows than there are windows
        for name, shares in self.shares.items() if logger.isEnabledFor(logging.INFO) else ():
            logger.info("data.packing=%s of %s: %s", self.packing.packing, name, shares)
            if shares.dropped_tokens > MUCH:
                logger.warning(
                    "data.packing=%s drops most of %s, because its documents are longer than seq_len=%d; "
                    "data.max_document_tokens=%d cuts them into several documents instead",
                    *(self.packing.packing, name, self.seq_len, self.seq_len),
                )

    def fingerprint(self) -> dict[str, Any]:
        """What fixes the batch of every step, JSON-able. A run resumes only if this is unchanged."""
        return {**super().fingerprint(), **self.packing_fingerprint()}

    def packing_fingerprint(self) -> dict[str, Any]:
        """What a fingerprint has besides, if the packing is not the default one."""
        changed = self.packing.changed()
        return {"packing": changed} if changed else {}

    def summary(self) -> dict[str, Any]:
        """Settings, hashes and counts of the splits in use, JSON-able, for logs and checkpoints."""
        return {**super().summary(), **self.packing_summary()}

    def packing_summary(self) -> dict[str, Any]:
        """The packing and what it costs, once the train split has been read."""
        if "train" not in self._token_files:
            return {}
        shares = {name: asdict(shares) for name, shares in self.shares.items()}
        return {"packing": {**asdict(self.packing), "shares": shares}}


ORDERS = ("shuffled", "contiguous")


class TokenData(PackedText):
    """The text of one corpus as windows: each token is an input once an epoch, if `packing` is not told otherwise.

    Args:
        corpus: where the documents come from.
        tokenizer: how they become tokens.
        order: of the training windows: "shuffled", see `TrainWindows`, or "contiguous", see `ContiguousWindows`.
        options: see `PackedText`.

    Raises:
        ConfigError: an unknown order, one that the packing does not allow, or a setting that `PackedText` refuses.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, *, order: str = "shuffled", **options: Unpack[PackedOptions]
    ) -> None:
        super().__init__(corpus, tokenizer, **options)
        if order not in ORDERS:
            raise ConfigError(f"data.order={order} is unknown; use {' or '.join(ORDERS)}.")
        self.order = order
        if self.reads_on:
            self.packing.check_reads_on()
        self._evaluation_windows: dict[tuple[str, int, int | None, int | None], EvaluationWindows] = {}

    @property
    def reads_on(self) -> bool:
        """Whether each row of a step goes on where the row of the step before ended."""
        return self.order == "contiguous"

    @functools.cached_property
    def train_windows(self) -> OrderedWindows:
        """The training windows all steps are cut from."""
        (windows,) = self.part_windows  # a contiguous order masks by itself
        return windows if self.packing.document_mask or self.reads_on else UndividedWindows(windows)

    def _windows_of(self, token_file: TokenFile) -> TextWindows:
        if self.reads_on:
            return self.packing.contiguous(token_file, self.seq_len, self.seed, self.batch_size)
        return super()._windows_of(token_file)

    def fingerprint(self) -> dict[str, Any]:
        """What fixes the batch of every step, JSON-able. A run resumes only if this is unchanged."""
        if not self.reads_on:
            return super().fingerprint()
        return {**super().fingerprint(), "train_key": self.token_file("train").manifest["key"], "order": self.order}

    def evaluation_windows(self, split: str, seq_len: int, max_tokens: int | None) -> EvaluationWindows:
        """The windows that an evaluation of a split reads. They know how many of its tokens they cover."""
        return self._windows_of_split(split, seq_len, max_tokens, None)

    def strided_windows(self, split: str, seq_len: int, max_tokens: int | None, stride: int) -> EvaluationWindows:
        """Windows that overlap; each token is a target once."""
        return self._windows_of_split(split, seq_len, max_tokens, stride)

    def _windows_of_split(
        self, split: str, seq_len: int, max_tokens: int | None, stride: int | None
    ) -> EvaluationWindows:
        key = (split, seq_len, max_tokens, stride)
        if key not in self._evaluation_windows:
            windows = EvaluationWindows(self.token_file(split), seq_len, max_tokens, stride)
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
