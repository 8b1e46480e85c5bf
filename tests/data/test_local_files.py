"""Which local files a path means: each once, by whatever links; what is left out is said; an empty path is refused."""

import contextlib
import gzip
import os
import tempfile
import threading
from pathlib import Path

import pytest

from longmix.config import TrainConfig, build, read, resolved
from longmix.data.corpora.files import JsonLines, ParquetFiles, TextFiles
from longmix.data.corpora.local_files import find_files
from longmix.data.text_data import TokenData
from longmix.data.tokens.preparation import prepare
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError, DataError
from longmix.paths import user_path
from longmix.training.run import check_config


def found(path, suffix=".txt") -> list[str]:
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    return [file.name for file in find_files("data.corpus.path", paths, (suffix,))]


@pytest.fixture
def tree(tmp_path):
    """a.txt and sub/b.txt in a folder, and room beside it."""
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("first")
    (folder / "sub" / "b.txt").write_text("second")
    return folder


def loops(tree):
    (tree / "self").symlink_to(".")


def two_loops(tree):
    (tree / "one").symlink_to(".")
    (tree / "sub" / "two").symlink_to(tree)
    (tree / "sub" / "three").symlink_to("..")


def sibling(tree):
    (tree / "0.txt").symlink_to("a.txt")


def folder_beside(tree):
    (tree / "again").symlink_to("sub")


def chain(tree):
    (tree / "x").symlink_to("y")
    (tree / "y").symlink_to("sub")
    (tree / "z.txt").symlink_to("0.txt")
    (tree / "0.txt").symlink_to("a.txt")


class TestLinks:
    @pytest.mark.parametrize("change", [loops, two_loops, sibling, folder_beside, chain])
    @pytest.mark.parametrize("pattern", ["", "**/*.txt", "**", "*"])
    def test_a_file_counts_once_and_by_its_own_name(self, tree, change, pattern):
        change(tree)
        expected = ["a.txt"] if pattern == "*" else ["a.txt", "b.txt"]
        assert found(tree / pattern) == expected

    def test_links_change_no_fingerprint(self, tree):
        before = TextFiles(str(tree)).fingerprint()
        two_loops(tree)
        sibling(tree)
        assert TextFiles(str(tree)).fingerprint() == before

    def test_links_to_elsewhere_are_followed_under_their_own_name(self, tree, tmp_path):
        (tmp_path / "far").mkdir()
        (tmp_path / "far" / "c.txt").write_text("third")
        (tree / "near").symlink_to("../far")
        (tree / "d.txt").symlink_to("../far/c.txt")
        assert found(tree) == ["a.txt", "d.txt", "b.txt"]

    def test_a_folder_and_a_link_to_it(self, tree, tmp_path):
        (tmp_path / "link").symlink_to("corpus")
        assert found([tree, tmp_path / "link", tree / "a.txt", tree / "sub" / ".." / "a.txt"]) == ["a.txt", "b.txt"]
        assert found(tmp_path / "link") == ["a.txt", "b.txt"]

    def test_a_file_in_two_splits_by_way_of_a_link(self, tree, tmp_path):
        (tmp_path / "link.txt").symlink_to("corpus/a.txt")
        with pytest.raises(DataError, match="is given for both the train and the validation split"):
            TextFiles(str(tree), validation=str(tmp_path / "link.txt"))

    def test_equal_content_counts_but_is_said(self, tree, caplog):
        os.link(tree / "a.txt", tree / "hard.txt")
        corpus = TextFiles(str(tree), validation_fraction=0)
        corpus.fingerprint()
        assert list(corpus.documents("train")) == ["first", "first", "second"]
        assert f"1 of the 3 files below {tree} repeat the content of another" in caplog.text


class TestFolders:
    def test_capital_letters_are_the_same_kind(self, tree):
        (tree / "C.TXT").write_text("third")
        (tree / "d.Txt").write_text("fourth")
        assert found(tree) == ["C.TXT", "a.txt", "d.Txt", "b.txt"]

    def test_what_is_left_out_is_said_in_one_line(self, tree, caplog):
        for name in ("x.md", "y.md", "b.txt.gz", "README", ".hidden.md"):
            (tree / name).write_text("x")
        (tree / "gone.txt").symlink_to("nowhere")
        os.mkfifo(tree / "pipe.txt")
        assert found(tree) == ["a.txt", "b.txt"]
        message = f"data.corpus.path={tree} takes its 2 .txt; left out: 2 .md, "
        (record,) = caplog.records
        assert record.getMessage().startswith(message)
        for part in ("1 .txt.gz", "1 without a suffix", "1 broken links", "1 devices or pipes"):
            assert part in record.getMessage()

    def test_names_that_would_steer_a_terminal_are_shown_as_escapes(self, tree, caplog):
        (tree / "x.\x1b[31m").write_text("x")
        Path(os.fsdecode(os.fsencode(tree) + b"/y.\xff")).write_text("x")
        assert found(tree) == ["a.txt", "b.txt"]
        assert caplog.records[0].getMessage().endswith("left out: 1 .\\x1b[31m, 1 .\\udcff")

    def test_nothing_left_out_says_nothing(self, tree, caplog):
        found(tree)
        assert not caplog.records

    def test_a_folder_of_another_kind_names_what_it_holds(self, tmp_path):
        for name in ("a.jsonl.gz", "b.jsonl.gz", "c.json"):
            (tmp_path / name).write_bytes(gzip.compress(b""))
        there = r"no file matches .*/\*\*/\*\.jsonl .*there are 2 \.jsonl\.gz, 1 \.json\. A pattern such as "
        with pytest.raises(DataError, match=rf"{there}{tmp_path}/\*\*/\*\.jsonl\.gz takes them"):
            found(tmp_path, ".jsonl")
        assert found(tmp_path / "**" / "*.jsonl.gz", ".jsonl") == ["a.jsonl.gz", "b.jsonl.gz"]

    def test_a_hidden_folder_is_passed_over_unless_named(self, tree):
        (tree / ".git").mkdir()
        (tree / ".git" / "c.txt").write_text("x")
        assert found(tree) == ["a.txt", "b.txt"]
        assert found(tree / ".git") == ["c.txt"]
        assert found(tree / "**" / ".git" / "*.txt") == ["c.txt"]


