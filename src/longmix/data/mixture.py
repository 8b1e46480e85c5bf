"""Several corpora in one stream of training windows, each with its share, without a position to remember."""

import functools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Unpack

import numpy as np

from longmix.data.corpora.corpus import SPLITS, Corpus, check_split
from longmix.data.documents import Window
from longmix.data.packing import UndividedWindows
from longmix.data.text_data import PackedOptions, PackedText
from longmix.data.tokens.preparation import prepare
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.data.windows import EvaluationWindows, OrderedWindows, check_seq_len, order_key, permutation
from longmix.errors import ConfigError, settings_at

BLOCK = 1000
"""Windows among which every corpus has exactly its share, rounded; shares are kept to a thousandth."""

STREAM = 1 << 40
"""The random stream that orders windows within a block; epochs of windows use the streams from 0."""


class JoinedCorpus:
    """The documents of several corpora one after the other, as a tokenizer is trained on them.

    Args:
        corpora: by name.

    Raises:
        ConfigError: there are none.
    """

    name = "mixture"

    def __init__(self, corpora: Mapping[str, Corpus]) -> None:
        if not corpora:
            raise ConfigError("data.corpora is empty; name at least one corpus.")
        self.corpora = dict(corpora)
        self.splits = tuple(split for split in SPLITS if all(split in corpus.splits for corpus in corpora.values()))

    def documents(self, split: str) -> Iterator[str]:
        """The documents of all corpora, one corpus after the other."""
        check_split(self, split)
        return (text for corpus in self.corpora.values() for text in corpus.documents(split))

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprints of all corpora."""
        return {"kind": "JoinedCorpus", "corpora": {name: part.fingerprint() for name, part in self.corpora.items()}}


class MixedWindows:
    """Training windows of several corpora; which one comes when depends on nothing but seed, shares and index.

    Of every `BLOCK` windows each corpus has as many as its share says, in a random order, and a corpus goes through its
    own windows epoch by epoch as `TrainWindows` does alone.

    Args:
        sources: windows of each corpus.
        counts: how many windows of a block each corpus has.
        seed: of the order within blocks.

    Attributes:
        windows_per_epoch: of all corpora together.
    """

    def __init__(self, sources: Sequence[OrderedWindows], counts: list[int], seed: int) -> None:
        self.windows_per_epoch = sum(source.windows_per_epoch for source in sources)
        self._sources, self._seed = sources, seed
        self._ends = list(accumulate(counts))
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def sample(self, global_index: int) -> Window:
        """The window at a running index that goes through the epochs one after the other."""
        number, index = self.part_and_index(global_index)
        return self._sources[number].sample(index)

    def part_and_index(self, global_index: int) -> tuple[int, int]:
        """The number of the corpus that a window comes from, and the window's running index there."""
        block, within = divmod(global_index, BLOCK)
        if self._order[0] != block:
            self._order = block, permutation(BLOCK, self._seed, STREAM + block)
        drawn = int(self._order[1][within])
        number = bisect_right(self._ends, drawn)
        start = self._ends[number - 1] if number else 0
        return number, block * (self._ends[number] - start) + drawn - start


