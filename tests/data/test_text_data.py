"""`TokenData`: batches do not depend on workers, ranks or where a run resumed; settings are refused by name."""

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
import torch
from list_corpus import ListCorpus, random_text
from omegaconf import OmegaConf

from longmix.data.mixture import MixtureData
from longmix.data.text_data import TokenData
from longmix.data.tokens.bpe import BpeTokenizer
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError, DataError, ProcessLost, StorageError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def corpus() -> ListCorpus:
    texts = [random_text(seed, length=20 + 37 * seed) for seed in range(12)]
    return ListCorpus(train=texts, validation=texts[:3], test=texts[3:4])


@pytest.fixture
def make(cache_dir, corpus):
    def make(tokenizer=None, **settings) -> TokenData:
        settings = {"seq_len": 32, "batch_size": 4, "seed": 0, "cache_dir": cache_dir, **settings}
        return TokenData(settings.pop("corpus", corpus), tokenizer or ByteTokenizer(), **settings)

    return make


def equal(first: dict, second: dict) -> bool:
    if first.keys() != second.keys():
        return False
    return all(
        (first[name] is None and second[name] is None)
        or (first[name] is not None and second[name] is not None and torch.equal(first[name], second[name]))
        for name in first
    )


def check_equal(first, second) -> None:
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    assert all(map(equal, first, second))


class Failing:
    """Windows of which one cannot be read."""

    def __init__(self, windows, error: Exception) -> None:
        self._windows, self._error = windows, error

    def sample(self, index: int):
        if index == 5:
            raise self._error
        return self._windows.sample(index)


