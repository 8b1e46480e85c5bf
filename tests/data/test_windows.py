"""Windows: nothing lost, nothing twice, and the same whoever asks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from list_corpus import CodePointTokenizer, ListCorpus, distinct_documents

from longmix.batch import IGNORE_INDEX
from longmix.data.tokens.preparation import prepare
from longmix.data.tokens.token_files import TokenFile
from longmix.data.windows import EvaluationWindows, TrainWindows, permutation
from longmix.errors import ConfigError

SEPARATOR = CodePointTokenizer.separator_id
LENGTHS = [1, 5, 2, 130, 3, 3, 64, 1, 17, 40]
SEQ_LENS = [1, 2, 7, 64, 276, 277, 1000]


@pytest.fixture(scope="module")
def token_file(tmp_path_factory) -> TokenFile:
    folder: Path = tmp_path_factory.mktemp("tokens")
    return prepare(ListCorpus(train=distinct_documents(LENGTHS)), CodePointTokenizer(), "train", folder)


def pairs_in_documents(token_file: TokenFile) -> Counter:
    """(input, target) inside documents: the separator to the first token, and each token to the next."""
    documents = np.split(np.asarray(token_file.tokens), token_file.offsets[1:-1])
    return Counter(pair for ids in documents for pair in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))


def check_covers_everything(windows: list, token_file: TokenFile) -> None:
    tokens = np.concatenate([window.tokens for window in windows])
    targets = np.concatenate([window.targets for window in windows])
    num_padding = len(tokens) - token_file.num_tokens
    inputs = Counter(tokens.tolist())
    inputs[SEPARATOR] -= num_padding
    assert inputs == Counter(token_file.tokens.tolist())
    has_target = targets != IGNORE_INDEX
    assert has_target.sum() == token_file.num_tokens - 1
    pairs = Counter(zip(tokens[has_target].tolist(), targets[has_target].tolist(), strict=True))
    inside = pairs_in_documents(token_file)
    assert inside <= pairs
    between = pairs - inside
    last_tokens = {int(token_file.tokens[end - 1]) for end in token_file.offsets[1:]}
    assert between.total() == token_file.num_documents - 1
    assert set(between) < {(last, SEPARATOR) for last in last_tokens}


def check_shapes(window, seq_len: int) -> None:
    assert [array.dtype for array in window] == [np.int64, np.int64, np.int32, np.int32]
    assert [array.shape for array in window] == [(seq_len,)] * 4


class TestTrainWindows:
    @pytest.mark.parametrize("seq_len", SEQ_LENS)
    @pytest.mark.parametrize("epoch", [0, 3])
    def test_an_epoch_has_every_token_as_input_and_target(self, token_file, seq_len, epoch):
        windows = TrainWindows(token_file, seq_len, seed=7)
        assert windows.windows_per_epoch == -(-token_file.num_tokens // seq_len)
        all_windows = [windows.window(epoch, index) for index in range(windows.windows_per_epoch)]
        for window in all_windows:
            check_shapes(window, seq_len)
        check_covers_everything(all_windows, token_file)

    @pytest.mark.parametrize("seq_len", SEQ_LENS)
    def test_document_ids_change_exactly_at_separators(self, token_file, seq_len):
        windows = TrainWindows(token_file, seq_len, seed=1)
        for index in range(windows.windows_per_epoch):
            tokens, targets, document_ids = windows.window(0, index)[:3]
            num_real = np.flatnonzero(targets == IGNORE_INDEX)[0] + 1 if IGNORE_INDEX in targets else seq_len
            assert document_ids[0] == 0
            np.testing.assert_array_equal(np.diff(document_ids[:num_real]), tokens[1:num_real] == SEPARATOR)

    def test_padding_is_a_document_of_its_own_without_targets(self, token_file):
        seq_len = token_file.num_tokens + 5
        tokens, targets, document_ids = TrainWindows(token_file, seq_len, seed=1).window(0, 0)[:3]
        assert (tokens[-5:] == SEPARATOR).all()
        assert (targets[-6:] == IGNORE_INDEX).all() and (targets[:-6] != IGNORE_INDEX).all()
        assert document_ids[-6] == token_file.num_documents - 1
        assert (document_ids[-5:] == token_file.num_documents).all()

    def test_targets_are_the_next_inputs(self, token_file):
        windows = TrainWindows(token_file, 7, seed=2)
        for index in range(windows.windows_per_epoch):
            tokens, targets, _ = windows.window(0, index)[:3]
            has_target = targets[:-1] != IGNORE_INDEX
            np.testing.assert_array_equal(tokens[1:][has_target], targets[:-1][has_target])

    def test_order_depends_on_seed_and_epoch_only(self, token_file):
        def order(seed, epoch, probe_first=()):
            windows = TrainWindows(token_file, 16, seed)
            for other_epoch in probe_first:
                windows.window(other_epoch, 0)
            return np.stack([windows.window(epoch, index).tokens for index in range(windows.windows_per_epoch)])

        np.testing.assert_array_equal(order(5, 2), order(5, 2, probe_first=(0, 2, 1)))
        assert (order(5, 0) != order(5, 1)).any()
        assert (order(5, 0) != order(6, 0)).any()

    def test_documents_are_shuffled_by_seed_and_epoch(self, token_file):
        cases = [(seed, epoch) for seed in range(3) for epoch in range(3)]
        length = token_file.num_tokens
        streams = {tuple(TrainWindows(token_file, length, seed).window(epoch, 0).tokens) for seed, epoch in cases}
        assert len(streams) == 9
        assert tuple(token_file.tokens) not in streams

    def test_windows_are_shuffled(self, tmp_path):
        one_document = prepare(ListCorpus(train=distinct_documents([99])), CodePointTokenizer(), "train", tmp_path)
        windows = TrainWindows(one_document, 10, seed=3)
        orders = [[windows.window(epoch, index).tokens[1] for index in range(10)] for epoch in range(3)]
        assert len(set(map(tuple, orders))) == 3
        assert all(order != sorted(order) for order in orders)

    def test_windows_are_not_shuffled_in_the_same_way_as_documents(self, tmp_path):
        equal = prepare(ListCorpus(train=distinct_documents([9] * 20)), CodePointTokenizer(), "train", tmp_path)
        stream = TrainWindows(equal, equal.num_tokens, seed=1).window(0, 0).tokens[1::10].tolist()
        windows = TrainWindows(equal, 10, seed=1)
        visited = [windows.window(0, index).tokens[1] for index in range(20)]
        window_order = [stream.index(first) for first in visited]
        document_order = [sorted(stream).index(first) for first in stream]
        assert window_order != document_order

    def test_sample_runs_through_the_epochs(self, token_file):
        windows = TrainWindows(token_file, 50, seed=4)
        count = windows.windows_per_epoch
        for global_index, (epoch, index) in {0: (0, 0), count - 1: (0, count - 1), 2 * count + 1: (2, 1)}.items():
            np.testing.assert_array_equal(windows.sample(global_index).tokens, windows.window(epoch, index).tokens)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"seq_len": 0, "seed": 1}, "seq_len must be at least 1, got 0"),
            ({"seq_len": 8, "seed": -1}, r"seed must be between 0 and 2\*\*63 - 1, got -1"),
        ],
    )
    def test_impossible_settings(self, token_file, settings, message):
        with pytest.raises(ConfigError, match=message):
            TrainWindows(token_file, **settings)


class TestEvaluationWindows:
    @pytest.mark.parametrize("seq_len", SEQ_LENS)
    def test_covers_everything_in_order(self, token_file, seq_len):
        windows = EvaluationWindows(token_file, seq_len)
        all_windows = [windows[place] for place in range(len(windows))]
        check_covers_everything(all_windows, token_file)
        tokens = np.concatenate([window.tokens for window in all_windows])[: token_file.num_tokens]
        np.testing.assert_array_equal(tokens, token_file.tokens)
        assert windows.covered_tokens == windows.total_tokens == token_file.num_tokens

    @pytest.mark.parametrize(("max_tokens", "expected"), [(1, 1), (15, 1), (32, 2), (95, 5), (10_000, 18)])
    def test_max_tokens_takes_evenly_spread_windows(self, token_file, max_tokens, expected):
        everything = [tuple(window.tokens) for window in EvaluationWindows(token_file, 16)]
        windows = EvaluationWindows(token_file, 16, max_tokens)
        places = [everything.index(tuple(windows[place].tokens)) for place in range(len(windows))]
        assert len(places) == expected
        gaps = np.diff([*places, len(everything) + places[0]])
        assert max(gaps) - min(gaps) <= 1
        assert windows.covered_tokens == min(16 * expected, token_file.num_tokens)
        assert windows.total_tokens == token_file.num_tokens

    def test_impossible_max_tokens(self, token_file):
        with pytest.raises(ConfigError, match="max_tokens must be at least 1, or null"):
            EvaluationWindows(token_file, 16, max_tokens=0)


class TestPermutation:
    def test_never_changes(self):
        assert permutation(10, seed=0, stream=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]

    @pytest.mark.parametrize("size", [1, 2, 1000])
    def test_is_a_permutation(self, size):
        assert sorted(permutation(size, seed=2**63 - 1, stream=5)) == list(range(size))

    def test_streams_differ(self):
        orders = {tuple(permutation(20, seed, stream)) for seed in range(5) for stream in range(5)}
        assert len(orders) == 25
