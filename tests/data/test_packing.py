"""`data.packing`, documents cut and repeated, and no mask: what windows hold, and that they are pure functions."""

import logging
import time
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from list_corpus import CodePointTokenizer, ListCorpus, distinct_documents

from longmix.batch import IGNORE_INDEX
from longmix.data.best_fit import best_fit
from longmix.data.mixture import MixtureData
from longmix.data.packing import AlignedWindows, BestFitWindows, Packing
from longmix.data.prepared import PreparedData
from longmix.data.staged import StagedData
from longmix.data.text_data import TokenData
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.token_files import TokenFile
from longmix.errors import ConfigError

SEPARATOR = CodePointTokenizer.separator_id
LENGTHS = [1, 5, 2, 130, 3, 3, 64, 1, 17, 40, 6, 6, 9, 31, 8]
SEQ_LENS = [1, 2, 7, 32, 65, 341, 500]
PACKINGS = {
    "stream": {},
    "best_fit": {"packing": "best_fit"},
    "aligned": {"packing": "aligned"},
    "stream-cut": {"max_document_tokens": 10},
    "best_fit-cut": {"packing": "best_fit", "max_document_tokens": 10},
    "aligned-cut": {"packing": "aligned", "max_document_tokens": 10},
    "stream-long": {"long_documents": 32, "long_document_visits": 3},
    "best_fit-long": {"packing": "best_fit", "long_documents": 32},
    "all": {"packing": "aligned", "max_document_tokens": 20, "long_documents": 10},
}
packings = pytest.mark.parametrize("settings", PACKINGS.values(), ids=PACKINGS.keys())


