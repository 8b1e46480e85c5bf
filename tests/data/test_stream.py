"""Streams: the same tokens as a download, no more read than needed, and nothing lost by kills and broken networks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pyarrow
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from list_corpus import ListCorpus, PartedList
from pyarrow import parquet

from longmix.data.corpora import stream
from longmix.data.corpora.hub import HubDataset
from longmix.data.prepare_run import prepare_splits
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError, DataError

TEXTS = [f"document {number} " + "abcdefgh"[number % 8] * (7 * number % 60) for number in range(120)]
TEXTS[7] = TEXTS[61] = ""
PER_FILE, PER_GROUP = 40, 15
TELLS_GROUPS = int(datasets.__version__.partition(".")[0]) >= 5
"""Whether the library gives the row groups of a parquet file apart."""
HOW = Preparation(shard_tokens=300)


def write_parquet(folder: Path, name: str, texts: list[str]) -> None:
    table = pyarrow.table({"number": list(range(len(texts))), "text": pyarrow.array(texts, pyarrow.string())})
    parquet.write_table(table, folder / f"{name}.parquet", row_group_size=PER_GROUP)


def write_json(folder: Path, name: str, texts: list[str]) -> None:
    nothing = [None, ""]
    lines = [json.dumps({"text": text or nothing[number % 2], "number": number}) for number, text in enumerate(texts)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


WRITERS = {"parquet": write_parquet, "json": write_json}
formats = pytest.mark.parametrize("kind", list(WRITERS))


def write_set(folder: Path, kind: str, texts: list[str] = TEXTS) -> str:
    """A data set of several files, as the hub lays it out."""
    (folder / "train").mkdir(parents=True)
    for number, start in enumerate(range(0, len(texts), PER_FILE)):
        WRITERS[kind](folder / "train", f"{number:02}", texts[start : start + PER_FILE])
    return str(folder)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("longmix.data.tokens.encoding.BATCH_DOCUMENTS", 4)
    monkeypatch.setattr("longmix.data.corpora.retry.FIRST_PAUSE_SECONDS", 0.0001)
    monkeypatch.setattr(stream, "TOGETHER", 3)


@pytest.fixture
def rows_read(monkeypatch) -> list[str]:
    """Texts that left the files."""
    seen: list[str] = []
    rows = stream._rows

    def noting(records, field):
        for row in rows(records, field):
            seen.append(row[field])
            yield row

    monkeypatch.setattr(stream, "_rows", noting)
    return seen


class DyingTokenizer(ByteTokenizer):
    """Fails at a text that begins so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def encode_batch(self, texts):
        if any(text.startswith(self.beginning) for text in texts):
            raise RuntimeError("died")
        return super().encode_batch(texts)


def tokens_of(corpus, folder: Path, split: str = "train", how: Preparation = HOW) -> np.ndarray:
    return np.asarray(prepare(corpus, ByteTokenizer(), split, folder, how).tokens)