@pytest.mark.parametrize("value", ["", " ", "\t"])
class TestEmptyPaths:
    """An unset variable of the shell leaves an empty path, which would mean the working folder."""

    @pytest.mark.parametrize("kind", [TextFiles, JsonLines, ParquetFiles])
    @pytest.mark.parametrize("key", ["path", "validation", "test"])
    @pytest.mark.parametrize("shape", [str, list])
    def test_of_a_corpus(self, tree, kind, key, shape, value, monkeypatch):
        monkeypatch.chdir(tree)
        for suffix in (".jsonl", ".parquet"):
            (tree / f"a{suffix}").write_text("")
        given = {"path": str(tree), key: value if shape is str else [str(tree / "sub"), value]}
        with pytest.raises(ConfigError, match=rf"data\.corpus\.{key} is empty; was a variable of the shell not set"):
            kind(**given)

    @pytest.mark.parametrize("key", ["cache_dir", "path"])
    def test_of_the_data(self, key, value, compose_config, tree):
        which = "text" if key == "cache_dir" else "prepared"
        words = [f"data={which}", f"data.{key}='{value}'"]
        words += [f"data.corpus.path={tree}"] if which == "text" else []
        node = resolved(compose_config(*words))["data"]
        with pytest.raises(ConfigError, match=rf"data\.{key} is empty"):
            build(node, "data", tokenizer=ByteTokenizer(), seq_len=8, batch_size=1, seed=0)


class TestUserPath:
    def test_home(self, tree, monkeypatch):
        monkeypatch.setenv("HOME", str(tree))
        assert user_path("key", "~/a.txt") == tree / "a.txt"
        assert found("~") == found("~/") == ["a.txt", "b.txt"]
        assert found("~/sub/*.txt") == ["b.txt"]

    @pytest.mark.parametrize(("value", "message"), [("~nobody_here/x", "key=~nobody_here/x: "), ("a\0b", "NUL")])
    def test_no_path(self, value, message):
        with pytest.raises(ConfigError, match=message):
            user_path("key", value)

    def test_required(self):
        with pytest.raises(ConfigError, match=r"data\.corpus\.path is required"):
            TextFiles(None)


def test_two_loops_in_a_pattern_end_soon(tree):
    """Followed blindly, k links to the folder itself are 40**k folders."""
    for number in range(4):
        (tree / f"loop{number}").symlink_to(".")
    result: list[list[str]] = []
    worker = threading.Thread(target=lambda: result.append(found(tree / "**" / "*.txt")), daemon=True)
    worker.start()
    worker.join(60)
    assert result == [["a.txt", "b.txt"]]


