"""Token files of other programs: formats, borders of documents, splits, bytes, and what is refused."""

import struct
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from longmix.data.corpora.token_corpus import TokenFiles
from longmix.data.given_tokens import GivenTokens
from longmix.data.mixture import MixtureData
from longmix.data.packing import PACKINGS
from longmix.data.tokens import placed
from longmix.data.tokens.ids import IdTokenizer
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError, DataError
from longmix.evaluation.run import evaluate
from longmix.training.run import train

EOD = 256
RANDOM = np.random.default_rng(0)
TEXTS = [RANDOM.integers(0, 256, size).tolist() for size in RANDOM.integers(1, 90, 60)]
AT_END = [token for text in TEXTS for token in (*text, EOD)]
AT_BEGIN = [token for text in TEXTS for token in (EOD, *text)]


def write(path: Path, tokens, dtype: str, header: bytes = b"") -> Path:
    path.write_bytes(header + np.asarray(tokens).astype(dtype).tobytes())
    return path


def llmc(path: Path, tokens, magic=20240520, version=1, dtype="<u2", count=None) -> Path:
    numbers = np.zeros(256, "<i4")
    numbers[:3] = magic, version, len(tokens) if count is None else count
    return write(path, tokens, dtype, numbers.tobytes())


def megatron(path: Path, documents, dtype="<u2", code=8, version=1, modes=b"", cut=None) -> Path:
    """Each document in sequences of at most 40 tokens, as sentences would be."""
    pieces = [[text[at : at + 40] for at in range(0, len(text), 40)] for text in documents]
    lengths = np.array([len(piece) for text in pieces for piece in text])
    first = np.cumsum([0, *map(len, pieces)])
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", version, code, len(lengths), len(first))
    pointers = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    index = header + lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + first.astype("<i8").tobytes()
    path.with_suffix(".idx").write_bytes((index + modes)[:cut])
    return write(path, np.concatenate(documents), dtype)


def npy(path: Path, tokens, dtype) -> Path:
    np.save(path, np.asarray(tokens, dtype))
    return path


def of(path, tmp_path, tokenizer=None, **words) -> GivenTokens:
    words = {"seq_len": 32, "batch_size": 4, "seed": 0, "cache_dir": str(tmp_path / "cache"), **words}
    return GivenTokens(path if isinstance(path, list) else str(path), tokenizer or ByteTokenizer(), **words)


def documents(token_file) -> list[list[int]]:
    tokens = np.asarray(token_file.tokens).tolist()
    offsets = token_file.offsets.tolist()
    return [tokens[start:stop] for start, stop in pairwise(offsets)]


ENDED = [[*text, EOD] for text in TEXTS]
BEGUN = [[EOD, *text] for text in TEXTS]
FORMATS = {
    "megatron, ends marked": lambda folder: megatron(folder / "a.bin", ENDED),
    "megatron, begins marked": lambda folder: megatron(folder / "a.bin", BEGUN, "<i4", 4),
    "megatron, nothing marked": lambda folder: megatron(folder / "a.bin", TEXTS, "<i8", 5),
    "megatron by its prefix": lambda folder: megatron(folder / "a.bin", ENDED).with_suffix(""),
    "llm.c": lambda folder: llmc(folder / "a.bin", AT_BEGIN),
    "llm.c of Llama 3": lambda folder: llmc(folder / "a.bin", AT_BEGIN, 20240801, 7, "<u4"),
    "npy": lambda folder: npy(folder / "a.npy", AT_END, ">i4"),
    "npy without a header": lambda folder: write(folder / "a.npy", AT_END, "<u2"),
    "a folder": lambda folder: llmc(folder / "a.bin", AT_BEGIN).parent,
}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_every_format_has_the_documents_that_were_written(make, tmp_path):
    (tmp_path / "data").mkdir()
    token_file = of(make(tmp_path / "data"), tmp_path, validation_fraction=0.0).token_file("train")
    found = [[token for token in document if token != EOD] for document in documents(token_file)]
    assert found == TEXTS
    marked = sum(document[0] == EOD for document in documents(token_file))
    assert marked in (len(TEXTS), len(TEXTS) - 1) if token_file.manifest["marks"] else not marked
    assert (token_file.num_documents, token_file.separator_id) == (len(TEXTS), EOD)
    assert token_file.num_bytes == sum(map(len, TEXTS))