class TestTrainLoader:
    @pytest.mark.sampled(5)
    @pytest.mark.parametrize("num_workers", [0, 1, 2])
    @pytest.mark.parametrize("kind", [DataError, ConfigError, StorageError, ProcessLost])
    def test_an_error_in_a_worker_comes_as_it_was_raised(self, make, num_workers, kind):
        data = make(num_workers=num_workers)
        data.train_windows = Failing(data.train_windows, kind("tokens-00003.bin is damaged. Delete it."))
        batches = iter(data.train_loader(0, 60))
        assert next(batches)["tokens"].shape == (4, 32)
        with pytest.raises(kind, match=r"^tokens-00003\.bin is damaged\. Delete it\.$"):
            next(batches)

    def test_a_defect_in_a_worker_keeps_its_traceback(self, make):
        data = make(num_workers=1)
        data.train_windows = Failing(data.train_windows, AssertionError("a defect"))
        with pytest.raises(AssertionError, match=r"(?s)worker process 0.*in sample.*a defect"):
            list(data.train_loader(0, 3))

    def test_items(self, make):
        batch = next(iter(make().train_loader(0, 50)))
        starts = batch.pop("document_starts")
        assert list(batch) == ["tokens", "targets", "document_ids"]
        assert starts.dtype == torch.int32 and len(starts) == 4
        assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
        assert batch["document_ids"].dtype == torch.int32
        assert {tuple(tensor.shape) for tensor in batch.values()} == {(4, 32)}

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_workers_change_nothing(self, make, num_workers):
        check_equal(make(num_workers=num_workers).train_loader(0, 60), make().train_loader(0, 60))

    @pytest.mark.parametrize("start_step", [1, 7, 59])
    def test_resuming_equals_the_rest_of_the_straight_run(self, make, start_step):
        loader = make().train_loader(start_step, 60)
        assert len(loader) == 60 - start_step
        check_equal(loader, list(make().train_loader(0, 60))[start_step:])

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_ranks_share_each_step(self, make, world_size):
        whole = list(make().train_loader(3, 9))
        shares = [list(make().train_loader(3, 9, rank, world_size)) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            for name in ("tokens", "targets"):
                rows = [share[step][name] for share in shares]
                assert all(len(row) == 4 // world_size for row in rows)
                assert torch.equal(torch.cat(rows), batch[name])

    def test_batch_size_only_cuts_the_same_sequence_of_windows_elsewhere(self, make):
        rows = [
            torch.cat([batch["tokens"] for batch in make(batch_size=b).train_loader(0, 24 // b)]) for b in (1, 2, 8)
        ]
        assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])

    def test_steps_cross_epochs(self, make):
        data = make(batch_size=3)
        count = data.train_windows.windows_per_epoch
        rows = torch.cat([batch["tokens"] for batch in data.train_loader(0, count)]).numpy()
        expected = [data.train_windows.window(epoch, index).tokens for epoch in range(3) for index in range(count)]
        np.testing.assert_array_equal(rows, np.stack(expected))

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_packed_rows_have_ids_and_starts_whether_or_not_a_batch_has_a_boundary(self, make, num_workers):
        data = make(batch_size=2, num_workers=num_workers)
        seen = set()
        for batch in data.train_loader(0, 200):
            begins = batch["document_ids"].diff(dim=1) != 0
            inner = batch["document_starts"] % 32 > 0
            assert torch.equal(inner.sum(1), begins.sum(1)) and not batch["document_starts"][:, 0].any()
            assert begins.any() == (batch["tokens"][:, 1:] == data.tokenizer.separator_id).any()
            seen.add(bool(begins.any()))
        assert seen == {True, False}

    def test_global_random_state_is_left_alone(self, make):
        before = torch.random.get_rng_state()
        list(make(num_workers=1).train_loader(0, 2))
        list(make().evaluation_loader("validation"))
        assert torch.equal(torch.random.get_rng_state(), before)

    @pytest.mark.parametrize(("before", "after"), [(None, "false"), ("true", "true")])
    def test_tokenizers_library_is_told_that_workers_do_not_tokenise(self, make, monkeypatch, before, after):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before or "")
        if before is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM")
        make().train_loader(0, 1)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before
        make(num_workers=1).train_loader(0, 1)
        assert os.environ["TOKENIZERS_PARALLELISM"] == after

    @pytest.mark.slow
    def test_windows_can_be_sent_to_spawned_workers(self, make):
        loader = make(num_workers=1).train_loader(0, 3)
        loader.multiprocessing_context = multiprocessing.get_context("spawn")
        check_equal(loader, make().train_loader(0, 3))

    @pytest.mark.parametrize(("batch_size", "world_size"), [(4, 3), (2, 4)])
    def test_batch_size_that_ranks_cannot_share(self, make, batch_size, world_size):
        with pytest.raises(ConfigError, match=f"batch_size .* got {batch_size} for {world_size} ranks"):
            make(batch_size=batch_size).train_loader(0, 1, rank=0, world_size=world_size)

    def test_corpus_smaller_than_a_window(self, make):
        data = make(corpus=ListCorpus(train=["tiny"]), batch_size=2)
        (batch,) = data.train_loader(0, 1)
        assert data.train_tokens_per_epoch == 5
        assert (batch["targets"] != -100).sum() == 2 * 4


class TestEvaluationLoader:
    @pytest.mark.parametrize("batch_size", [1, 5, 1000])
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_every_window_once_over_ranks(self, make, batch_size, world_size):
        data = make()
        loaders = [data.evaluation_loader("validation", 16, batch_size, None, r, world_size) for r in range(world_size)]
        rows = [
            tokens.tolist()
            for loader in loaders
            for batch in loader
            for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True)
            if (targets != -100).any()
        ]
        windows = data.evaluation_windows("validation", 16, None)
        assert sorted(rows) == sorted(window.tokens.tolist() for window in windows)
        assert len({len(loader) for loader in loaders}) == 1, "ranks must run in step"
        for loader in loaders:
            sizes = [len(batch["tokens"]) for batch in loader]
            assert len(loader) == len(sizes)
            assert all(size == batch_size for size in sizes[:-1]) and 1 <= sizes[-1] <= batch_size

    def test_uses_the_training_length_by_default(self, make):
        assert next(iter(make().evaluation_loader("validation")))["tokens"].shape == (1, 32)

    def test_more_ranks_than_windows(self, make):
        data = make()
        first, second = (list(data.evaluation_loader("test", 10_000, 1, None, rank, 2)) for rank in range(2))
        assert len(first) == len(second) == 1
        assert (first[0]["targets"] != -100).any()
        assert (second[0]["targets"] == -100).all()

    def test_says_how_much_it_covers(self, make, caplog):
        caplog.set_level("INFO")
        data = make()
        data.evaluation_loader("validation", max_tokens=64)
        data.evaluation_loader("validation", max_tokens=64)
        total = data.token_file("validation").num_tokens
        lines = [record.message for record in caplog.records if "evaluation covers" in record.message]
        assert lines == [f"evaluation covers 64 of the {total:,} tokens of the validation split, in 2 windows of 32"]

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"split": "dev"}, DataError, "no split 'dev'; it has train, validation, test"),
            ({"split": "test", "seq_len": 0}, ConfigError, "seq_len must be at least 1, got 0"),
            ({"split": "test", "batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
            ({"split": "test", "max_tokens": 0}, ConfigError, "max_tokens must be at least 1"),
        ],
    )
    def test_impossible_settings(self, make, settings, error, message):
        with pytest.raises(error, match=message):
            make().evaluation_loader(**settings)