@pytest.fixture(scope="module")
def token_file(tmp_path_factory) -> TokenFile:
    corpus = ListCorpus(train=distinct_documents(LENGTHS))
    return prepare(corpus, CodePointTokenizer(), "train", tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenFile:
    """A token file of more shards than are shuffled together."""
    documents = distinct_documents([1 + number * 7 % 23 for number in range(400)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("longmix.data.tokens.encoding.BATCH_DOCUMENTS", 4)
        corpus, preparation = ListCorpus(train=documents, validation=documents[:3]), Preparation(shard_tokens=60)
        folder = tmp_path_factory.mktemp("shards")
        prepare(corpus, CodePointTokenizer(), "validation", folder, preparation)
        return prepare(corpus, CodePointTokenizer(), "train", folder, preparation)


def documents_of(token_file: TokenFile) -> list[tuple[int, ...]]:
    return [tuple(ids.tolist()) for ids in np.split(np.asarray(token_file.tokens), token_file.offsets[1:-1])]


def parts(window) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Inputs and targets of each document of a window; the padding, which has no targets, is left out."""
    bounds = np.flatnonzero(np.diff(window.document_ids, prepend=-1, append=-2))
    assert window.document_ids.tolist() == sorted(window.document_ids) and window.document_ids[0] == 0
    cut = [slice(*pair) for pair in pairwise(bounds)]
    found = [(tuple(window.tokens[piece].tolist()), tuple(window.targets[piece].tolist())) for piece in cut]
    inputs, targets = found[-1]
    if set(inputs) == {SEPARATOR} and set(targets) == {IGNORE_INDEX}:
        found.pop()
    return found


def epoch_of(windows, epoch: int = 0) -> list:
    if not isinstance(windows, AlignedWindows):
        return [windows.window(epoch, index) for index in range(windows.windows_per_epoch)]
    return [windows.window(epoch, index) for index in range(windows._windows_of(epoch))]


def held(windows: list) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [part for window in windows for part in parts(window)]


def naive_spaces(lengths: list[int], room: int) -> list[int]:
    """Best-fit decreasing written out: what each window has left."""
    spaces: list[int] = []
    for length in lengths:
        enough = min((space for space in spaces if space >= length), default=None)
        if enough is not None:
            spaces.remove(enough)
        spaces.append((room if enough is None else enough) - length)
    return sorted(spaces)


@pytest.mark.parametrize("room", [1, 2, 17, 60, 1023, 1024, 2500])
def test_the_fast_algorithm_places_as_best_fit_decreasing_does(room):
    random = np.random.default_rng(room)
    for size in (0, 1, 5, 40, 120):
        lengths = -np.sort(-random.integers(1, room + 1, size))
        small = -np.sort(-np.minimum(random.geometric(0.05, size), room))
        for case in (lengths, small):
            found = best_fit(case, room)
            assert sorted(set(found.tolist())) == list(range(len(set(found.tolist()))))
            assert sorted((room - np.bincount(found, weights=case)).tolist()) == naive_spaces(case.tolist(), room)


@packings
@pytest.mark.parametrize("seq_len", SEQ_LENS)
def test_each_target_follows_its_input_in_the_file(token_file, settings, seq_len):
    """Also where a document is cut: no input is told to predict the beginning of what happens to stand behind it."""
    after = {}
    for document in documents_of(token_file):
        after |= dict(zip(document[1:], (*document[2:], SEPARATOR), strict=True))
    windows, without = Packing(**settings).windows(token_file, seq_len, 3), 0
    for window in epoch_of(windows):
        assert [array.dtype for array in window] == [np.int64, np.int64, np.int32, np.int32]
        assert [array.shape for array in window] == [(seq_len,)] * 4
        for inputs, targets in parts(window):
            for token, target in zip(inputs, targets, strict=True):
                if target == IGNORE_INDEX:
                    without += 1
                elif token != SEPARATOR:
                    assert target == after[token]
    # the very last token of a stream alone
    assert without <= 1 and (without == 0 or not isinstance(windows, BestFitWindows))


class TestBestFit:
    @pytest.mark.parametrize("epoch", [0, 3])
    @pytest.mark.parametrize("seq_len", SEQ_LENS)
    def test_no_document_is_cut_that_fits_and_none_is_lost(self, token_file, seq_len, epoch):
        windows = Packing("best_fit").windows(token_file, seq_len, 7)
        wanted = Counter()
        for document in documents_of(token_file):
            wanted.update(document[start : start + seq_len] for start in range(0, len(document), seq_len))
        assert Counter(inputs for inputs, _ in held(epoch_of(windows, epoch))) == wanted

    def test_padding_is_a_document_of_its_own_without_targets(self, token_file):
        (window,) = epoch_of(Packing("best_fit").windows(token_file, 500, 1))
        padding = 500 - token_file.num_tokens
        assert (window.tokens[-padding:] == SEPARATOR).all() and (window.targets[-padding:] == IGNORE_INDEX).all()
        assert (window.targets[:-padding] != IGNORE_INDEX).all()
        assert (window.document_ids[-padding:] == len(LENGTHS)).all() and window.document_ids[-padding - 1] < len(
            LENGTHS
        )

    def test_epochs_have_other_documents_together(self, tmp_path):
        equal = prepare(ListCorpus(train=distinct_documents([9] * 30)), CodePointTokenizer(), "train", tmp_path)
        windows = Packing("best_fit").windows(equal, 30, 1)
        together = {
            frozenset(frozenset(inputs for inputs, _ in parts(w)) for w in epoch_of(windows, e)) for e in range(4)
        }
        ordered = {tuple(inputs for inputs, _ in held(epoch_of(windows, e))) for e in range(4)}
        assert len(together) == len(ordered) == 4
        first = [inputs[0] for inputs, _ in held(epoch_of(Packing("best_fit").windows(equal, 300, 1)))]
        assert len(first) == 30

    def test_long_and_short_documents_stand_anywhere_in_a_window(self, token_file):
        windows = Packing("best_fit").windows(token_file, 500, 1)
        orders = [[len(inputs) for inputs, _ in parts(windows.window(epoch, 0))] for epoch in range(3)]
        assert all(order != sorted(order, reverse=True) for order in orders) and len(set(map(tuple, orders))) == 3

    def test_many_shards_are_packed_one_by_one_and_visited_in_groups(self, shards):
        owner = {}
        bounds = np.cumsum([0, *shards.shards])
        for position, token in enumerate(np.asarray(shards.tokens).tolist()):
            owner[token] = int(np.searchsorted(bounds, position, side="right")) - 1
        windows = Packing("best_fit").windows(shards, 24, 5)
        assert len(shards.shards) > 40
        for epoch in range(2):
            used = []
            for window in epoch_of(windows, epoch):
                found = {owner[token] for token in window.tokens.tolist() if token != SEPARATOR}
                assert len(found) == 1
                used += found
            first, last = ({s: f(i for i, u in enumerate(used) if u == s) for s in set(used)} for f in (min, max))
            together = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(used))]
            assert 2 < max(together) <= 16
            tokens = Counter(token for inputs, _ in held(epoch_of(windows, epoch)) for token in inputs)
            assert tokens == Counter(np.asarray(shards.tokens).tolist())

    def test_a_million_documents_take_seconds(self):
        random = np.random.default_rng(0)
        lengths = np.clip(random.lognormal(6.5, 1.3, 1_000_000).astype(np.int64), 2, None)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        file = SimpleNamespace(offsets=offsets, num_tokens=int(offsets[-1]), num_documents=1_000_000, separator_id=0)
        file.shards, file.tokens = [file.num_tokens], np.broadcast_to(np.uint16(0), (file.num_tokens,))
        began = time.process_time()
        packing = Packing("best_fit")
        windows = packing.windows(file, 8192, 1)  # type: ignore[arg-type]
        windows.sample(0)
        assert time.process_time() - began < 20  # about 2 alone
        shares = packing.shares(windows, file, 8192)  # type: ignore[arg-type]
        assert shares.padding < 0.001 and shares.dropped_tokens == 0
        assert shares.cut_documents == pytest.approx((lengths > 8192).mean())


class TestAligned:
    @pytest.mark.parametrize("seq_len", SEQ_LENS)
    def test_windows_begin_with_documents_and_what_is_dropped_is_counted(self, token_file, seq_len):
        packing = Packing("aligned")
        windows = packing.windows(token_file, seq_len, 7)
        beginnings = {document[:2] for document in documents_of(token_file)}
        for window in epoch_of(windows):
            assert window.tokens[0] == SEPARATOR and (seq_len == 1 or tuple(window.tokens[:2].tolist()) in beginnings)
        found = Counter(inputs for inputs, _ in held(epoch_of(windows)))
        whole = Counter(documents_of(token_file))
        if seq_len > 1:
            assert max(found.values()) == 1
            assert all(any(document[: len(inputs)] == inputs for document in whole) for inputs in found)
        tokens = sum(len(inputs) for inputs in found.elements())
        shares = packing.shares(windows, token_file, seq_len)
        assert shares.dropped_tokens == pytest.approx(1 - tokens / token_file.num_tokens)
        assert shares.padding == pytest.approx(1 - tokens / (windows.windows_per_epoch * seq_len))
        assert shares.cut_documents == pytest.approx((found - whole).total() / len(LENGTHS))

    def test_each_epoch_drops_others(self, token_file):
        windows = Packing("aligned").windows(token_file, 32, 7)
        kept = {
            frozenset(token for inputs, _ in held(epoch_of(windows, epoch)) for token in inputs) for epoch in range(4)
        }
        assert len(kept) == 4

    def test_the_running_index_goes_through_epochs_of_other_sizes(self, token_file):
        windows = Packing("aligned").windows(token_file, 32, 7)
        straight = [window for epoch in range(6) for window in epoch_of(windows, epoch)]
        assert len({len(epoch_of(windows, epoch)) for epoch in range(6)}) > 1
        for index in (len(straight) - 1, 0, len(straight) // 2):
            fresh = Packing("aligned").windows(token_file, 32, 7)
            for ours, theirs in zip(fresh.sample(index), straight[index], strict=True):
                np.testing.assert_array_equal(ours, theirs)

    def test_groups_of_shards_stay_together(self, shards):
        windows = Packing("aligned").windows(shards, 24, 5)
        bounds = np.cumsum([0, *shards.shards])
        places = {token: place for place, token in enumerate(np.asarray(shards.tokens).tolist())}
        used = [int(np.searchsorted(bounds, places[int(w.tokens[1])], side="right")) for w in epoch_of(windows)]
        first, last = ({s: f(i for i, u in enumerate(used) if u == s) for s in set(used)} for f in (min, max))
        assert max(sum(first[s] <= place <= last[s] for s in first) for place in range(len(used))) <= 17


class TestDocuments:
    @pytest.mark.parametrize("packing", ["stream", "best_fit"])
    def test_longer_documents_are_cut_into_several_and_nothing_is_lost(self, token_file, packing):
        windows = Packing(packing, max_document_tokens=10).windows(token_file, 33, 2)
        found = held(epoch_of(windows))
        assert max(len(inputs) for inputs, _ in found) == 10
        assert sum((Counter(inputs) for inputs, _ in found), Counter()) == Counter(
            np.asarray(token_file.tokens).tolist()
        )

    def test_aligned_windows_of_cut_documents_drop_less(self, token_file):
        lost = []
        for most in (None, 32):
            packing = Packing("aligned", max_document_tokens=most)
            lost.append(packing.shares(packing.windows(token_file, 32, 1), token_file, 32).dropped_tokens)
        assert lost[1] < 0.6 * lost[0]

    @pytest.mark.parametrize("packing", ["stream", "best_fit"])
    def test_long_documents_are_visited_more_often(self, token_file, packing):
        windows = Packing(packing, long_documents=33, long_document_visits=3).windows(token_file, 20, 2)
        times = Counter(token for inputs, _ in held(epoch_of(windows)) for token in inputs)
        for document in documents_of(token_file):
            assert {times[token] for token in document[1:]} == {3 if len(document) >= 33 else 1}

    @pytest.mark.parametrize(("seq_len", "cut"), [(341, 0), (70, 1), (9, 6)])
    def test_the_share_of_documents_that_best_fit_cuts_is_that_of_those_that_fit_nowhere(
        self, token_file, seq_len, cut
    ):
        packing = Packing("best_fit")
        shares = packing.shares(packing.windows(token_file, seq_len, 1), token_file, seq_len)
        assert sum(length + 1 > seq_len for length in LENGTHS) == cut
        assert shares.cut_documents == pytest.approx(cut / len(LENGTHS)) and shares.dropped_tokens == 0

    @pytest.mark.parametrize("seq_len", SEQ_LENS)
    def test_the_share_of_documents_that_the_stream_cuts(self, token_file, seq_len):
        windows = Packing().windows(token_file, seq_len, 1)
        whole = Counter(documents_of(token_file)) & Counter(inputs for inputs, _ in held(epoch_of(windows)))
        shares = Packing().shares(windows, token_file, seq_len)
        assert shares.cut_documents == pytest.approx(1 - whole.total() / len(LENGTHS))


def data(tmp_path, **settings) -> TokenData:
    corpus = ListCorpus(train=distinct_documents(LENGTHS), validation=distinct_documents([9, 30]))
    words = {"seq_len": 32, "batch_size": 4, "seed": 0, "cache_dir": str(tmp_path), **settings}
    return TokenData(corpus, CodePointTokenizer(), **words)


def same(first: dict, second: dict) -> bool:
    pairs = [(first[name], second[name]) for name in first]
    return first.keys() == second.keys() and all(a is b if a is None else torch.equal(a, b) for a, b in pairs)


class TestData:
    @packings
    def test_batches_depend_on_the_step_alone(self, tmp_path, settings):
        straight = list(data(tmp_path, **settings).train_loader(0, 14))
        assert all(map(same, straight[9:], data(tmp_path, **settings).train_loader(9, 14)))
        for step, batch in enumerate(straight):
            own = [data(tmp_path, **settings).train_steps(rank, 2)[step] for rank in range(2)] if step == 7 else []
            for name in ("tokens", "targets", "document_ids") if own else ():
                assert torch.equal(torch.cat([part[name] for part in own]), batch[name])

    @pytest.mark.parametrize("packing", ["best_fit", "aligned"])
    def test_workers_change_nothing(self, tmp_path, packing):
        straight = list(data(tmp_path, packing=packing).train_loader(0, 10))
        read = data(tmp_path, packing=packing, num_workers=2).train_loader(3, 10)
        assert all(map(same, straight[3:], read))

    def test_seeds_and_packings_have_other_batches(self, tmp_path):
        cases = [dict(settings, seed=seed) for settings in PACKINGS.values() for seed in range(2)]
        seen = {bytes(next(iter(data(tmp_path, **case).train_loader(0, 1)))["tokens"].numpy()) for case in cases}
        assert len(seen) == len(cases)

    def test_without_a_mask_documents_are_not_told_apart(self, tmp_path):
        whole, open_ = (next(iter(data(tmp_path, document_mask=mask).train_loader(0, 1))) for mask in (True, False))
        assert torch.equal(whole["tokens"], open_["tokens"]) and whole["document_ids"].max() > 0
        assert open_["document_ids"] is None and open_["document_starts"] is None

    def test_without_a_mask_rows_of_a_contiguous_order_go_on_over_borders(self, tmp_path):
        made = data(tmp_path, order="contiguous", document_mask=False, seq_len=8)
        batches = list(made.train_loader(0, made.train_windows.steps_per_epoch + 1))
        assert all(batch["document_ids"] is None for batch in batches)
        says = torch.stack([batch["continues"] for batch in batches])
        assert not says[0].any() and says[1:-2].all() and not says[-1].any()

    def test_documents_of_a_contiguous_order_may_be_cut_and_repeated(self, tmp_path):
        made = data(tmp_path, order="contiguous", max_document_tokens=10, long_documents=40, seq_len=8)
        batches = list(made.train_loader(0, made.train_windows.steps_per_epoch))
        tokens = Counter(torch.cat([batch["tokens"] for batch in batches]).flatten().tolist())
        for document in documents_of(made.token_file("train")):
            assert {tokens[token] for token in document[1:]} == {2 if len(document) >= 40 else 1}

    def test_evaluation_reads_the_stream(self, tmp_path):
        plain = list(data(tmp_path).evaluation_loader("validation", 16))
        words = {"packing": "best_fit", "max_document_tokens": 5, "long_documents": 2, "document_mask": False}
        assert all(map(same, plain, data(tmp_path, **words).evaluation_loader("validation", 16)))
        assert data(tmp_path, **words).content("validation") == data(tmp_path).content("validation")

    def test_the_fingerprint_is_that_of_before_unless_a_setting_is_given(self, tmp_path):
        plain = data(tmp_path)
        assert plain.fingerprint().keys() == {"train_key", "seq_len", "batch_size", "seed"}
        for settings in filter(None, PACKINGS.values()):
            assert data(tmp_path, **settings).fingerprint() == {**plain.fingerprint(), "packing": settings}
        assert data(tmp_path, document_mask=False).fingerprint()["packing"] == {"document_mask": False}

    def test_what_it_costs_is_logged_and_kept(self, tmp_path, caplog):
        made = data(tmp_path, packing="aligned", seq_len=8)
        with caplog.at_level(logging.INFO):
            made.setup("fit")
        said = "\n".join(caplog.messages)
        assert "data.packing=aligned of list: 7.50% of the windows is padding, " in said
        assert "drops most of list" in said and "data.max_document_tokens=8 cuts them" in said
        kept = made.summary()["packing"]
        assert kept["packing"] == "aligned" and kept["shares"]["list"]["dropped_tokens"] > 0.5
        assert kept["shares"]["list"]["windows"] == made.train_windows.windows_per_epoch
        assert made.train_tokens_per_epoch == 8 * made.train_windows.windows_per_epoch

    def test_each_corpus_of_a_mixture_is_packed_alone(self, tmp_path):
        def mixture(**settings) -> MixtureData:
            texts = distinct_documents([20, 9, 33, 12, 40, 7])
            corpora = {
                name: ListCorpus(name, train=texts[part], validation=texts[:1])
                for name, part in (("first", slice(0, 3)), ("second", slice(3, 6)))
            }
            words = {"seq_len": 24, "batch_size": 4, "seed": 0, "cache_dir": str(tmp_path), **settings}
            return MixtureData(corpora, {"first": 1, "second": 1}, CodePointTokenizer(), **words)

        made = mixture(packing="best_fit")
        made.setup("fit")
        documents = [d for file in made.token_files("train") for d in documents_of(file) if len(d) <= 24]
        seen = {inputs for index in range(200) for inputs, _ in parts(made.train_windows.sample(index))}
        assert seen >= set(documents) and not any(
            inputs != d and set(inputs[1:]) & set(d[1:]) for inputs in seen for d in documents
        )
        assert made.fingerprint() == {**mixture().fingerprint(), "packing": {"packing": "best_fit"}}
        assert made.summary()["packing"]["shares"].keys() == {"first", "second"}
        assert mixture(document_mask=False).train_windows.sample(0).document_ids is None

    def test_prepared_files_of_many_shards(self, shards, tmp_path):
        words = {"seq_len": 24, "batch_size": 4, "seed": 5, "cache_dir": str(tmp_path), "packing": "best_fit"}
        made = PreparedData(str(shards.folder.parent), CodePointTokenizer(), **words)
        made.setup("fit")
        wanted = Packing("best_fit").windows(shards, 24, 5).sample(3)
        assert (next(iter(made.train_loader(0, 1)))["tokens"][3].numpy() == wanted.tokens).all()

    def test_stages_may_be_packed_otherwise(self, tmp_path):
        stages = [data(tmp_path), data(tmp_path, packing="best_fit", seq_len=64)]
        made = StagedData(stages, [0, 5])
        batches = list(made.train_loader(4, 6))
        assert same(batches[0], stages[0].train_steps(0, 1)[4]) and same(batches[1], stages[1].train_steps(0, 1)[0])
        assert made.fingerprint()["stages"][1]["packing"] == {"packing": "best_fit"}


REFUSED = {
    "packing": ({"packing": "tight"}, r"data\.packing=tight is unknown; use stream, best_fit or aligned"),
    "most": ({"max_document_tokens": 0}, r"data\.max_document_tokens=0 must be at least 1, or null"),
    "long": ({"long_documents": -3}, r"data\.long_documents=-3 must be at least 1, or null"),
    "visits": (
        {"long_documents": 5, "long_document_visits": 0},
        r"data\.long_document_visits=0 must be from 1 to 1000",
    ),
    "visits-alone": ({"long_document_visits": 3}, r"data\.long_document_visits=3 needs data\.long_documents"),
    "contiguous": (
        {"packing": "best_fit", "order": "contiguous"},
        r"data\.packing=best_fit .* data\.order=contiguous .* set data\.packing=stream, or data\.order=shuffled",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        data(tmp_path, **settings)
