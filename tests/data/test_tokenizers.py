"""Tokenizers: exact bytes, round trips, specials that never come from text, determinism, the cache of trained ones."""

import json
import os

import numpy as np
import pytest
from list_corpus import ListCorpus, random_text
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from longmix.data.corpora.sotu import Sotu
from longmix.data.tokens.bpe import BpeTokenizer
from longmix.data.tokens.byte_level import UTF8_BYTES, byte_letters, library_errors
from longmix.data.tokens.encoding import Encoder, TextBatch
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.tokenizers import SEPARATOR, ByteTokenizer, NumberTokenizer, TokenizerFile
from longmix.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def speeches() -> ListCorpus:
    return ListCorpus(train=list(Sotu().documents("train"))[:5])


@pytest.fixture(scope="module")
def bpe(speeches, tmp_path_factory):
    return BpeTokenizer(600).prepare(speeches, tmp_path_factory.mktemp("bpe"))


def byte_level(**changes) -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=changes.get("add_prefix_space", False))
    library.decoder = decoders.ByteLevel()
    alphabet = [letter for byte, letter in enumerate(byte_letters()) if byte not in changes.get("lacks", ())]
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([" the the then and and there"] * 3, trainer)
    library.add_special_tokens(changes.get("specials", ["<|endoftext|>", "<s>", "[MASK]"]))
    return library


def saved(library: Library, tmp_path) -> str:
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    return str(path)


@pytest.fixture(params=["bytes", "bpe", "file"])
def tokenizer(request, bpe, tmp_path):
    if request.param == "bytes":
        return ByteTokenizer()
    return bpe if request.param == "bpe" else TokenizerFile(saved(byte_level(), tmp_path))


class TestEveryTokenizer:
    @pytest.mark.parametrize("seed", range(20))
    def test_text_comes_back_and_bytes_add_up(self, tokenizer, seed):
        text = random_text(seed)
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert ids.max() < tokenizer.vocab_size

    def test_batch_equals_one_by_one(self, tokenizer):
        texts = [random_text(seed) for seed in range(5)] + [""]
        for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))

    def test_special_tokens_never_come_from_text(self, tokenizer):
        ids = tokenizer.encode(f"a {SEPARATOR}<s>[MASK]{SEPARATOR} b")
        assert tokenizer.separator_id not in ids
        assert tokenizer.token_bytes()[ids].min() >= 1

    def test_separator_stands_for_no_bytes_and_no_text(self, tokenizer):
        assert tokenizer.token_bytes()[tokenizer.separator_id] == 0
        assert tokenizer.decode([tokenizer.separator_id, *tokenizer.encode("a"), tokenizer.separator_id]) == "a"

    def test_token_bytes_of_each_token(self, tokenizer):
        counts = tokenizer.token_bytes()
        assert counts.dtype == np.int32 and counts.shape == (tokenizer.vocab_size,)
        ascii_only = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).isascii()]
        assert len(ascii_only) > 100
        for i in ascii_only:
            assert counts[i] == len(tokenizer.decode([i]))

    def test_state_rebuilds_it(self, tokenizer):
        again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
        assert again.fingerprint() == tokenizer.fingerprint()
        assert (again.vocab_size, again.separator_id) == (tokenizer.vocab_size, tokenizer.separator_id)
        text = random_text(99)
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))

    def test_cut_character_decodes_to_a_replacement(self, tokenizer):
        ids = tokenizer.encode("é")
        if len(ids) == 2:
            assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_unknown_state_is_refused():
    with pytest.raises(DataError, match="unknown tokenizer kind 'words'"):
        tokenizer_from_state({"kind": "words"})