class TestSameTokens:
    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            ("parquet", {}),
            ("json", {}),
            ("json", {"max_documents": 50}),
            ("parquet", {"max_bytes": 2000}),
            ("json", {"max_documents": 90, "max_bytes": 10**9}),
        ],
        ids=["parquet-all", "json-all", "json-documents", "parquet-bytes", "json-both"],
    )
    def test_as_a_download(self, tmp_path, kind, settings):
        name = write_set(tmp_path / "set", kind)
        far, near = (
            HubDataset(name, validation_fraction=0.2, test_fraction=0.1, streaming=streaming, **settings)
            for streaming in (True, False)
        )
        for split in ("train", "validation", "test"):
            assert list(far.documents(split)) == list(near.documents(split))
            ours, theirs = (
                prepare(corpus, ByteTokenizer(), split, tmp_path / place, HOW)
                for corpus, place in ((far, "far"), (near, "near"))
            )
            np.testing.assert_array_equal(np.asarray(ours.tokens), np.asarray(theirs.tokens))
            np.testing.assert_array_equal(ours.offsets, theirs.offsets)
            for fact in ("documents", "tokens", "bytes", "empty_documents"):
                assert ours.manifest[fact] == theirs.manifest[fact]

    def test_a_split_of_its_own(self, tmp_path):
        name = write_set(tmp_path / "set", "json")
        (tmp_path / "set" / "dev").mkdir()
        write_json(tmp_path / "set" / "dev", "0", ["one", "two", "three"])
        settings = {"data_files": {"train": f"{name}/train/*", "held": f"{name}/dev/*"}, "validation": "held"}
        corpus = HubDataset("json", streaming=True, max_documents=2, **settings)
        assert list(corpus.documents("validation")) == ["one", "two"]
        assert list(corpus.documents("train")) == TEXTS[:2]
        assert prepare(corpus, ByteTokenizer(), "validation", tmp_path / "cache").num_documents == 2

    @formats
    @pytest.mark.parametrize("scheme", ["memory", "file"])
    def test_from_a_storage_that_fsspec_knows(self, tmp_path, kind, scheme, bucket):
        name = write_set(tmp_path / "set", kind)
        bucket.put(f"{name}/train", "/bucket/web", recursive=True)
        place = "memory://bucket/web" if scheme == "memory" else f"file://{name}/train"
        corpus = HubDataset(kind, data_files=f"{place}/*", streaming=True, validation_fraction=0)
        near = HubDataset(name, streaming=True, validation_fraction=0)
        assert list(corpus.documents("train")) == TEXTS
        np.testing.assert_array_equal(tokens_of(corpus, tmp_path / "a"), tokens_of(near, tmp_path / "b"))

    def test_files_without_records(self, tmp_path):
        name = write_set(tmp_path / "set", "parquet")
        for empty in ("00a", "zz"):
            write_parquet(tmp_path / "set" / "train", empty, [])
        corpus = HubDataset(name, streaming=True, validation_fraction=0)
        assert list(corpus.documents("train")) == TEXTS
        assert prepare(corpus, ByteTokenizer(), "train", tmp_path / "cache", HOW).num_documents == 118

    def test_small_files_share_a_shard(self, tmp_path):
        corpus = HubDataset(write_set(tmp_path / "set", "json"), streaming=True, validation_fraction=0)
        sizes = [sum(len(text) + 1 for text in TEXTS[start : start + PER_FILE] if text) for start in (0, 40, 80)]
        together = prepare(corpus, ByteTokenizer(), "train", tmp_path / "a", Preparation(sizes[0] + sizes[1]))
        assert together.shards == [sizes[0] + sizes[1], sizes[2]]
        apart = prepare(corpus, ByteTokenizer(), "train", tmp_path / "b", Preparation(sizes[0] + sizes[1] - 1))
        assert apart.shards == sizes
        np.testing.assert_array_equal(np.asarray(together.tokens), np.asarray(apart.tokens))


class TestLimit:
    @formats
    @pytest.mark.parametrize("settings", [{"max_documents": 46}, {"max_bytes": sum(map(len, TEXTS[:46])) - 1}])
    def test_nothing_beyond_it_is_read(self, tmp_path, kind, settings, rows_read):
        corpus = HubDataset(write_set(tmp_path / "set", kind), streaming=True, validation_fraction=0.3, **settings)
        corpus.fingerprint()  # looks for a first document of each split
        for split in corpus.splits:
            rows_read.clear()
            prepare(corpus, ByteTokenizer(), split, tmp_path / "cache", HOW)
            assert [text or "" for text in rows_read] == TEXTS[:46]
        assert sum(len(list(corpus.documents(split))) for split in corpus.splits) == 46

    @pytest.mark.parametrize("settings", [{"max_documents": 0}, {"max_bytes": -5}])
    def test_must_be_above_nothing(self, settings):
        with pytest.raises(ConfigError, match=r"data\.corpus\.max_(documents=0|bytes=-5) must be at least 1"):
            HubDataset("some/set", **settings)

    def test_a_held_out_split_that_is_too_small(self, tmp_path):
        corpus = HubDataset(
            write_set(tmp_path / "set", "json"), streaming=True, validation_fraction=1e-6, max_documents=1
        )
        with pytest.raises(DataError, match=r"validation split .* holds no text .* hold out or take more"):
            prepare(corpus, ByteTokenizer(), "validation", tmp_path / "cache")