class TestOneDocument:
    """A corpus of one document is divided by position, for its content would fall into one split alone."""

    LONG = "".join(f"line {number} of the book\n" for number in range(2000))

    @pytest.mark.parametrize(
        "fractions", [(0.05, 0.0), (0.05, 0.05), (0.0, 0.1), (0.3, 0.5), (0.01, 0.6), (1.0, 0.0), (0.5, 0.5)]
    )
    @pytest.mark.parametrize("text", [LONG, "x" * 5000, LONG + "\n" * 3000, "short text"])
    def test_splits_join_to_the_document(self, tmp_path, fractions, text):
        (tmp_path / "book.txt").write_text(text)
        corpus = TextFiles(str(tmp_path / "book.txt"), None, None, *fractions)
        pieces = {split: "".join(corpus.documents(split)) for split in corpus.splits}
        assert "".join(pieces.values()) == text
        for split, fraction in zip(("validation", "test"), fractions, strict=True):
            if fraction:
                assert 0.7 * fraction * len(text) - 1 <= len(pieces[split]) <= 1.3 * fraction * len(text) + 1001

    def test_a_split_begins_with_a_line(self, tmp_path):
        (tmp_path / "book.txt").write_text(self.LONG)
        corpus = TextFiles(str(tmp_path), validation_fraction=0.05, test_fraction=0.05)
        for split in ("validation", "test"):
            assert next(corpus.documents(split)).startswith("line ")

    def test_one_record_of_a_table(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "0123456789"}\n{"text": null}\n')
        corpus = JsonLines(str(tmp_path), validation_fraction=0.3)
        assert [list(corpus.documents(split)) for split in corpus.splits] == [["0123456"], ["789"]]

    def test_nothing_is_held_out_that_has_a_source_of_its_own(self, tmp_path):
        (tmp_path / "a.txt").write_text(self.LONG)
        (tmp_path / "b.txt").write_text("other")
        corpus = TextFiles(str(tmp_path / "a.txt"), validation=str(tmp_path / "b.txt"))
        assert list(corpus.documents("train")) == [self.LONG]
        assert list(TextFiles(str(tmp_path / "a.txt"), validation_fraction=0).documents("train")) == [self.LONG]

    def test_its_fingerprint_is_another_than_that_of_a_division_by_content(self, tmp_path):
        (tmp_path / "a.txt").write_text(self.LONG)
        assert TextFiles(str(tmp_path)).fingerprint()["divided"] == "by position"
        (tmp_path / "b.txt").write_text("x")
        assert "divided" not in TextFiles(str(tmp_path)).fingerprint()

    def test_two_documents_are_divided_by_content(self, tmp_path):
        for number in range(2):
            (tmp_path / f"{number}.txt").write_text(f"document {number}")
        corpus = TextFiles(str(tmp_path), validation_fraction=1e-9)
        assert (list(corpus.documents("train")), list(corpus.documents("validation"))) == (
            ["document 1"],
            ["document 0"],
        )
        (tmp_path / "1.txt").write_text("document 0")
        corpus = TextFiles(str(tmp_path), validation_fraction=1e-9)
        with pytest.raises(DataError, match=r"none of the 2 documents .* such as data\.corpus\.validation=my/valid"):
            list(corpus.documents("validation"))

    def test_gives_batches_of_both_splits_out_of_the_box(self, tmp_path):
        (tmp_path / "book.txt").write_text(self.LONG)
        corpus = TextFiles(str(tmp_path / "book.txt"))
        data = TokenData(corpus, ByteTokenizer(), seq_len=64, batch_size=2, seed=0, cache_dir=str(tmp_path / "cache"))
        data.setup()
        assert next(iter(data.train_loader(0, 1)))["tokens"].shape == (2, 64)
        assert len(data.val_dataloader()) > 10


class TestWhatIsNoCorpus:
    """One line each, of what is there and what to give."""

    @pytest.mark.parametrize("kind", [TextFiles, JsonLines, ParquetFiles])
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda path: Path("/dev/null"),
                "/dev/null is a device, pipe or socket; give a file, a folder or a pattern",
            ),
            (lambda path: os.mkfifo(path), " is a device, pipe or socket"),
            (lambda path: path.mkdir(), r"no file matches .*; there are no files$"),
        ],
        ids=["device", "pipe", "empty-folder"],
    )
    def test_by_its_kind(self, tmp_path, kind, make, message):
        path = make(tmp_path / "here") or tmp_path / "here"
        with pytest.raises(DataError, match=rf"^data\.corpus\.path: .*{message}"):
            kind(str(path))

    @pytest.mark.parametrize("kind", [TextFiles, JsonLines])
    def test_files_without_text(self, tmp_path, kind):
        for name in "ab":
            (tmp_path / f"{name}{kind._suffixes[0]}").touch()
        with pytest.raises(DataError, match=r"holds no text \(\d empty documents\); give it files with text"):
            prepare(kind(str(tmp_path)), ByteTokenizer(), "train", tmp_path / "cache")

    @pytest.mark.parametrize("mode", [0o000, 0o444, 0o333], ids=["nothing", "listing", "entering"])
    @pytest.mark.parametrize("place", [".", "inner", "inner/a.txt", "inner/*.txt"])
    def test_a_folder_that_may_not_be_read(self, mode, place):
        """Not below pytest's folder, which no other user may enter."""
        with tempfile.TemporaryDirectory() as base, contextlib.ExitStack() as stack:
            Path(base).chmod(0o755)
            folder = Path(base) / "locked"
            (folder / "inner").mkdir(parents=True)
            (folder / "inner" / "a.txt").write_text("text")
            folder.chmod(mode)
            stack.callback(folder.chmod, 0o755)
            if os.geteuid() == 0:
                os.seteuid(65534)
                stack.callback(os.seteuid, 0)
            if mode == 0o333 and place != ".":
                assert TextFiles(str(folder / place), validation_fraction=0)
                return
            with pytest.raises(DataError, match=r"locked.*: Permission denied|there is no file|no file matches"):
                TextFiles(str(folder / place))

    def test_null(self, compose_config):
        with pytest.raises(ConfigError, match=r"^data\.corpus\.path=null is not text or a list, each text\.$"):
            check_config(read(TrainConfig, compose_config("data=text", "data.corpus.path=null")))
