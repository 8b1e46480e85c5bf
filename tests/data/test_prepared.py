"""Token files in shards, shuffled in groups; read from folders and from remote storage, a few shards at a time."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from list_corpus import ListCorpus, distinct_documents

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.command_line.program import program
from longmix.config import build, resolved
from longmix.data import prepared, windows
from longmix.data.prepare_run import prepare_splits
from longmix.data.prepared import LEAST_SHARDS, PreparedData, RemoteShards, prepared_tokenizer
from longmix.data.tokens.bpe import BpeTokenizer
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.sealed_folder import read_manifest, seal
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.data.windows import TrainWindows, order_key, shard_groups
from longmix.errors import ConfigError, DataError
from longmix.files import sha256_of_json
from longmix.invocation import Invocation
from longmix.training.run import train

TEXTS = [f"document number {number}: " + "abcdefgh"[number % 8] * (number % 50) for number in range(200)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("longmix.data.tokens.encoding.BATCH_DOCUMENTS", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Token files of a train split in some fifty shards, and of a validation split in one."""
    cache = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("longmix.data.tokens.encoding.BATCH_DOCUMENTS", 3)
        corpus = ListCorpus(train=TEXTS, validation=TEXTS[:9])
        for split in corpus.splits:
            prepare(corpus, ByteTokenizer(), split, cache, Preparation(shard_tokens=100))
    return cache