class TestKills:
    @pytest.mark.parametrize(
        ("kind", "at", "limit"),
        [(kind, at, {}) for kind in WRITERS for at in (3, 39, 58)]
        + [(kind, 97, {"max_documents": 110}) for kind in WRITERS],
        ids=lambda value: str(value) if value != {} else "",
    )
    def test_what_died_goes_on_where_it_was(self, tmp_path, kind, limit, at, rows_read):
        corpus = HubDataset(write_set(tmp_path / "set", kind), streaming=True, validation_fraction=0.1, **limit)
        straight = prepare(corpus, ByteTokenizer(), "train", tmp_path / "straight", HOW)
        with pytest.raises(RuntimeError, match="died"):
            prepare(corpus, DyingTokenizer(f"document {at} "), "train", tmp_path / "cache", HOW)
        rows_read.clear()
        resumed = prepare(corpus, ByteTokenizer(), "train", tmp_path / "cache", HOW)
        assert resumed.manifest == straight.manifest
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [resumed.folder.name]
        again = min(TEXTS.index(text) for text in rows_read if text)
        wanted = [number for number, text in enumerate(TEXTS) if text and corpus._split_of(text) == "train"]
        if at not in wanted:
            pytest.fail("the document it died at must be one of the train split")
        by_group = kind == "parquet" and TELLS_GROUPS
        if not by_group:  # no file that is done is read again
            assert again == at // PER_FILE * PER_FILE
        else:  # nor a row group; a shard has about twelve documents
            assert again % PER_FILE % PER_GROUP == 0 and again >= at - PER_GROUP - 16
        assert (again > 0) == (at > (PER_GROUP if by_group else PER_FILE))

    @formats
    def test_a_file_is_read_from_any_record(self, tmp_path, kind, rows_read):
        corpus = HubDataset(write_set(tmp_path / "set", kind), streaming=True)
        for first in range(0, PER_FILE + 1):
            rows_read.clear()
            assert list(corpus._stream("train").texts(1, first)) == TEXTS[PER_FILE + first : 2 * PER_FILE]
            skipped = first - first % PER_GROUP if kind == "parquet" and TELLS_GROUPS and first < PER_FILE else 0
            assert first == PER_FILE or len(rows_read) == PER_FILE - skipped

    def test_parts_that_are_done_are_not_read_again(self, tmp_path, rows_read):
        texts = [f"text {number}" for number in range(PER_FILE)]
        name = write_set(tmp_path / "set", "json", ["" for _ in texts] + texts)
        corpus = HubDataset(name, streaming=True, validation_fraction=0)
        with pytest.raises(RuntimeError, match="died"):
            prepare(corpus, DyingTokenizer("text 0"), "train", tmp_path / "cache", HOW)
        rows_read.clear()
        token_file = prepare(corpus, ByteTokenizer(), "train", tmp_path / "cache", HOW)
        assert rows_read == texts  # the first file holds nothing, and this is known
        assert token_file.manifest["empty_documents"] == PER_FILE

    def test_a_piece_that_is_gone_is_made_again(self, tmp_path):
        corpus = PartedList(PER_FILE, train=TEXTS)
        straight = prepare(corpus, ByteTokenizer(), "train", tmp_path / "straight", HOW)
        with pytest.raises(RuntimeError, match="died"):
            prepare(corpus, DyingTokenizer("document 97 "), "train", tmp_path / "cache", HOW)
        part = next(tmp_path.glob("cache/.*.pieces/part-00000"))
        shutil.rmtree(max(part.glob("tokens-*.bin")))
        assert prepare(corpus, ByteTokenizer(), "train", tmp_path / "cache", HOW).manifest == straight.manifest

    @pytest.mark.slow
    def test_processes_end_with_the_one_that_was_killed(self, tmp_path):
        name = write_set(tmp_path / "set", "json")
        (tmp_path / "slow.py").write_text(SLOW)
        arguments = [sys.executable, str(tmp_path / "slow.py"), name, str(tmp_path)]
        process = subprocess.Popen(arguments, start_new_session=True)
        deadline = time.monotonic() + 500
        while len(list(tmp_path.glob("cache/.*.pieces/part-*/tokens-00001.bin"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while _alive_in_group(process.pid):
            assert time.monotonic() < deadline, "processes that tokenise outlived the one they work for"
            time.sleep(0.05)
        kept = len(list(tmp_path.glob("cache/.*.pieces/part-*/tokens-*.bin")))
        assert kept >= 2
        corpus = HubDataset(name, streaming=True, validation_fraction=0)
        resumed = prepare(corpus, ByteTokenizer(), "train", tmp_path / "cache", HOW)
        texts = [text for text in TEXTS if text]
        assert resumed.num_documents == len(texts)
        assert bytes(np.asarray(resumed.tokens)[np.asarray(resumed.tokens) < 256].astype(np.uint8)) == (
            "".join(texts).encode()
        )
        assert list((tmp_path / "cache").iterdir()) == [resumed.folder]


SLOW = """
import sys, time
from pathlib import Path
from longmix.data.corpora import stream
from longmix.data.tokens import encoding
from longmix.data.corpora.hub import HubDataset
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.tokenizers import ByteTokenizer
encoding.BATCH_DOCUMENTS = 4

class Slow(ByteTokenizer):
    def encode_batch(self, texts):
        time.sleep(0.3)
        return super().encode_batch(texts)

if __name__ == "__main__":
    corpus = HubDataset(sys.argv[1], streaming=True, validation_fraction=0)
    prepare(corpus, Slow(), "train", Path(sys.argv[2]) / "cache", Preparation(300, workers=2))
"""


def _alive_in_group(group: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(of_group) == group and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.fixture
def bucket():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


class TestNetwork:
    @pytest.fixture
    def failing(self, monkeypatch):
        """Reads that fail so often before each of these records, by their texts."""
        rows, failures = stream._rows, {}

        def unsteady(records, field):
            for row in rows(records, field):
                if failures.get(row[field], 0) > 0:
                    failures[row[field]] -= 1
                    raise TimeoutError("gone")
                yield row

        monkeypatch.setattr(stream, "_rows", unsteady)
        return failures

    @formats
    def test_failures_in_the_middle_are_tried_again_and_lose_nothing(self, tmp_path, kind, failing, caplog):
        corpus = HubDataset(write_set(tmp_path / "set", kind), streaming=True, validation_fraction=0.1)
        straight = prepare(corpus, ByteTokenizer(), "train", tmp_path / "straight", HOW)
        failing.update({TEXTS[number]: stream.TRIES - 1 for number in (0, 17, 18, 39, 40, 77, 119)})
        unsteady = prepare(corpus, ByteTokenizer(), "train", tmp_path / "unsteady", HOW)
        assert unsteady.manifest == straight.manifest
        assert not any(failing.values())
        assert "could not be read (TimeoutError: gone); trying again" in caplog.text

    def test_a_storage_that_stays_away_is_one_error_and_what_was_made_stays(self, tmp_path, failing, rows_read):
        corpus = HubDataset(write_set(tmp_path / "set", "json"), streaming=True, validation_fraction=0)
        straight = prepare(corpus, ByteTokenizer(), "train", tmp_path / "straight", HOW)
        failing[TEXTS[50]] = stream.TRIES
        with pytest.raises(DataError, match=rf"01\.jsonl .* in {stream.TRIES} tries: TimeoutError: gone"):
            prepare(corpus, ByteTokenizer(), "train", tmp_path / "cache", HOW)
        rows_read.clear()
        assert prepare(corpus, ByteTokenizer(), "train", tmp_path / "cache", HOW).manifest == straight.manifest
        assert rows_read[0] == TEXTS[PER_FILE]

    @pytest.mark.parametrize(
        "error", [FileNotFoundError("no such file"), ValueError("bad format")], ids=["gone", "bad"]
    )
    def test_what_would_fail_again_is_not_tried_again(self, tmp_path, monkeypatch, error, caplog):
        corpus = HubDataset(write_set(tmp_path / "set", "json"), streaming=True)

        def fail(records, field):
            raise error
            yield

        monkeypatch.setattr(stream, "_rows", fail)
        with pytest.raises(DataError, match=rf"00\.jsonl of split 'train' of .* cannot be read: .*{error}"):
            list(corpus.documents("train"))
        assert "trying again" not in caplog.text

    def test_files_that_cannot_be_opened_for_a_while(self, tmp_path, bucket, monkeypatch):
        bucket.put(f"{write_set(tmp_path / 'set', 'json')}/train", "/bucket/web", recursive=True)
        corpus = HubDataset("json", data_files="memory://bucket/web/*", streaming=True, validation_fraction=0)
        reading = corpus.read("train", 1)
        opened, tries = MemoryFileSystem._open, iter(range(100))

        def unsteady(self, *arguments, **options):
            if next(tries) % 3:
                raise ConnectionError("refused")
            return opened(self, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, "_open", unsteady)
        next(tries)
        assert list(reading) == TEXTS[PER_FILE : 2 * PER_FILE]
        assert next(tries) > 3


class TestFingerprint:
    @pytest.fixture
    def hub(self, monkeypatch, tmp_path):
        """A hub on which branches lead to commits; `hub.commit` is where "main" stands."""
        import datasets

        build = datasets.load_dataset_builder
        place = write_set(tmp_path / "set", "json")
        (tmp_path / "set" / "dev").mkdir()
        write_json(tmp_path / "set" / "dev", "0", ["held out"])
        state = SimpleNamespace(commit="a" * 40, asked=[])

        def load_dataset_builder(name, config, revision=None):
            commit = state.commit if revision in (None, "main") else revision
            state.asked.append(commit)
            builder = build(place)
            files = {
                split: [
                    f"hf://datasets/{name}@{commit}/{split}/{Path(file).name}" for file in builder.config.data_files[of]
                ]
                for split, of in (("train", "train"), ("dev", "validation"))
            }
            return SimpleNamespace(
                config=SimpleNamespace(data_files=files),
                as_streaming_dataset=lambda split: builder.as_streaming_dataset(
                    split={"train": "train", "dev": "validation"}[split]
                ),
            )

        monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
        return state

    def test_a_branch_is_followed_to_its_commit(self, hub):
        streamed = lambda revision: HubDataset("some/set", revision=revision, streaming=True).fingerprint()  # noqa: E731
        first = streamed("main")
        assert first["sources"]["train"]["commits"] == ["a" * 40]
        assert streamed(None) == streamed("a" * 40) == first
        hub.commit = "b" * 40
        assert streamed("main") != first and streamed("a" * 40) == first
        json.dumps(first)

    def test_all_splits_are_of_one_commit(self, hub):
        corpus = HubDataset("some/set", revision="main", streaming=True, validation="dev")
        assert list(corpus.documents("train")) == TEXTS
        hub.commit = "b" * 40
        assert list(corpus.documents("validation")) == ["held out"]
        assert hub.asked == ["a" * 40]

    def test_limits_and_fractions_are_part_of_it(self, tmp_path):
        name = write_set(tmp_path / "set", "json")
        settings = [{}, {"max_documents": 5}, {"max_documents": 6}, {"max_bytes": 5}, {"validation_fraction": 0.5}]
        found = [json.dumps(HubDataset(name, streaming=True, **words).fingerprint()) for words in settings]
        assert len(set(found)) == len(settings)

    def test_local_files_are_known_by_their_content(self, tmp_path):
        first, changed = write_set(tmp_path / "a", "json"), write_set(tmp_path / "b", "json", [*TEXTS[:-1], "other"])
        fingerprint = lambda name: HubDataset(name, streaming=True).fingerprint()["sources"]  # noqa: E731
        before = fingerprint(first)
        for file in Path(first).glob("train/*"):
            os.utime(file, (1, 1))
        assert fingerprint(first) == before != fingerprint(changed)

    def test_remote_files_are_known_by_a_mark(self, tmp_path, bucket):
        bucket.put(f"{write_set(tmp_path / 'set', 'json')}/train", "/bucket/web", recursive=True)
        fingerprint = lambda: HubDataset("json", data_files="memory://bucket/web/*", streaming=True).fingerprint()  # noqa: E731
        first = fingerprint()
        assert fingerprint() == first
        bucket.pipe("/bucket/web/01.jsonl", bucket.cat("/bucket/web/01.jsonl"))
        assert fingerprint() != first

    def test_a_storage_that_tells_no_mark_is_refused(self, tmp_path, bucket, monkeypatch):
        bucket.put(f"{write_set(tmp_path / 'set', 'json')}/train", "/bucket/web", recursive=True)
        info = MemoryFileSystem.info
        monkeypatch.setattr(
            MemoryFileSystem,
            "info",
            lambda self, path, **options: {**info(self, path, **options), "created": None},
        )
        corpus = HubDataset("json", data_files="memory://bucket/web/*", streaming=True)
        with pytest.raises(DataError, match=r"memory://.*0\d\.jsonl: its storage tells neither a checksum"):
            corpus.fingerprint()

    def test_a_branch_in_an_address_is_no_identity(self, monkeypatch):
        seen = []
        monkeypatch.setattr(stream, "_mark", lambda file: seen.append(file) or ["ETag", "x", 1])
        commit, branch = (f"hf://datasets/some/set@{revision}/a.parquet" for revision in ("a" * 40, "main"))
        assert stream.identify_stream([commit, branch])["commits"] == ["a" * 40]
        assert seen == [branch]


class TestRefusals:
    def test_field(self, tmp_path):
        name = write_set(tmp_path / "set", "parquet")
        with pytest.raises(DataError, match=r"00\.parquet .* have no field 'body'; they have number, text"):
            list(HubDataset(name, field="body", streaming=True).documents("train"))
        with pytest.raises(DataError, match=r"field 'number' of record 0 of .*00\.parquet .* holds int, not text"):
            list(HubDataset(name, field="number", streaming=True).documents("train"))

    def test_only_the_text_is_read(self, tmp_path):
        corpus = HubDataset(write_set(tmp_path / "set", "parquet"), streaming=True)
        assert corpus._stream("train")._records.column_names == ["text"]

    def test_unknown_split_and_name(self, tmp_path):
        with pytest.raises(DataError, match=r"cannot load split 'dev' .*Bad split: dev"):
            list(HubDataset(write_set(tmp_path / "set", "json"), train="dev", streaming=True).documents("train"))
        with pytest.raises(DataError, match=r"cannot load split 'train' of the data set .*nowhere"):
            HubDataset(str(tmp_path / "nowhere"), streaming=True).fingerprint()


class TestCommands:
    def test_prepare_makes_what_it_is_told(self, tmp_path, compose_config, capsys):
        name = write_set(tmp_path / "set", "parquet")
        words = ["data=hub", f"data.corpus.name={name}", "data.corpus.streaming=true", "data.corpus.max_documents=100"]
        words += ["data.corpus.validation_fraction=0.2", f"data.cache_dir={tmp_path}/cache"]
        made = prepare_splits(compose_config(*words, "shard_tokens=1000", entry_point="prepare"))
        assert [entry["split"] for entry in made] == ["train", "validation"]
        assert sum(entry["documents"] for entry in made) == 98
        assert sum(entry["bytes"] for entry in made) == sum(len(text) for text in TEXTS[:100])

    def test_a_mixture_may_hold_a_stream(self, tmp_path, run_training):
        name = write_set(tmp_path / "set", "json")
        corpora = (
            f"data.corpora={{far:{{_target_:longmix.data.corpora.hub.HubDataset,name:'{name}',streaming:true,"
            "max_documents:100,validation_fraction:0.2},sotu:{_target_:longmix.data.corpora.sotu.Sotu}}"
        )
        words = ["data=mixture", corpora, "data.weights={far:2,sotu:1}", f"data.cache_dir={tmp_path}/cache"]
        run_training(*words, "seq_len=32")
        names = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").glob("*-train-*"))
        assert len(names) == 2 and names[1] == "sotu"


class TestParts:
    """Of any corpus that can be read in parts."""

    @pytest.mark.parametrize("workers", [0, 2])
    def test_join_in_their_order(self, tmp_path, workers):
        whole = prepare(ListCorpus(train=TEXTS), ByteTokenizer(), "train", tmp_path / "whole")
        how = Preparation(shard_tokens=2000, workers=workers)
        parts = prepare(PartedList(7, train=TEXTS), ByteTokenizer(), "train", tmp_path / "parts", how)
        np.testing.assert_array_equal(np.asarray(parts.tokens), np.asarray(whole.tokens))
        np.testing.assert_array_equal(parts.offsets, whole.offsets)
        assert all(count <= 2000 for count in parts.shards) and len(parts.shards) == 3
        for fact in ("documents", "tokens", "bytes", "empty_documents"):
            assert parts.manifest[fact] == whole.manifest[fact]

    def test_an_error_in_a_process_is_the_same_error(self, tmp_path):
        corpus = PartedList(10, train=[*TEXTS[:23], "b\udc80", *TEXTS[24:]])
        with pytest.raises(DataError, match=r"document 3 of the train split of list, part 2 .* lone surrogate"):
            prepare(corpus, ByteTokenizer(), "train", tmp_path, Preparation(workers=1))