def test_what_all_documents_end_with_is_no_mark_if_it_is_text(tmp_path):
    lines = [[*text, 10] for text in TEXTS]
    token_file = of(megatron(tmp_path / "a.bin", lines), tmp_path, validation_fraction=0.0).token_file("train")
    assert (documents(token_file), token_file.separator_id) == (lines, EOD)


def test_raw_tokens_need_a_word_for_their_format(tmp_path):
    path = write(tmp_path / "train.bin", AT_END, "<u4")
    with pytest.raises(DataError, match=r"format cannot be told.*data\.format=raw and data\.dtype"):
        of(path, tmp_path).token_file("train")
    token_file = of(path, tmp_path, format="raw", dtype="uint32", validation_fraction=0.0).token_file("train")
    assert token_file.num_documents == len(TEXTS)


class TestSplits:
    def test_every_document_is_in_one_split_and_a_new_file_moves_none(self, tmp_path):
        one = of(llmc(tmp_path / "b.bin", AT_BEGIN), tmp_path, validation_fraction=0.2, test_fraction=0.1)
        found = {split: documents(one.token_file(split)) for split in one.splits}
        assert sorted(chain(*found.values())) == sorted(BEGUN)
        assert all(3 <= len(found[split]) < 25 for split in ("validation", "test"))
        llmc(tmp_path / "a.bin", [EOD, 1, 2, 3, EOD, 7])
        two = of(tmp_path, tmp_path, validation_fraction=0.2, test_fraction=0.1)
        more = {split: documents(two.token_file(split)) for split in two.splits}
        assert all(document in more[split] for split in found for document in found[split])

    def test_files_of_their_own(self, tmp_path):
        paths = [llmc(tmp_path / f"t_{name}_0.bin", BEGUN[number]) for number, name in enumerate(("train", "val"))]
        data = of(tmp_path / "*train*", tmp_path, validation=str(tmp_path / "*val*"))
        assert [documents(data.token_file(split)) for split in ("train", "validation")] == [[BEGUN[0]], [BEGUN[1]]]
        with pytest.raises(DataError, match="both the train and the validation split"):
            of(tmp_path, tmp_path, validation=str(paths[1]))

    def test_one_document_is_divided_by_position(self, tmp_path):
        data = of(llmc(tmp_path / "a.bin", [EOD, *range(99)]), tmp_path, validation_fraction=0.1)
        assert documents(data.token_file("train")) == [[EOD, *range(89)]]
        validation = data.token_file("validation")
        assert (documents(validation), validation.num_bytes) == ([list(range(89, 99))], 10)

    def test_a_few_documents_lend_one(self, tmp_path):
        data = of(llmc(tmp_path / "a.bin", [EOD, 1, EOD, 2, 2]), tmp_path, validation_fraction=1e-9)
        assert {split: data.token_file(split).num_documents for split in data.splits} == {"train": 1, "validation": 1}


