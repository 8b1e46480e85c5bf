"""Tokenizers: exact bytes, round trips, specials that never come from text, determinism, the cache of trained ones."""

import json

import numpy as np
import pytest
from list_corpus import ListCorpus, random_text
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from longmix.data.corpora import Sotu
from longmix.data.tokenizers import SEPARATOR, BpeTokenizer, ByteTokenizer, TokenizerFile, tokenizer_from_state
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
    alphabet = pre_tokenizers.ByteLevel.alphabet()[: changes.get("bytes", 256)]
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
            "longmix.data.tokenizers._train_bpe", lambda *_, **settings: trained.append(settings) or 1 / 0
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

    def test_vocabulary_that_lacks_bytes(self, tmp_path):
        with pytest.raises(DataError, match=r"is not byte-level: \d+ of the 256 bytes have no token"):
            TokenizerFile(saved(byte_level(bytes=200), tmp_path))

    def test_missing_file(self):
        with pytest.raises(DataError, match=r"tokenizer\.path: cannot read /nowhere/t\.json"):
            TokenizerFile("/nowhere/t.json")

    def test_file_that_is_no_tokenizer(self, tmp_path):
        (tmp_path / "t.json").write_text("{}")
        with pytest.raises(DataError, match=r"tokenizer\.path .*t\.json is not a tokenizer\.json"):
            TokenizerFile(str(tmp_path / "t.json"))
