"""`data.order=contiguous`: each row reads on from step to step, nothing is lost, and nothing remembers a position."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from list_corpus import CodePointTokenizer, ListCorpus, distinct_documents

from longmix.batch import IGNORE_INDEX
from longmix.data.prepared import PreparedData
from longmix.data.text_data import TokenData
from longmix.data.tokens.preparation import prepare
from longmix.data.tokens.token_files import TokenFile
from longmix.data.windows import ContiguousWindows
from longmix.errors import ConfigError

SEPARATOR = CodePointTokenizer.separator_id
LENGTHS = [1, 5, 2, 130, 3, 3, 64, 1, 17, 40]
CASES = [(7, 3), (7, 1), (16, 5), (1, 4), (276, 1), (92, 3)]


@pytest.fixture(scope="module")
def token_file(tmp_path_factory) -> TokenFile:
    corpus = ListCorpus(train=distinct_documents(LENGTHS))
    return prepare(corpus, CodePointTokenizer(), "train", tmp_path_factory.mktemp("tokens"))


def row_of(windows: ContiguousWindows, row: int, rows: int, epoch: int = 0) -> list[tuple[int, object]]:
    """The running indices of one row in an epoch, and its windows."""
    steps = range(epoch * windows.steps_per_epoch, (epoch + 1) * windows.steps_per_epoch)
    return [(step * rows + row, windows.sample(step * rows + row)) for step in steps]


def is_padding(window) -> bool:
    return bool((window.targets == IGNORE_INDEX).all() and (window.tokens == SEPARATOR).all())


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(("seq_len", "rows"), CASES)
def test_each_row_reads_on_and_an_epoch_has_every_token_once(token_file, seq_len, rows, epoch):
    windows = ContiguousWindows(token_file, seq_len, 7, rows)
    assert windows.windows_per_epoch == rows * windows.steps_per_epoch
    inputs, targets = [], 0
    for row in range(rows):
        found = [window for _, window in row_of(windows, row, rows, epoch)]
        assert not any(map(is_padding, found[:-1]))
        for before, after in pairwise(found):
            assert is_padding(after) or before.targets[-1] == after.tokens[0]
        inputs += [window.tokens for window in found if not is_padding(window)]
        targets += sum(int((window.targets != IGNORE_INDEX).sum()) for window in found)
    joined = np.concatenate(inputs)
    padding = len(joined) - token_file.num_tokens
    assert 0 <= padding < seq_len and (joined[len(joined) - padding :] == SEPARATOR).all()
    assert sorted(joined[: len(joined) - padding]) == sorted(token_file.tokens)
    assert targets == token_file.num_tokens - 1


@pytest.mark.parametrize(("seq_len", "rows"), CASES)
def test_a_window_continues_where_the_row_of_the_step_before_has_the_same_document(token_file, seq_len, rows):
    windows = ContiguousWindows(token_file, seq_len, 7, rows)
    for row in range(rows):
        for epoch in range(2):
            found = row_of(windows, row, rows, epoch)
            says = [windows.continues(index) for index, _ in found]
            wanted = [window.tokens[0] != SEPARATOR for _, window in found]
            assert says == [False, *wanted[1:]]


def test_epochs_and_seeds_have_other_orders_of_documents(token_file):
    def stream(seed: int, epoch: int) -> tuple[int, ...]:
        windows = ContiguousWindows(token_file, 276, seed, 1)
        return tuple(np.concatenate([window.tokens for _, window in row_of(windows, 0, 1, epoch)]))

    assert len({stream(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def data(tmp_path, **settings) -> TokenData:
    corpus = ListCorpus(train=distinct_documents(LENGTHS), validation=distinct_documents([9]))
    words = {"seq_len": 8, "batch_size": 4, "seed": 0, "cache_dir": str(tmp_path), "order": "contiguous", **settings}
    return TokenData(corpus, CodePointTokenizer(), **words)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_the_step_alone(tmp_path, workers):
    straight = list(data(tmp_path).train_loader(0, 12))
    resumed = list(data(tmp_path, num_workers=workers).train_loader(7, 12))
    assert all(map(same, straight[7:], resumed)) and len(resumed) == 5
    assert straight[1]["continues"].dtype == torch.bool and straight[1]["continues"].any()


def test_rows_stay_with_their_process(tmp_path):
    whole = list(data(tmp_path).train_loader(0, 5))
    for rank in range(2):
        own = list(data(tmp_path).train_loader(0, 5, rank, 2))
        for step, batch in enumerate(own):
            rows = slice(2 * rank, 2 * rank + 2)
            for name in ("tokens", "targets", "document_ids", "continues"):
                assert torch.equal(batch[name], whole[step][name][rows])


def test_the_order_is_part_of_what_a_run_resumes_with(tmp_path):
    contiguous, shuffled = data(tmp_path), data(tmp_path, order="shuffled")
    assert contiguous.fingerprint() == {**shuffled.fingerprint(), "order": "contiguous"}
    assert "continues" not in next(iter(shuffled.train_loader(0, 1)))
    assert contiguous.reads_on and not shuffled.reads_on


def test_remote_shards_that_are_not_at_hand_are_refused():
    """Rows read all shards at a time, and each change of shard would be a download."""
    found = PreparedData(
        "s3://bucket/tokens", CodePointTokenizer(), seq_len=8, batch_size=4, seed=0, order="contiguous"
    )
    found.__dict__["folders"] = {"train": "s3://bucket/tokens/train"}
    found._token_files["train"] = [
        SimpleNamespace(shards=[9] * 40, num_tokens=360, num_documents=40, offsets=np.arange(0, 361, 9))
    ]
    with pytest.raises(ConfigError, match=r"all 40 shards .* data\.local_shards=32 .* set data\.local_shards=40"):
        found._check_room()
    found.local_shards = 40
    found._check_room()


def test_impossible_settings(tmp_path, token_file):
    with pytest.raises(ConfigError, match=r"data\.order=sorted is unknown; use shuffled or contiguous"):
        data(tmp_path, order="sorted")
    with pytest.raises(ConfigError, match=r"batch_size=100 rows .* only 35 windows of seq_len=8"):
        data(tmp_path, batch_size=100).setup("fit")
    with pytest.raises(ConfigError, match="seq_len must be at least 1"):
        ContiguousWindows(token_file, 0, 1, 1)