class TestTokenData:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
            ({"batch_size": 0}, "batch_size .* got 0"),
            ({"num_workers": -1}, r"data\.num_workers must not be negative, got -1"),
            ({"validation_tokens": 0}, r"data\.validation_tokens must be at least 1, or null for all, got 0"),
        ],
    )
    def test_impossible_settings(self, make, settings, message):
        with pytest.raises(ConfigError, match=message):
            make(**settings)

    def test_nothing_is_written_before_it_is_needed(self, make, tmp_path):
        data = make(cache_dir=str(tmp_path / "cache"))
        assert not (tmp_path / "cache").exists()
        data.prepare_data()
        assert sorted(path.name.split("-")[1] for path in (tmp_path / "cache").iterdir()) == ["train", "validation"]
        data.setup("fit")
        data.setup("validate")

    def test_trains_its_tokenizer(self, make):
        data = make(tokenizer=BpeTokenizer(300))
        assert data.vocab_size == 300 == len(data.token_bytes)
        assert data.train_tokens_per_epoch < make().train_tokens_per_epoch

    def test_fingerprint_changes_with_what_fixes_the_batches(self, make, corpus):
        first = make().fingerprint()
        assert make(num_workers=1, validation_tokens=None).fingerprint() == first
        others = [make(seed=1), make(seq_len=16), make(batch_size=2), make(tokenizer=BpeTokenizer(300))]
        others.append(make(corpus=ListCorpus(train=["a"])))
        assert all(other.fingerprint() != first for other in others)

    def test_summary_counts_the_splits(self, make):
        data = make()
        data.prepare_data()
        summary = data.summary()
        assert set(summary["splits"]) == {"train", "validation"}
        assert summary["splits"]["train"]["documents"] == 12
        assert summary["vocab_size"] == 257 and summary["tokenizer"] == ByteTokenizer().fingerprint()

    def test_lightning_hooks_are_the_loaders(self, make):
        data = make(validation_tokens=64)
        data.start_step, data.num_steps = 2, 6
        check_equal(data.train_dataloader(), data.train_loader(2, 6))
        check_equal(data.val_dataloader(), data.evaluation_loader("validation", 32, 1, 64))
        data.trainer = SimpleNamespace(global_rank=1, world_size=2)
        check_equal(data.train_dataloader(), data.train_loader(2, 6, rank=1, world_size=2))
        data.num_steps = None
        assert len(data.train_dataloader()) == -(-data.train_windows.windows_per_epoch // 4)

    def test_no_validation_split_gives_no_validation(self, make):
        assert make(corpus=ListCorpus(train=["text"])).val_dataloader() == []


class TestConfigs:
    @pytest.mark.parametrize("name", ["sotu", "text", "jsonl", "parquet", "hub"])
    def test_data(self, name, tmp_path):
        node = OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")
        file = tmp_path / f"a.{name}"
        file.write_text("x")
        for key, value in {"path": str(file), "name": "some/set"}.items():
            if OmegaConf.is_missing(node.corpus, key):
                node.corpus[key] = value
        data = hydra.utils.instantiate(node, tokenizer=ByteTokenizer(), seq_len=8, batch_size=1, seed=0)
        assert isinstance(data, TokenData)
        assert "train" in data.splits and "validation" in data.splits

    @pytest.mark.parametrize(("name", "vocab_size"), [("bytes", 257), ("bpe", 4096)])
    def test_tokenizer(self, name, vocab_size):
        tokenizer = hydra.utils.instantiate(OmegaConf.load(CONFIGS / "tokenizer" / f"{name}.yaml"))
        assert tokenizer.vocab_size == vocab_size

    def test_tokenizer_file(self):
        node = OmegaConf.load(CONFIGS / "tokenizer" / "file.yaml")
        with pytest.raises(hydra.errors.InstantiationException, match=r"tokenizer\.path: cannot read no\.json"):
            hydra.utils.instantiate(node, path="no.json")


class TestRoom:
    """A window longer than the text to train on is refused before a model is built; in validation it is said."""

    def of(self, tmp_path, seq_len, **documents) -> TokenData:
        corpus = ListCorpus(**documents)
        return TokenData(corpus, ByteTokenizer(), seq_len=seq_len, batch_size=1, seed=0, cache_dir=str(tmp_path))

    def test_train(self, tmp_path):
        data = self.of(tmp_path, 1_000_000_000, train=["a" * 99], validation=["b"])
        data.setup("validate")
        with pytest.raises(
            ConfigError, match="seq_len=1000000000 is longer than the train split of list, which has 100 "
        ):
            data.setup("fit")

    def test_validation(self, tmp_path, caplog):
        self.of(tmp_path, 100, train=["a" * 99], validation=["b" * 98]).setup("fit")
        assert "seq_len=100 is longer than the validation split of list, " in caplog.text
        assert "which has 99 tokens" in caplog.text

    def test_enough(self, tmp_path, caplog):
        self.of(tmp_path, 100, train=["a" * 99], validation=["b" * 99]).setup("fit")
        assert "longer than" not in caplog.text

    def test_every_part_of_a_mixture(self, tmp_path):
        corpora = {"long": ListCorpus(train=["a" * 999], validation=["b" * 99]), "short": ListCorpus(train=["c" * 9])}
        data = MixtureData(
            corpora, {"long": 1, "short": 1}, ByteTokenizer(), seq_len=64, batch_size=1, seed=0, cache_dir=str(tmp_path)
        )
        with pytest.raises(ConfigError, match="seq_len=64 is longer than the train split of short, which has 10 tok"):
            data.setup("fit")
