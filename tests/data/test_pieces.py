"""Tokenizers that are not byte-level: pieces with bytes for what they lack, and RWKV's longest matches."""

import json
import random

import numpy as np
import pytest
from list_corpus import ListCorpus, random_text
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers, trainers

from longmix.data.corpora.sotu import Sotu
from longmix.data.tokens.byte_level import PROBES
from longmix.data.tokens.preparation import prepare
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.tokenizers import TokenizerFile
from longmix.data.tokens.world import WorldFile, WorldTokenizer
from longmix.errors import ConfigError, DataError
from longmix.generation.text import Row
from longmix.interop.huggingface.tokenizer import huggingface_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CONTROLS = ["<unk>", "<s>", "</s>"]
LLAMA = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
SWAP = LLAMA["normalizers"][1]
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
GEMMA = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
BACK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
DECODER = {
    "type": "Sequence",
    "decoders": [
        BACK,
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
NFKC = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, *LLAMA["normalizers"]]}

KINDS = {
    "BPE of Llama 2": ("BPE", {"normalizer": LLAMA}),
    "BPE of Mistral": ("BPE", {"pre_tokenizer": METASPACE}),
    "BPE of Gemma": ("BPE", {"normalizer": SWAP, "pre_tokenizer": GEMMA}),
    "Unigram": ("Unigram", {"normalizer": NFKC, "pre_tokenizer": {**METASPACE, "split": True}}),
    "BPE of plain blanks": ("BPE", {}),
}
"""Those of which the last has learned pieces with blanks."""


@pytest.fixture(scope="session")
def trained() -> dict[str, dict]:
    """What a BPE and a Unigram model learn of a speech; their special tokens and bytes come first."""
    speech = next(iter(Sotu().documents("train")))
    kinds = {
        "BPE": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer, {}),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer, {"unk_token": "<unk>"}),
    }
    trees = {}
    for name, (model, trainer, words) in kinds.items():
        library = Library(model)
        library.normalizer = normalizers.Replace(" ", "▁")
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        words = {"vocab_size": 600, "special_tokens": [*CONTROLS, *BYTES], "show_progress": False, **words}
        library.train_from_iterator([speech], trainer(**words))
        trees[name] = json.loads(library.to_str())
        trees[name]["model"]["byte_fallback"] = True
        trees[name]["added_tokens"] = [t for t in trees[name]["added_tokens"] if t["content"] in CONTROLS]
    return trees


def tree_of(trained, kind) -> dict:
    model, parts = KINDS[kind]
    tree = {**json.loads(json.dumps(trained[model])), "normalizer": None, "pre_tokenizer": None, "decoder": DECODER}
    return {**tree, **parts}


def file_of(tree, tmp_path, **words) -> TokenizerFile:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    return TokenizerFile(str(path), **{"separator": "<s>", **words})


@pytest.fixture(params=KINDS)
def tokenizer(request, trained, tmp_path) -> TokenizerFile:
    return file_of(tree_of(trained, request.param), tmp_path)


HARD = [
    *("▁", "▁▁ ▁x", " ▁", "<s>", "a<s>b</s>", "<unk>", "<0x0A>", "<0x0A><0xE2><0x96>", "<<s>>", "<0x0A", "▁<s>▁"),
    *("ﬁ", "e\u0301", "\x00\x7f\x80", "\ufeff", "\U0010ffff", " ", "", "  a", "a  ", "\n\n", "Naïve 漢字 🙂\u200d"),
]