class TestReading:
    @pytest.mark.parametrize("packing", PACKINGS)
    def test_windows_equal_those_of_tokenised_text(self, packing, tmp_path, monkeypatch):
        monkeypatch.setattr(placed, "CHECKED_TOGETHER", 64)
        half = len(TEXTS) // 2
        for number, part in enumerate((BEGUN[:half], BEGUN[half:])):
            llmc(tmp_path / f"{number}.bin", np.concatenate(part))
        data = of(tmp_path, tmp_path, packing=packing, validation_fraction=0.2)
        data.setup("fit")
        held = documents(data.token_file("train"))
        tokens, offsets = np.concatenate(held), np.cumsum([0, *map(len, held)])
        some = slice(offsets[3], offsets[9], 2)
        np.testing.assert_array_equal(data.token_file("train").tokens[some], tokens[some])
        seen = []
        for index in range(data.train_windows.windows_per_epoch):
            window = data.train_windows.sample(index)
            valid = window.targets >= 0
            seen += window.tokens[valid].tolist()
            assert (window.tokens[1:] == window.targets[:-1])[np.diff(window.document_ids) == 0].all() or packing
        if packing != "aligned":
            counts = np.bincount(seen, minlength=257) - np.bincount(tokens, minlength=257)
            assert np.abs(counts).sum() <= 1  # the stream's last token has no target

    def test_a_worker_and_another_rank_read_the_same(self, tmp_path):
        llmc(tmp_path / "a.bin", AT_BEGIN)
        whole = next(iter(of(tmp_path, tmp_path).train_loader(2, 3)))
        worker = next(iter(of(tmp_path, tmp_path, num_workers=1).train_loader(2, 3)))
        ranks = [next(iter(of(tmp_path, tmp_path).train_loader(2, 3, rank, 2))) for rank in (0, 1)]
        assert (whole["tokens"] == worker["tokens"]).all()
        assert (np.concatenate([batch["tokens"] for batch in ranks]) == whole["tokens"].numpy()).all()

    def test_the_tokens_are_not_copied_and_the_place_does_not_matter(self, tmp_path):
        path = llmc(tmp_path / "a.bin", AT_BEGIN)
        first = of(path, tmp_path)
        key = first.fingerprint()
        assert "tokens-00000.bin" not in {file.name for file in first.token_file("train").folder.iterdir()}
        (tmp_path / "moved").mkdir()
        moved = of(path.rename(tmp_path / "moved" / "a.bin"), tmp_path)
        assert moved.fingerprint() == key and documents(moved.token_file("train"))
        llmc(tmp_path / "moved" / "a.bin", AT_BEGIN[::-1])
        assert of(moved.corpus._sources["train"][0], tmp_path).fingerprint() != key

    def test_a_mixture_takes_them(self, tmp_path):
        megatron(tmp_path / "a.bin", ENDED), llmc(tmp_path / "b.bin", AT_BEGIN)
        corpora = {name: TokenFiles(str(tmp_path / f"{name}.bin")) for name in "ab"}
        words = {"seq_len": 32, "batch_size": 4, "seed": 0, "cache_dir": str(tmp_path / "cache")}
        data = MixtureData(corpora, {"a": 0.5, "b": 0.5}, ByteTokenizer(), **words)
        data.setup("fit")
        assert data.train_windows.sample(0).tokens.shape == (32,)
        with pytest.raises(ConfigError, match=r"data\.corpora\.a\.eod=256 is no id"):
            MixtureData(corpora, {"a": 1, "b": 1}, IdTokenizer(9), **words).prepare_data()