class TestBpe:
    def test_sizes(self, bpe):
        assert bpe.vocab_size == 600
        assert bpe.separator_id == 599
        assert len(bpe.encode("The people of the United States")) < 20

    def test_training_is_deterministic(self, bpe, speeches, tmp_path):
        again = BpeTokenizer(600).prepare(speeches, tmp_path)
        assert again.fingerprint() == bpe.fingerprint()

    def test_trained_once_per_content_and_settings(self, speeches, tmp_path, monkeypatch):
        BpeTokenizer(300).prepare(speeches, tmp_path)
        trained = []
        monkeypatch.setattr(
            "longmix.data.tokens.bpe.train_bpe", lambda *_, **settings: trained.append(settings) or 1 / 0
        )
        assert BpeTokenizer(300).prepare(speeches, tmp_path).vocab_size == 300
        others = [
            (BpeTokenizer(301), speeches),
            (BpeTokenizer(300, 3), speeches),
            (BpeTokenizer(300), ListCorpus(train=["a"])),
        ]
        for other, corpus in others:
            with pytest.raises(ZeroDivisionError):
                other.prepare(corpus, tmp_path)
        assert len(trained) == 3

    def test_preparing_twice_is_the_same(self, tmp_path):
        tokenizer = BpeTokenizer(5000)
        corpus = ListCorpus(train=["few words, few words"])
        assert tokenizer.prepare(corpus, tmp_path).fingerprint() == tokenizer.prepare(corpus, tmp_path).fingerprint()
        assert len(list(tmp_path.iterdir())) == 1

    def test_small_corpus_reaches_fewer_tokens_and_says_so(self, tmp_path, caplog):
        caplog.set_level("INFO")
        tokenizer = BpeTokenizer(5000).prepare(ListCorpus(train=["few words, few words"]), tmp_path)
        assert tokenizer.vocab_size == len(tokenizer.token_bytes()) < 300
        assert tokenizer.separator_id == tokenizer.vocab_size - 1
        assert "asked for 5,000" in caplog.text

    def test_damaged_cache_is_refused_by_name(self, speeches, tmp_path):
        BpeTokenizer(300).prepare(speeches, tmp_path)
        file = next(tmp_path.glob("bpe300-*/tokenizer.json"))
        file.write_bytes(file.read_bytes().replace(b"A", b"B", 1))
        with pytest.raises(DataError, match=rf"{file} cannot be used: expected SHA-256 .* Delete the folder"):
            BpeTokenizer(300).prepare(speeches, tmp_path)

    def test_saved_file_serves_as_a_tokenizer_file(self, speeches, tmp_path):
        trained = BpeTokenizer(300).prepare(speeches, tmp_path)
        loaded = TokenizerFile(str(next(tmp_path.glob("bpe300-*/tokenizer.json"))))
        np.testing.assert_array_equal(loaded.encode("The people"), trained.encode("The people"))

    def test_lone_surrogate(self, tmp_path):
        with pytest.raises(DataError, match="train split of list holds a lone surrogate at character 1"):
            BpeTokenizer(300).prepare(ListCorpus(train=["a\ud800"]), tmp_path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"vocab_size": 256}, r"tokenizer\.vocab_size must be at least 257 .* got 256"),
            ({"min_frequency": 0}, r"tokenizer\.min_frequency must be at least 1, got 0"),
        ],
    )
    def test_impossible_settings(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            BpeTokenizer(**settings)


class TestTokenizerFile:
    def test_settings_of_the_file_that_would_change_text_are_ignored(self, tmp_path):
        library = byte_level()
        library.normalizer = normalizers.NFC()
        library.enable_truncation(5)
        library.enable_padding(length=50)
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", library.token_to_id("<s>"))]
        )
        tokenizer = TokenizerFile(saved(library, tmp_path))
        text = "e\u0301 and then some more than five tokens"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert library.token_to_id("<s>") not in tokenizer.encode(text)

    def test_separator_in_the_vocabulary_only(self, tmp_path):
        plain = json.loads(byte_level(specials=[]).to_str())
        plain["model"]["vocab"]["<|endoftext|>"] = len(plain["model"]["vocab"])
        path = tmp_path / "t.json"
        path.write_text(json.dumps(plain))
        tokenizer = TokenizerFile(str(path))
        assert tokenizer.separator_id == tokenizer.vocab_size - 1
        assert tokenizer.token_bytes()[tokenizer.separator_id] == 0
        assert tokenizer.separator_id not in tokenizer.encode(SEPARATOR)
        assert tokenizer.decode([tokenizer.separator_id]) == ""

    def test_added_tokens_that_are_not_special_stand_for_their_text(self, tmp_path):
        library = byte_level()
        library.add_tokens([AddedToken("été", normalized=False)])
        tokenizer = TokenizerFile(saved(library, tmp_path))
        assert list(tokenizer.encode("été")) == [tokenizer.vocab_size - 1]
        assert tokenizer.token_bytes()[-1] == 5

    def test_other_separator(self, tmp_path):
        tokenizer = TokenizerFile(saved(byte_level(specials=["</s>"]), tmp_path), separator="</s>")
        assert tokenizer.separator_id == tokenizer.vocab_size - 1

    def test_missing_separator_lists_the_specials(self, tmp_path):
        with pytest.raises(DataError, match=r"tokenizer\.separator: .* has no token '<eos>'; .* are .*<s>, \[MASK\]"):
            TokenizerFile(saved(byte_level(), tmp_path), separator="<eos>")

    def test_ordinary_token_as_separator(self, tmp_path):
        with pytest.raises(DataError, match=r"tokenizer\.separator: 'a' is an ordinary token"):
            TokenizerFile(saved(byte_level(), tmp_path), separator="a")

    def test_prefix_space(self, tmp_path):
        with pytest.raises(DataError, match="does not reproduce every text byte for byte"):
            TokenizerFile(saved(byte_level(add_prefix_space=True), tmp_path))

    def test_vocabulary_without_most_bytes(self, tmp_path):
        with pytest.raises(DataError, match=r"is not byte-level: 186 of the 243 bytes of UTF-8 have no token"):
            TokenizerFile(saved(byte_level(lacks=range(50, 256)), tmp_path))

    @pytest.mark.parametrize("path", ["", " "])
    def test_empty_path(self, path):
        with pytest.raises(ConfigError, match=r"tokenizer\.path is empty; was a variable of the shell not set"):
            TokenizerFile(path)

    def test_home_in_the_path(self, tmp_path, monkeypatch):
        saved(byte_level(), tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert TokenizerFile("~/tokenizer.json").vocab_size > 257

    def test_missing_file(self):
        with pytest.raises(DataError, match=r"tokenizer\.path: cannot read /nowhere/t\.json"):
            TokenizerFile("/nowhere/t.json")

    def test_file_that_is_no_tokenizer(self, tmp_path):
        (tmp_path / "t.json").write_text("{}")
        with pytest.raises(DataError, match=r"tokenizer\.path .*t\.json is not a tokenizer\.json"):
            TokenizerFile(str(tmp_path / "t.json"))

    def test_id_that_would_fill_the_memory(self, tmp_path):
        with pytest.raises(DataError, match=r"has a token of id 4,000,000,000; ids from 16,777,216 on are not taken"):
            TokenizerFile(edited(lambda tree: tree["model"]["vocab"].update(zzz=4_000_000_000), tmp_path))


def edited(change, tmp_path) -> str:
    """The path of a byte-level tokenizer.json with a change to its tree."""
    tree = json.loads(byte_level().to_str())
    change(tree)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    return str(path)


def split(pattern: str, behavior: str):
    def change(tree) -> None:
        part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
        tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [part, tree["pre_tokenizer"]]}

    return change