def test_text_comes_back_and_bytes_add_up(tokenizer):
    sizes = tokenizer.token_bytes()
    texts = [*HARD, *PROBES, *(random_text(seed) for seed in range(60))]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert int(sizes[ids].sum()) == len(text.encode())
        assert b"".join(tokenizer.token_content(int(i)) for i in ids) == text.encode()
        assert not {0, 1, 2} & set(ids.tolist())
    assert tokenizer.decode([1, 0, 2]) == "" and not sizes[:3].any()
    assert tokenizer.decode([3 + 0xE2, 3 + 0x96]) == "\ufffd"
    again = tokenizer_from_state(tokenizer.state())
    assert (
        again.fingerprint() == tokenizer.fingerprint() and (again.encode("the<s>") == tokenizer.encode("the<s>")).all()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_the_library(kind, trained, tmp_path):
    """Where it puts a blank in front of a text, the blank must be written here."""
    tree = tree_of(trained, kind)
    library, tokenizer = Library.from_str(json.dumps(tree)), file_of(tree, tmp_path)
    prefix = "" if kind in ("BPE of Gemma", "BPE of plain blanks") else " "
    for text in ("The United States of America", "x", "The  State\n\nof the Union: ü 漢 🙂", "1790, January 8."):
        assert tokenizer.encode(prefix + text).tolist() == library.encode(text, add_special_tokens=False).ids


def test_a_text_is_written_as_it_is_generated(tokenizer):
    text = "The ▁ state of 漢字 🙂 <s> is"
    stream, shown = Row(tokenizer, []), ""
    for token in tokenizer.encode(text).tolist():
        shown += stream.take(token)
        assert text.startswith(shown)
    assert shown + stream.finish() == text


def test_documents_are_prepared(tokenizer, tmp_path):
    texts = [f"<s> {number} ▁ of {'the union ' * number}" for number in range(30)]
    token_file = prepare(ListCorpus(train=texts), tokenizer, "train", tmp_path / "cache")
    assert token_file.num_bytes == sum(len(text.encode()) for text in texts) and token_file.separator_id == 1


def test_it_goes_out_to_transformers(tokenizer):
    pytest.importorskip("transformers")
    theirs = huggingface_tokenizer(tokenizer)
    for text in ("The United  States\n", " of 漢字 🙂"):
        ids = tokenizer.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids and theirs.decode(ids) == text
        assert theirs(text)["input_ids"][0] == 1


REFUSED = {
    "no bytes": (lambda tree: tree["model"].update(byte_fallback=False), "BPE, has no tokens for single bytes"),
    "another splitter": (
        lambda tree: tree.update(pre_tokenizer={"type": "Whitespace"}),
        "it has a pre-tokenizer of type Whitespace",
    ),
    "a splitter that removes": (
        lambda tree: tree.update(pre_tokenizer={**GEMMA, "behavior": "Removed"}),
        "type Split that removes what it finds",
    ),
    "marks within words": (
        lambda tree: tree["model"].update(end_of_word_suffix="</w>"),
        "it has the setting end_of_word_suffix",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_loses_text_is_refused_with_the_reason(change, message, trained, tmp_path):
    tree = tree_of(trained, "BPE of Llama 2")
    change(tree)
    with pytest.raises(DataError, match=message):
        file_of(tree, tmp_path)


def test_a_model_of_words_is_refused_with_the_reason(tmp_path):
    library = Library(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    library.add_special_tokens(["<s>"])
    with pytest.raises(DataError, match="its model, WordPiece, has no tokens for single bytes"):
        file_of(json.loads(library.to_str()), tmp_path)


def test_missing_bytes_are_refused_or_replaced(trained, tmp_path):
    tree = tree_of(trained, "BPE of Llama 2")
    vocabulary = tree["model"]["vocab"]
    del vocabulary["<0x07>"]
    with pytest.raises(DataError, match="no token for the byte 0x07"):
        file_of(tree, tmp_path).encode("a\x07b")
    tokenizer = file_of(tree, tmp_path, missing_bytes="replace")
    assert tokenizer.decode(tokenizer.encode("a\x07b")) == "a\ufffdb"


WORLD = [bytes([byte]) for byte in range(256)] + [
    b"ab",
    b"abc",
    b"abcdef",
    b" the",
    "漢".encode(),
    "漢字".encode(),
    b"\n\n\n",
]


def world_text(tokens=WORLD) -> str:
    """Texts where they are UTF-8, else byte strings, as RWKV's file has them."""
    lines = []
    for index, token in enumerate(tokens, 1):
        try:
            shown = repr(token.decode())
        except UnicodeDecodeError:
            shown = repr(token)
        lines.append(f"{index} {shown} {len(token)}\n")
    return "".join(lines)


def longest_matches(raw: bytes, tokens=WORLD) -> list[int]:
    ids = []
    while raw:
        best = max((token for token in tokens if raw.startswith(token)), key=len)
        ids.append(tokens.index(best) + 1)
        raw = raw[len(best) :]
    return ids


class TestWorld:
    def test_the_longest_match_is_taken(self, tmp_path):
        (tmp_path / "v.txt").write_text(world_text())
        tokenizer = WorldFile(str(tmp_path / "v.txt"), vocab_size=300)
        draw = random.Random(0)
        texts = ["", "abcdeabcdef", "ab", "a", "漢漢字", "\n" * 7]
        texts += [
            "".join(draw.choices(["a", "b", "c", "def", " the", "漢", "字", "\n", "🙂"], k=20)) for _ in range(200)
        ]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert ids.tolist() == longest_matches(text.encode())
            assert tokenizer.decode(ids) == text and tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert (tokenizer.separator_id, tokenizer.vocab_size, tokenizer.decode([0, 299])) == (0, 300, "")
        assert tokenizer.token_content(1 + 0xFF) == b"\xff" and tokenizer.decode([1 + 0xFF, 66]) == "\ufffdA"
        again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
        assert again.fingerprint() == tokenizer.fingerprint() and np.array_equal(again.encode("abc"), [258])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda text: text.replace("257 'ab' 2", "257 'ab' 3"), "line 257 is not of RWKV's form"),
            (lambda text: text.replace("257 'ab' 2", "257 f(2) 2"), "line 257 is not of RWKV's form"),
            (lambda text: text.replace("257 'ab' 2", "257 'a' 1"), "line 257 has a token that came before"),
            (lambda text: text.replace("257 'ab' 2", "256 'ab' 2"), "several tokens one id"),
            (lambda text: text.replace("66 'A' 1\n", ""), "1 bytes have no token, such as 0x41"),
            (lambda text: "{}", "line 1 is not of RWKV's form"),
        ],
        ids=["length", "code", "twice", "id", "byte", "another file"],
    )
    def test_a_damaged_file(self, change, message):
        with pytest.raises(DataError, match=message):
            WorldTokenizer(change(world_text()))

    def test_too_few_ids_and_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size=5 must be from 264"):
            WorldTokenizer(world_text(), 5)
        with pytest.raises(DataError, match=r"tokenizer\.path: cannot read .*No such file"):
            WorldFile(str(tmp_path / "none.txt"))