WRONG = {
    "an id beyond the vocabulary": (
        lambda folder: llmc(folder / "a.bin", [EOD, 5, 300, 301]),
        {},
        r"a\.bin holds the token 300 at 2 \(counted from 0\).*0 to 256.*tokenizer=ids",
    ),
    "a negative id": (lambda folder: npy(folder / "a.npy", [5, -1], "<i2"), {}, "the token -1 at 1 "),
    "numbers that are no ids": (
        lambda folder: npy(folder / "a.npy", [5, 1], "<f4"),
        {},
        "float32, and tokens",
    ),
    "a matrix": (lambda folder: npy(folder / "a.npy", [[5, 1]], "<u2"), {}, r"holds \(1, 2\); give an array of one"),
    "a cut file of llm.c": (
        lambda folder: llmc(folder / "a.bin", [1, 2], count=3),
        {},
        "1,028 bytes.* 3 uint16.*cut short",
    ),
    "a header alone": (lambda folder: write(folder / "a.bin", [20240520], "<i4"), {}, "4 bytes, and llm.c's header"),
    "another version": (
        lambda folder: llmc(folder / "a.bin", [1], version=2),
        {},
        "of version 2; .*20240801 of version 7",
    ),
    "another magic": (lambda folder: llmc(folder / "a.bin", [1], 20240522), {"format": "llmc"}, "begins with 20240522"),
    "a cut array": (
        lambda folder: write(npy(folder / "a.npy", [1, 2], "<u2"), [], "<u2", (folder / "a.npy").read_bytes()[:-1]),
        {},
        "cannot be read as an array",
    ),
    "a damaged array": (
        lambda folder: write(folder / "a.npy", [], "<u2", b"\x93NUMPY\x01\x00\x08\x00{'descr\n"),
        {},
        "cannot be read as an array",
    ),
    "half a token": (lambda folder: write(folder / "a.npy", [1], "<u1"), {}, "no whole number of uint16"),
    "nothing": (lambda folder: write(folder / "a.npy", [], "<u1"), {}, "holds no tokens"),
    "a cut index": (lambda folder: megatron(folder / "a.bin", ENDED, cut=-3), {}, r"a\.idx has .* bytes, and .* needs"),
    "a foreign index": (lambda folder: megatron(folder / "a.bin", ENDED, cut=4), {}, "does not begin with MMIDIDX"),
    "another version of the index": (
        lambda folder: megatron(folder / "a.bin", ENDED, version=2),
        {},
        "version 2 and",
    ),
    "a cut file of Megatron": (
        lambda folder: write(megatron(folder / "a.bin", ENDED), AT_END[:-1], "<u2"),
        {},
        r"a\.idx counts need.*cut short",
    ),
    "no mark": (
        lambda folder: llmc(folder / "a.bin", [1, 2]),
        {"tokenizer": IdTokenizer(300)},
        "data.eod: which",
    ),
    "a mark that is no id": (lambda folder: llmc(folder / "a.bin", [1, 2]), {"eod": 257}, "data.eod=257 is no id"),
    "several types": (
        lambda folder: [str(llmc(folder / "a.bin", [1])), str(npy(folder / "b.npy", [1], "<u2"))],
        {},
        "b.npy is npy of uint16 and .*a.bin llmc",
    ),
    "several kinds in a folder": (
        lambda folder: (llmc(folder / "a.bin", [1]), npy(folder / "b.npy", [1], "<u2"))[0].parent,
        {},
        "data.path=.* several kinds.*1 .bin, 1 .npy",
    ),
}


@pytest.mark.parametrize(("make", "words", "message"), WRONG.values(), ids=WRONG)
def test_what_is_refused(make, words, message, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises((DataError, ConfigError), match=message) as refused:
        of(make(tmp_path / "data"), tmp_path, **words).prepare_data()
    assert "data.corpus" not in str(refused.value) or words.get("path")


def test_ids_without_a_tokenizer_give_losses_without_bytes(compose_config, tmp_path, capsys):
    path = megatron(tmp_path / "a.bin", ENDED, modes=bytes(sum(-(-len(text) // 40) for text in ENDED)))
    words = (f"data.path={path}", "data.validation_fraction=0.2", f"data.cache_dir={tmp_path}", "seq_len=32")
    small = (
        "batch_size=2",
        "max_steps=1",
        "model.num_layers=1",
        "model.d_model=32",
        "model.mlp_hidden=32",
        "trainer=cpu",
        "logger=csv",
        "loop.log_every=1",
    )
    config = compose_config("data=tokens", "tokenizer=ids", "tokenizer.vocab_size=300", *words, *small)
    summary = train(config)
    printed = capsys.readouterr().err
    assert summary["validation"]["bytes"] == 0 and np.isnan(summary["validation"]["bits_per_byte"])
    assert "nats/token, bits/byte unknown" in printed and "nan" not in printed
    words = (f"checkpoint={tmp_path}", "seq_len=[32]")
    (result,) = evaluate(compose_config(*words, entry_point="evaluate"))["loss"]["lengths"].values()
    assert result["loss"] == pytest.approx(summary["validation"]["loss"], 1e-6) and "bits_per_byte" not in result
    with pytest.raises(ConfigError, match="stands for no text, and the corpus sotu is text"):
        evaluate(compose_config(*words, "data=sotu", f"data.cache_dir={tmp_path}/text", entry_point="evaluate"))


def test_the_state_of_ids(tmp_path):
    for given in (IdTokenizer(9, 4), IdTokenizer(9)):
        again = tokenizer_from_state(given.state())
        assert (again.vocab_size, again.separator_id, again.end_ids) == (9, given.separator_id, given.end_ids)
        assert again.decode(again.encode("3 8")) == "3 8 "
    with pytest.raises(ConfigError, match=r"tokenizer\.separator=9"):
        IdTokenizer(9, 9)