def decoder(*parts):
    def change(tree) -> None:
        tree["decoder"] = {"type": "Sequence", "decoders": [tree["decoder"], *parts]}

    return change


class TestPartsOfAFile:
    """Every part that can change a text is refused by its name; parts that only split one are taken."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (decoder({"type": "Strip", "content": " ", "start": 1, "stop": 0}), "a decoder of type Strip"),
            (decoder({"type": "Strip", "content": "\n", "start": 0, "stop": 1}), "a decoder of type Strip"),
            (decoder({"type": "Replace", "pattern": {"String": "qq"}, "content": "q"}), "a decoder of type Replace"),
            (decoder({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}), "of type Metaspace"),
            (decoder({"type": "WordPiece", "prefix": "##", "cleanup": True}), "a decoder of type WordPiece"),
            (decoder({"type": "CTC", "pad_token": "p", "word_delimiter_token": "|", "cleanup": True}), "of type CTC"),
            (lambda tree: tree.update(decoder=None), "it has no decoder"),
            (split("zz", "Removed"), "type Split that removes what it finds"),
            (split(" ?qq", "Removed"), "type Split that removes what it finds"),
            (
                lambda tree: tree.update(
                    pre_tokenizer={
                        "type": "Sequence",
                        "pretokenizers": [{"type": "WhitespaceSplit"}, tree["pre_tokenizer"]],
                    }
                ),
                "a pre-tokenizer of type WhitespaceSplit",
            ),
            (lambda tree: tree.update(pre_tokenizer=None), "not byte-level: its text is split by no pre-tokenizer"),
            (lambda tree: tree.update(pre_tokenizer={"type": "Whitespace"}), "not byte-level: .* split by Whitespace"),
        ],
    )
    def test_refused(self, change, message, tmp_path):
        with pytest.raises(DataError, match=message):
            TokenizerFile(edited(change, tmp_path))

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(
        "change",
        [
            split(r"\p{N}{1,3}", "Isolated"),
            split(r"\s+", "MergedWithNext"),
            decoder({"type": "Fuse"}),
            lambda tree: tree.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits", "individual_digits": True}, tree["pre_tokenizer"]],
                }
            ),
        ],
    )
    def test_taken(self, change, seed, tmp_path):
        tokenizer, text = TokenizerFile(edited(change, tmp_path)), random_text(seed)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @pytest.mark.parametrize("dropout", [0.5, 1.0])
    def test_dropout_is_left_out_and_said(self, dropout, tmp_path, caplog):
        text = " the and there" * 20
        plain = TokenizerFile(saved(byte_level(), tmp_path)).encode(text)
        tokenizer = TokenizerFile(edited(lambda tree: tree["model"].update(dropout=dropout), tmp_path))
        assert "asks for BPE dropout; it is left out" in caplog.text
        again = tokenizer_from_state(tokenizer.state())
        for one in (tokenizer, tokenizer, again):
            np.testing.assert_array_equal(one.encode(text), plain)

    @pytest.mark.parametrize("pattern", ["(a+)+$", "(x+x+)+y"])
    def test_panic_of_a_pattern_is_an_error_of_the_file(self, pattern, tmp_path, capfd):
        """And nothing else: Rust writes lines of its own about it."""
        tokenizer_path = edited(split(pattern, "Isolated"), tmp_path)
        with pytest.raises(DataError, match=r"tokenizer\.path .* cannot encode a text \(.*retry-limit"):
            TokenizerFile(tokenizer_path).encode("a" * 60 + "x" * 60)
        assert capfd.readouterr().err == ""

    def test_what_others_write_meanwhile_is_not_lost(self, capfd):
        with library_errors("the file", "works"), library_errors("the file", "works within"):
            os.write(2, b"a bar\n")
        with pytest.raises(DataError, match="fails"), library_errors("the file", "fails"):
            os.write(2, b"another\n")
            raise ValueError("x")
        os.write(2, b"and on\n")
        assert capfd.readouterr().err == "a bar\nanother\nand on\n"

    @pytest.mark.parametrize("kind", ["pipe", "folder", "device", "latin"])
    def test_what_is_no_file_of_text(self, kind, tmp_path):
        path = tmp_path / "tokenizer.json"
        {
            "pipe": lambda: os.mkfifo(path),
            "folder": path.mkdir,
            "device": lambda: path.symlink_to("/dev/null"),
            "latin": lambda: path.write_bytes(b"\xe9"),
        }[kind]()
        with pytest.raises(DataError, match=r"^tokenizer\.path: cannot read .*tokenizer\.json \([^\n]*\)$"):
            TokenizerFile(str(path))

    def test_pattern_that_is_none(self, tmp_path):
        with pytest.raises(DataError, match=r"is not a tokenizer\.json that `tokenizers` can read .*Oniguruma"):
            TokenizerFile(edited(split("(", "Isolated"), tmp_path))


class TestMissingBytes:
    """Some published vocabularies lack control characters and bytes that UTF-8 never has."""

    LACKS = (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))

    def of(self, tmp_path, **settings) -> TokenizerFile:
        return TokenizerFile(saved(byte_level(lacks=settings.pop("lacks", self.LACKS)), tmp_path), **settings)

    @pytest.mark.parametrize("seed", range(10))
    def test_other_text_comes_back(self, seed, tmp_path):
        tokenizer, text = self.of(tmp_path), random_text(seed)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())

    def test_bytes_that_no_text_holds_do_not_matter(self, tmp_path, caplog):
        caplog.set_level("INFO")
        tokenizer = self.of(tmp_path, lacks=set(range(256)) - UTF8_BYTES)
        assert tokenizer.decode(tokenizer.encode("\x04\U0010ffff")) == "\x04\U0010ffff"
        assert "has no token" not in caplog.text

    def test_what_is_missing_is_said(self, tmp_path, caplog):
        caplog.set_level("INFO")
        self.of(tmp_path)
        assert (
            "no token for 8 of the 243 bytes of UTF-8 (0x04, 0x06, 0x13, 0x14, 0x16, 0x1d, 0xf1, 0xf2)" in caplog.text
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a\x04b", r"the byte 0x04 of the character U\+0004 at 1 "),
            ("\x1d", r"the byte 0x1d of the character U\+001D at 0 "),
            ("é\U00050000\x04", r"the byte 0xf1 of the character U\+50000 at 1 "),
        ],
    )
    def test_refused_by_byte_and_place(self, text, message, tmp_path):
        tokenizer = self.of(tmp_path)
        with pytest.raises(DataError, match=message):
            tokenizer.encode(text)
        with pytest.raises(DataError, match=rf"document 7 of the train split of x \(counted from 0\): .*{message}"):
            Encoder(tokenizer, np.dtype("<u2"), "train split of x")(TextBatch(6, ["fine", text], None))

    @pytest.mark.parametrize(
        ("lacks", "text", "expected"),
        [
            ((0x04,), "a\x04\x04b", "a\ufffd\ufffdb"),
            (LACKS, "é\U00050000é", "é\ufffdé"),
            ((0x04, 0xBF), "a\x04?", "a??"),
            ((0x9F,), "\U0001f642ß", "\ufffd\ufffd"),
        ],
    )
    def test_replaced_if_so_chosen(self, lacks, text, expected, tmp_path, caplog):
        tokenizer = self.of(tmp_path, lacks=lacks, missing_bytes="replace")
        assert tokenizer.decode(tokenizer.encode(text)) == expected
        encoded = Encoder(tokenizer, np.dtype("<u2"), "train split of x")(TextBatch(3, ["a", text], None))
        assert encoded.bytes == 1 + len(expected.encode())
        assert "of the train split of x that the tokenizer has no tokens for are replaced, first in document 4" in (
            caplog.text
        )

    def test_the_choice_is_part_of_its_identity(self, tmp_path):
        refusing, replacing = self.of(tmp_path), self.of(tmp_path, missing_bytes="replace")
        assert refusing.fingerprint() != replacing.fingerprint()
        again = tokenizer_from_state(json.loads(json.dumps(replacing.state())))
        assert again.fingerprint() == replacing.fingerprint()
        assert again.decode(again.encode("\x04")) == "\ufffd"

    def test_nothing_to_replace_by(self, tmp_path):
        with pytest.raises(DataError, match=r"missing_bytes=replace: .* tokens for neither U\+FFFD nor '\?'"):
            self.of(tmp_path, lacks=(0xBF, ord("?")), missing_bytes="replace")

    def test_unknown_choice(self, tmp_path):
        with pytest.raises(ConfigError, match=r"tokenizer\.missing_bytes=drop must be one of refuse, replace"):
            self.of(tmp_path, missing_bytes="drop")

    def test_lone_surrogate_is_still_one(self, tmp_path):
        with pytest.raises(UnicodeEncodeError):
            self.of(tmp_path).encode("a\ud800")


class TestEnds:
    def test_the_separator_unless_told_otherwise(self, tokenizer):
        assert tokenizer.end_ids == (tokenizer.separator_id,)
        assert "end_ids" not in tokenizer.state()

    def test_numbers_have_none(self):
        assert NumberTokenizer(5).end_ids == ()

    def test_kept_with_the_state_but_not_part_of_the_identity(self, tmp_path):
        path = saved(byte_level(), tmp_path)
        tokenizer = TokenizerFile(path, end_ids=[3, 258, 3])
        again = tokenizer_from_state(json.loads(json.dumps(tokenizer.state())))
        assert tokenizer.end_ids == again.end_ids == (3, 258)
        assert again.fingerprint() == TokenizerFile(path).fingerprint()

    @pytest.mark.parametrize("end_ids", [[], [-1], [10**6], ["a"], [True]])
    def test_impossible(self, end_ids, tmp_path):
        with pytest.raises(ConfigError, match=r"tokenizer\.end_ids: .* is not among the ids of"):
            TokenizerFile(saved(byte_level(), tmp_path), end_ids=end_ids)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], r"info\.json: unknown tokenizer kind \[\]"),
        ({}, r"info\.json: unknown tokenizer kind None"),
        ({"kind": "numbers"}, r"info\.json is damaged: KeyError: 'vocab_size'"),
        ({"kind": "library", "json": "{}"}, r"info\.json is damaged: KeyError: 'separator'"),
        ({"kind": "library", "json": 3, "separator": "a"}, r"info\.json is not a tokenizer\.json"),
    ],
)
def test_damaged_state_names_its_source(state, message):
    with pytest.raises(DataError, match=message):
        tokenizer_from_state(state, "info.json")