@pytest.fixture
def remote(folder):
    """The same in a remote file system."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(folder), "/bucket/tokens", recursive=True)
    yield "memory://bucket/tokens"
    filesystem.rm("/bucket", recursive=True)


def data_at(path: str | Path, tmp_path: Path, **settings) -> PreparedData:
    words = {"seq_len": 32, "batch_size": 4, "seed": 0, "cache_dir": str(tmp_path / "cache"), **settings}
    return PreparedData(str(path), words.pop("tokenizer", ByteTokenizer()), **words)


class TestShuffle:
    def test_an_epoch_has_every_token_once(self, folder, tmp_path):
        token_file = data_at(folder, tmp_path).token_file("train")
        assert len(token_file.shards) > 3 * windows.SHARDS_TOGETHER
        for epoch in (0, 1):
            order = TrainWindows(token_file, 32, seed=5)
            seen = np.concatenate([order.window(epoch, index).tokens for index in range(order.windows_per_epoch)])
            expected = np.bincount(np.asarray(token_file.tokens), minlength=257)
            expected[256] += len(seen) - token_file.num_tokens  # the last window is filled up with separators
            np.testing.assert_array_equal(np.bincount(seen, minlength=257), expected)

    def test_windows_read_the_shards_of_one_group_at_a_time(self, folder, tmp_path):
        token_file = data_at(folder, tmp_path).token_file("train")
        order = TrainWindows(token_file, 32, seed=5)
        used = _shards_of_each_window(order, token_file)
        groups = len(token_file.shards) / windows.SHARDS_TOGETHER
        span = int(order.windows_per_epoch / groups)
        assert len(set().union(*used[: span // 2])) <= windows.SHARDS_TOGETHER
        first, last = set().union(*used[: span // 2]), set().union(*used[-span // 2 :])
        assert not first & last
        assert used != _shards_of_each_window(TrainWindows(token_file, 32, seed=6), token_file)

    def test_groups_change_with_the_epoch(self, folder, tmp_path):
        token_file = data_at(folder, tmp_path).token_file("train")
        groups = [sorted(shard_groups(token_file, token_file.offsets[:-1], 5, epoch)[0].tolist()) for epoch in (0, 1)]
        assert groups[0] != groups[1]

    def test_few_shards_are_mixed_as_one(self, tmp_path):
        corpus = ListCorpus(train=distinct_documents([30] * 24))
        one = prepare(corpus, ByteTokenizer(), "train", tmp_path / "one")
        few = prepare(corpus, ByteTokenizer(), "train", tmp_path / "few", Preparation(300))
        assert len(one.shards) == 1 < len(few.shards) <= windows.SHARDS_TOGETHER
        assert order_key(one) == order_key(few)
        for index in range(20):
            first, second = (TrainWindows(token_file, 16, seed=3).window(0, index) for token_file in (one, few))
            np.testing.assert_array_equal(first.tokens, second.tokens)

    def test_the_order_is_part_of_what_a_run_resumes_on(self, folder, tmp_path):
        many = data_at(folder, tmp_path)
        one = prepare(ListCorpus(train=TEXTS, validation=TEXTS[:9]), ByteTokenizer(), "train", tmp_path / "one")
        assert many.token_file("train").manifest["key"] == one.manifest["key"]
        assert many.fingerprint()["train_key"] != order_key(one) == one.manifest["key"]


def _shards_of_each_window(order: TrainWindows, token_file) -> list[set[int]]:
    used: list[set[int]] = []
    ends = np.cumsum(token_file.shards)

    class Noting:
        def __getitem__(self, places):
            used.append(set(np.searchsorted(ends, places, side="right").tolist()))
            return token_file.tokens[places]

    epoch = order._shuffle(0)
    stream = epoch.stream
    stream._token_file = type("Noted", (), {"tokens": Noting(), **{
        name: getattr(token_file, name) for name in ("num_tokens", "separator_id", "offsets")
    }})()  # fmt: skip
    for index in epoch.order.tolist():
        stream.window(index)
    return used


class TestRemote:
    def test_batches_are_those_of_the_folder(self, folder, remote, tmp_path):
        local, far = data_at(folder, tmp_path), data_at(remote, tmp_path)
        for ours, theirs in zip(local.train_loader(0, 40), far.train_loader(0, 40), strict=True):
            assert (ours["tokens"] == theirs["tokens"]).all() and (ours["targets"] == theirs["targets"]).all()
        lengths = {len(data.evaluation_windows("validation", 32, None)) for data in (local, far)}
        assert len(lengths) == 1
        assert far.fingerprint() == local.fingerprint()
        assert far.splits == ("train", "validation")

    def test_no_more_copies_than_allowed(self, remote, tmp_path, monkeypatch):
        far = data_at(remote, tmp_path)
        token_file = far.token_file("train")
        fetched = []
        download = prepared.download
        monkeypatch.setattr(prepared, "download", lambda url, *rest: (fetched.append(url), download(url, *rest)))
        for _ in far.train_loader(0, far.train_windows.windows_per_epoch // 4):
            copies = list(token_file.folder.glob("tokens-*.bin"))
            assert 0 < len(copies) <= LEAST_SHARDS
        assert len(set(fetched)) == len(token_file.shards)
        assert len(fetched) < 1.5 * len(token_file.shards)  # a group is read and done with

    def test_a_damaged_shard_is_refused_by_name(self, remote, tmp_path):
        filesystem = fsspec.filesystem("memory")
        (shard,) = [path for path in filesystem.find("/bucket") if "-train-" in path and path.endswith("-00000.bin")]
        content = bytearray(filesystem.cat(shard))
        content[5] ^= 1
        filesystem.pipe(shard, bytes(content))
        with pytest.raises(DataError, match=r"tokens-00000\.bin cannot be used: expected SHA-256 .* upload"):
            data_at(remote, tmp_path).token_file("train").tokens[:10]

    def test_an_altered_copy_is_fetched_again(self, remote, tmp_path, caplog):
        first = data_at(remote, tmp_path).token_file("train")
        wanted, offsets = np.array(first.tokens), np.array(first.offsets)
        for path in [*first.folder.glob("tokens-*.bin"), *first.folder.glob("offsets*.bin")]:
            content = bytearray(path.read_bytes())
            content[5] ^= 1
            path.write_bytes(content)
        prepared._verified.clear()  # as in another process
        again = data_at(remote, tmp_path).token_file("train")
        np.testing.assert_array_equal(np.asarray(again.tokens), wanted)
        np.testing.assert_array_equal(again.offsets, offsets)
        assert "is not what was fetched" in caplog.text

    def test_a_copy_that_changes_while_a_process_uses_it_is_fetched_again(self, remote, tmp_path):
        token_file = data_at(remote, tmp_path).token_file("train")
        path = token_file.source.fetch("tokens-00000.bin")
        before = path.read_bytes()
        path.unlink()
        path.write_bytes(bytes(len(before)))
        assert token_file.source.fetch("tokens-00000.bin").read_bytes() == before

    def test_data_made_anew_with_equal_sizes_are_fetched_anew(self, remote, tmp_path):
        old = np.array(data_at(remote, tmp_path).token_file("validation").tokens)
        filesystem = fsspec.filesystem("memory")
        places = {
            split: prepared.find_splits(remote)[split].removeprefix("memory:/") for split in ("train", "validation")
        }
        filesystem.rm("/bucket", recursive=True)
        corpus = ListCorpus(train=[text.swapcase() for text in TEXTS], validation=[t.swapcase() for t in TEXTS[:9]])
        for split in corpus.splits:
            made = prepare(corpus, ByteTokenizer(), split, tmp_path / "new", Preparation(shard_tokens=100))
            filesystem.put(str(made.folder), places[split], recursive=True)
        new = data_at(remote, tmp_path).token_file("validation")
        assert len(new.tokens) == len(old) and (np.asarray(new.tokens) != old).any()
        names = [path.name for path in new.folder.glob("*.bin")]
        assert len(names) == len({name.rpartition("-")[0] for name in names})  # no copies of the old data stay

    @pytest.mark.parametrize("place", ["folder", "remote"])
    def test_a_token_that_the_tokenizer_does_not_have_is_refused_by_name(self, tmp_path, remote, place):
        prepare(ListCorpus(train=TEXTS), ByteTokenizer(), "train", tmp_path / "made")
        (made,) = [path for path in (tmp_path / "made").iterdir() if path.is_dir()]
        tokens = np.fromfile(made / "tokens-00000.bin", "<u2")
        tokens[7] = 257
        tokens.tofile(made / "tokens-00000.bin")
        manifest = read_manifest(made / "manifest.json")
        (made / "manifest.json").unlink()
        del manifest["files"]
        seal(made, manifest)
        path = str(tmp_path / "made")
        if place == "remote":
            fsspec.filesystem("memory").put(path, "/bucket/wrong", recursive=True)
            path = "memory://bucket/wrong"
        with pytest.raises(
            DataError, match=r"tokens-00000\S*\.bin cannot be used: it holds the token 257, .* 0 to 256"
        ):
            data_at(path, tmp_path).token_file("train").tokens[:1]

    @pytest.mark.parametrize(
        ("entry", "value"),
        [
            ("dtype", "|O"),
            ("dtype", 3),
            ("shards", []),
            ("shards", [0]),
            ("shards", ["1"]),
            ("shards", {}),
            ("tokens", 10**30),
            ("tokens", -1),
            ("documents", None),
            ("documents", 1e9),
            ("vocab_size", True),
            ("separator_id", 999),
            ("separator_id", None),
            ("tokenizer", 5),
            ("key", None),
            ("files", []),
            ("files", {"../x": {"bytes": 1, "sha256": ""}}),
            ("files", {"x": {"bytes": "1", "sha256": ""}}),
            ("files", {"x": None}),
            ("files", {}),
        ],
    )
    def test_a_manifest_of_other_types_is_refused_by_name(self, tmp_path, entry, value):
        made = prepare(ListCorpus(train=TEXTS[:5]), ByteTokenizer(), "train", tmp_path / "made").folder
        manifest = read_manifest(made / "manifest.json") | {entry: value}
        manifest["manifest_sha256"] = sha256_of_json(manifest)
        (made / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=str(made)):
            data_at(tmp_path / "made", tmp_path).token_file("train")

    @pytest.mark.parametrize("content", ['{"kind": "bytds"}', "[]", "{", '{"kind": "library"}', "[" * 10**6])
    def test_a_damaged_tokenizer_is_refused_by_name(self, tmp_path, content):
        made = prepare(ListCorpus(train=TEXTS[:5]), ByteTokenizer(), "train", tmp_path / "made").folder
        (made / "tokenizer_state.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer_state\.json"):
            prepared_tokenizer(str(tmp_path / "made"))

    def test_a_storage_that_fails_for_a_while_is_tried_again(self, remote, tmp_path, monkeypatch):
        monkeypatch.setattr("longmix.data.corpora.retry.FIRST_PAUSE_SECONDS", 0.001)
        filesystem, failures = fsspec.filesystem("memory"), [TimeoutError("slow"), ConnectionError("gone")]
        get_file = type(filesystem).get_file

        def failing(self, *arguments, **options):
            if failures:
                raise failures.pop()
            return get_file(self, *arguments, **options)

        monkeypatch.setattr(type(filesystem), "get_file", failing)
        assert data_at(remote, tmp_path).token_file("train").num_documents == 200
        failures += [TimeoutError("slow")] * 9
        with pytest.raises(DataError, match="could not be read in 4 tries: TimeoutError: slow"):
            data_at(remote, tmp_path / "other").token_file("train")
        failures.clear()

    def test_copies_travel_as_little_as_folders(self, remote, tmp_path):
        import pickle

        token_file = data_at(remote, tmp_path).token_file("train")
        token_file.tokens[:5]
        again = pickle.loads(pickle.dumps(token_file))
        assert isinstance(again.source, RemoteShards) and (again.tokens[:50] == token_file.tokens[:50]).all()


class TestRefusals:
    def test_nothing_there(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="holds no token file of a train split"):
            data_at(tmp_path / "empty", tmp_path).token_file("train")
        with pytest.raises(DataError, match=r"data\.path=.*nowhere cannot be listed"):
            data_at(tmp_path / "nowhere", tmp_path).token_file("train")
        with pytest.raises(DataError, match=r"data\.path=what://x cannot be listed: .*what"):
            data_at("what://x", tmp_path).token_file("train")

    def test_two_corpora(self, tmp_path):
        for text in "ab":
            prepare(ListCorpus(train=[text]), ByteTokenizer(), "train", tmp_path / "both")
        with pytest.raises(DataError, match="several token files of the train split"):
            data_at(tmp_path / "both", tmp_path).token_file("train")

    def test_a_split_that_is_not_there(self, folder, tmp_path):
        with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
            data_at(folder, tmp_path).token_file("test")

    def test_another_tokenizer(self, folder, tmp_path):
        trained = BpeTokenizer(270)
        with pytest.raises(DataError, match=r"no text to train a tokenizer on; train with tokenizer=prepared"):
            data_at(folder, tmp_path, tokenizer=trained).token_file("train")
        other = tokenizer_from_state(trained.prepare(ListCorpus(train=TEXTS), tmp_path).state())
        with pytest.raises(DataError, match=r"another tokenizer .* train with tokenizer=prepared"):
            data_at(folder, tmp_path, tokenizer=other).token_file("train")

    def test_no_path(self, compose_config):
        for words in (["data=prepared"], ["data=prepared", "tokenizer=prepared"]):
            with pytest.raises(ConfigError, match=r"^no value was given for: data\.path\.$"):
                resolved(compose_config(*words))

    def test_too_few_copies(self, folder, tmp_path):
        with pytest.raises(ConfigError, match=rf"data\.local_shards=31 must be at least {LEAST_SHARDS}"):
            data_at(folder, tmp_path, local_shards=31)


class TestTokenizer:
    @pytest.mark.parametrize("kind", ["bytes", "bpe"])
    def test_comes_from_the_folder(self, tmp_path, kind):
        corpus = ListCorpus(train=TEXTS)
        tokenizer = ByteTokenizer() if kind == "bytes" else BpeTokenizer(300).prepare(corpus, tmp_path / "trained")
        prepare(corpus, tokenizer, "train", tmp_path / "cache")
        assert prepared_tokenizer(str(tmp_path / "cache")).fingerprint() == tokenizer.fingerprint()

    def test_comes_from_remote_storage(self, remote, tmp_path):
        assert prepared_tokenizer(remote, str(tmp_path)).fingerprint() == ByteTokenizer().fingerprint()


class TestCommand:
    @pytest.fixture
    def words(self, tmp_path) -> list[str]:
        (tmp_path / "texts").mkdir()
        for number, text in enumerate(TEXTS):
            (tmp_path / "texts" / f"{number}.txt").write_text(text)
        return ["data=text", f"data.corpus.path={tmp_path}/texts", f"data.cache_dir={tmp_path}/cache"]

    def test_makes_what_training_finds(self, words, compose_config, run_training, tmp_path, capsys):
        made = prepare_splits(compose_config(*words, "shard_tokens=1000", "tokenizer=bpe", "tokenizer.vocab_size=280",
                                             entry_point="prepare"))  # fmt: skip
        assert [entry["split"] for entry in made] == ["train", "validation"] and made[0]["shards"] > 1
        assert made[0]["folder"] in capsys.readouterr().out
        path = Path(made[0]["folder"]).parent
        folder = run_training("data=prepared", f"data.path={path}", f"data.cache_dir={tmp_path}/other",
                              "tokenizer=prepared", "seq_len=16")  # fmt: skip
        state = load_checkpoint(find_checkpoint(folder))
        assert state["tokenizer"] == prepared_tokenizer(str(path)).state()

    def test_names_the_command_that_trains_on_it_by_the_words_of_its_invocation(self, words, compose_config, capsys):
        config = compose_config(*words, "workers=0", entry_point="prepare")
        invocation = Invocation(Path("unused"), (*words, "workers=0", "tokenizer=bytes"))
        prepare_splits(config, invocation)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to train on them:")]
        assert [line.split() for line in lines] == [
            ["to", "train", "on", "them:", *program("train").split(), *words, "tokenizer=bytes"]
        ]

    def test_called_from_python_it_reads_nothing_of_hydra(self, words, compose_config, capsys):
        prepare_splits(compose_config(*words, entry_point="prepare"))
        out = capsys.readouterr().out
        assert "without the texts:" in out and "to train on them:" not in out

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["splits=[dev]"], r"splits=\['dev'\] must be among those of the data: train, validation"),
            (["splits=[]"], "must be among"),
            (["workers=-1"], "workers=-1 must be at least 0"),
            (["+worker=1"], "unknown key worker. Did you mean workers"),
            (["data.corpus.pth=x"], "pth"),
        ],
    )
    def test_impossible_words_are_refused(self, words, compose_config, given, message):
        with pytest.raises(Exception, match=message):
            prepare_splits(compose_config(*words, *given, entry_point="prepare"))

    def test_synthetic_data_need_nothing(self, compose_config):
        with pytest.raises(DataError, match="made when they are needed"):
            prepare_splits(compose_config("data=mqar", entry_point="prepare"))


@pytest.mark.parametrize("data", ["sotu", "mqar", "text"])
def test_its_tokenizer_alone_names_the_data_it_needs(data, compose_config):
    words = ["data.corpus.path=x"] if data == "text" else []
    node = resolved(compose_config("tokenizer=prepared", f"data={data}", *words))["tokenizer"]
    with pytest.raises(ConfigError, match=r"tokenizer=prepared is .* give data=prepared data\.path=FOLDER too"):
        build(node, "tokenizer")


@pytest.fixture(scope="module")
def train_alone(tmp_path_factory) -> Path:
    """Token files of a train split, and none for validation."""
    cache = tmp_path_factory.mktemp("alone")
    prepare(ListCorpus(train=TEXTS), ByteTokenizer(), "train", cache)
    return cache


class TestWithoutValidation:
    @pytest.mark.parametrize("place", ["folder", "remote"])
    def test_is_refused_before_the_first_step(self, train_alone, place, tmp_path):
        path = str(train_alone)
        if place == "remote":
            fsspec.filesystem("memory").put(path, "/alone/tokens", recursive=True)
            path = "memory://alone/tokens"
        message = "has no token file of a validation split, which training needs. Run prepare.py with data.corpus.valid"
        data = data_at(path, tmp_path)
        for use in (data.prepare_data, lambda: data.setup("fit")):
            with pytest.raises(DataError, match=message):
                use()
        assert data.token_file("train").num_documents == len(TEXTS)  # evaluations and the like read it

    def test_leaves_no_run(self, train_alone, compose_config, tmp_path):
        words = ("data=prepared", f"data.path={train_alone}", "tokenizer=prepared", "logger=csv", "trainer=cpu")
        (tmp_path / "run").mkdir()
        with pytest.raises(DataError, match="which training needs"):
            train(compose_config(*words, "seq_len=32", "name=x", output=tmp_path / "run"))
        assert not list(tmp_path.glob("run/*"))

    def test_prepare_says_so(self, compose_config, tmp_path, capsys):
        (tmp_path / "texts").mkdir()
        for number in range(9):
            (tmp_path / "texts" / f"{number}.txt").write_text(f"document {number}")
        for fraction, said in ((0, "a validation split is needed"), (0.05, "without the texts: longmix train")):
            words = [f"data.corpus.path={tmp_path}/texts", f"data.cache_dir={tmp_path}/cache{fraction}"]
            words.append(f"data.corpus.validation_fraction={fraction}")
            prepare_splits(compose_config("data=text", *words, entry_point="prepare"))
            out = capsys.readouterr().out
            assert said in out
            assert ("longmix train" in out) == (fraction > 0)
