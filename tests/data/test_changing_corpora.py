"""A corpus that changes between the moment it is identified and the moment it is read."""

import json
import os
import time

import pytest

from longmix.data.corpora import local_files
from longmix.data.corpora.files import JsonLines, TextFiles
from longmix.data.tokens.bpe import BpeTokenizer
from longmix.data.tokens.preparation import Preparation, prepare
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import DataError


def write(folder, kind, texts):
    for number, text in enumerate(texts):
        content = text if kind is TextFiles else json.dumps({"text": text}) + "\n"
        (folder / f"{number}.{'txt' if kind is TextFiles else 'jsonl'}").write_text(content)


OLD = ["a text of some length", "another text"]
CHANGES = {
    "other-size": ["a text of another length", "another text"],
    "same-size": ["A TEXT OF SOME LENGTH", "another text"],
    "last-file": ["a text of some length", "ANOTHER TEXT"],
}


@pytest.fixture(params=["recent", "old"])
def long_ago(request):
    """How the files' times are set: as they are, within the resolution of a file system, or a day ago."""

    def age(folder):
        if request.param == "old":
            for path in folder.iterdir():
                os.utime(path, (time.time() - 86400,) * 2)

    return age


@pytest.mark.parametrize("kind", [TextFiles, JsonLines])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_is_cached_under_the_key_of_the_old_content(tmp_path, kind, change, long_ago):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder, kind, OLD)
    long_ago(folder)
    corpus = kind(str(folder), validation_fraction=0.0)
    corpus.fingerprint()
    write(folder, kind, change)
    for make in (
        lambda: prepare(corpus, ByteTokenizer(), "train", tmp_path / "cache", Preparation(shard_tokens=10)),
        lambda: BpeTokenizer(260).prepare(corpus, tmp_path / "cache"),
    ):
        with pytest.raises(DataError, match=rf"{folder}.*changed while it was read"):
            make()
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert kept == []
    made = prepare(kind(str(folder), validation_fraction=0.0), ByteTokenizer(), "train", tmp_path / "cache")
    assert made.num_documents == 2


def test_a_file_that_is_gone_or_replaced_counts_as_changed(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for replace in (lambda path: path.unlink(), lambda path: (path.rename(tmp_path / "b"), path.write_text("text"))):
        stamps = {}
        local_files.identify_files([tmp_path / "a.txt"], stamps)
        local_files.check_unchanged(stamps)
        replace(tmp_path / "a.txt")
        with pytest.raises(DataError, match="changed while it was read"):
            local_files.check_unchanged(stamps)
        (tmp_path / "a.txt").write_text("text")


def test_stamps_are_no_part_of_what_identifies_a_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    first = TextFiles(str(tmp_path / "a.txt")).fingerprint()
    os.utime(tmp_path / "a.txt", (1, 1))
    assert TextFiles(str(tmp_path / "a.txt")).fingerprint() == first