class MixedEvaluation:
    """Evaluation windows of several corpora, one corpus after the other."""

    def __init__(self, parts: list[EvaluationWindows]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))
        self.covered_tokens = sum(part.covered_tokens for part in parts)
        self.total_tokens = sum(part.total_tokens for part in parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Window:
        number = bisect_right(self._ends, index)
        return self._parts[number][index - (self._ends[number - 1] if number else 0)]


class MixtureData(PackedText):
    """Several corpora, each with its share of the training windows, as one source of data; see `PackedText`.

    Each corpus has token files of its own, so that another share or another corpus beside it prepares nothing anew.
    Evaluation takes of each corpus about its share of the tokens, or all tokens of all.

    Args:
        corpora: by name.
        weights: share of each by the same names; they need not add up to one.
        tokenizer: shared; if it is trained, on all of them.
        options: see `PackedText`.

    Raises:
        ConfigError: weights and corpora differ in name, or a weight is too small or negative.
    """

    def __init__(
        self,
        corpora: dict[str, Corpus],
        weights: dict[str, float],
        tokenizer: Tokenizer,
        **options: Unpack[PackedOptions],
    ) -> None:
        super().__init__(JoinedCorpus(corpora), tokenizer, **options)
        if set(weights) != set(corpora):
            different = sorted(set(weights) ^ set(corpora))
            raise ConfigError(f"data.weights and data.corpora must have the same names; {', '.join(different)} differ.")
        self.corpora, self.weights = corpora, {name: weights[name] for name in corpora}
        self.counts = shared_out(self.weights)

    @property
    def part_names(self) -> list[str]:
        """The names of the corpora, as the configuration has them."""
        return list(self.corpora)

    def _token_file_of(self, name: str, split: str) -> TokenFile:
        with settings_at(f"data.corpora.{name}", "data.corpus"):
            return prepare(self.corpora[name], self.tokenizer, split, self.cache_dir, self.preparation, label=name)

    @functools.cached_property
    def train_windows(self) -> OrderedWindows:
        """The training windows of all corpora, mixed by their shares; each corpus is packed alone."""
        windows = MixedWindows(self.part_windows, list(self.counts.values()), self.seed)
        return windows if self.packing.document_mask else UndividedWindows(windows)

    def evaluation_windows(self, split: str, seq_len: int, max_tokens: int | None) -> MixedEvaluation:
        """The windows of a split, one corpus after the other; each corpus has its share of `max_tokens`."""
        return self._windows_of_split(split, seq_len, max_tokens, None)

    def strided_windows(self, split: str, seq_len: int, max_tokens: int | None, stride: int) -> MixedEvaluation:
        """Windows that overlap within each corpus."""
        return self._windows_of_split(split, seq_len, max_tokens, stride)

    def _windows_of_split(
        self, split: str, seq_len: int, max_tokens: int | None, stride: int | None
    ) -> MixedEvaluation:
        check_seq_len(seq_len)
        check_split(self.corpus, split)
        shares = [None if max_tokens is None else max(1, max_tokens * count // BLOCK) for count in self.counts.values()]
        files = self.token_files(split)
        return MixedEvaluation(
            [EvaluationWindows(file, seq_len, share, stride) for file, share in zip(files, shares, strict=True)]
        )

    def fingerprint(self) -> dict[str, Any]:
        """What fixes the batch of every step, JSON-able."""
        keys = [order_key(token_file) for token_file in self.token_files("train")]
        sizes = {"seq_len": self.seq_len, "batch_size": self.batch_size, "seed": self.seed}
        shares = {"train_keys": dict(zip(self.corpora, keys, strict=True)), "shares": self.counts}
        return {**shares, **sizes, **self.packing_fingerprint()}

    def content(self, split: str) -> dict[str, Any]:
        """What fixes the tokens of a split, JSON-able."""
        return {**super().content(split), "shares": self.counts}

    def summary(self) -> dict[str, Any]:
        """Settings, hashes and counts for logs and checkpoints; tokens of a split are summed over all corpora."""
        return {
            **self.fingerprint(),
            **self.packing_summary(),
            "corpus": self.corpus.name,
            "tokenizer": self.tokenizer.fingerprint(),
            "vocab_size": self.vocab_size,
            "splits": {
                split: {"tokens": sum(token_file.num_tokens for token_file in self._token_files[split])}
                for split in sorted(self._token_files, key=SPLITS.index)
            },
        }


def shared_out(weights: dict[str, float]) -> dict[str, int]:
    """The number of windows of each corpus in a `BLOCK`, rounded by largest remainders so that the sum is kept.

    Raises:
        ConfigError: a weight is not above 0, or too small beside the others for one window.
    """
    for name, weight in weights.items():
        if not weight > 0:
            raise ConfigError(f"data.weights.{name}={weight} must be above 0; leave the corpus out otherwise.")
    exact = {name: BLOCK * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(weights, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: BLOCK - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if not count:
            raise ConfigError(f"data.weights.{name}={weights[name]} is less than a thousandth of the mixture.")
    return counts
