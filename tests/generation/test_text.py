"""Text as it comes: whole characters, stops, ends, and the same whatever pieces it comes in."""

import random
from collections.abc import Sequence

import pytest

from longmix.data.tokens.byte_level import byte_letters
from longmix.data.tokens.tokenizers import ByteTokenizer, LibraryTokenizer, NumberTokenizer, Tokenizer
from longmix.data.tokens.world import WorldTokenizer
from longmix.generation.text import Row


def streamed(text: bytes, *stop: str) -> tuple[list[str], Row]:
    row = Row(ByteTokenizer(), stop)
    pieces = [row.take(token) for token in text if not row.ended]
    return [*pieces, row.finish()], row


def test_characters_come_whole():
    pieces, row = streamed("aé€𝄞z".encode())
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "𝄞", "z"] and row.text == "aé€𝄞z"
    assert "".join(streamed(b"a\xff\xfe\xfd\xfcb")[0]).startswith("a\ufffd")
    assert streamed("é".encode()[:1])[1].text == "\ufffd"


def library_tokenizer(end_ids: Sequence[int] | None = None) -> LibraryTokenizer:
    """Bytes, a few merges that begin and end within characters, and added tokens, special and not."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    letters = byte_letters()
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    merges = []
    for pair in (b"\xf0\x9f", b"\x82a", b"\xe2\x82", b"\xac\xf0", b"th"):
        merges.append(tuple(letters[byte] for byte in pair))
        vocabulary["".join(merges[-1])] = len(vocabulary)
    library = Library(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_tokens([AddedToken("[文]"), AddedToken("Ġé")])
    library.add_special_tokens(["<|endoftext|>", "<|end|>"])
    return LibraryTokenizer(library.to_str(), "<|endoftext|>", "the test", end_ids=end_ids)


def pieces_tokenizer() -> LibraryTokenizer:
    """Pieces with ▁ for a blank and a token for each byte, as Llama 2 has, which puts a blank in front of a text."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Library

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "t", "h", "e", "é", "字", "th", "the", "▁the", "▁▁", "▁▁▁▁"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁"), ("▁▁", "▁▁")]
    vocabulary = {name: index for index, name in enumerate(names)}
    library = Library(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1, right=0)
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    library.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return LibraryTokenizer(library.to_str(), "<s>", "the test", end_ids=[2])


def world_tokenizer() -> WorldTokenizer:
    """Every byte, and byte strings that begin and end within characters; two ids have no token."""
    contents = [bytes([byte]) for byte in range(256)]
    contents += [b" the", b"  ", b"\r\n", b"\xf0\x9f", b"\x82a", b"\xe2\x82", b"\xac\xf0", "字".encode()]
    lines = [f"{index} {content!r} {len(content)}" for index, content in enumerate(contents, 1)]
    return WorldTokenizer("\n".join(lines), vocab_size=len(contents) + 3)


TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "numbers": NumberTokenizer(300),
    "library": library_tokenizer(),
    "pieces": pieces_tokenizer(),
    "world": world_tokenizer(),
}


def random_ids(tokenizer: Tokenizer, drawn: random.Random) -> list[int]:
    """Characters of one to four bytes, stray bytes, cut characters, and any other ids that end no row."""
    ids: list[int] = []
    for _ in range(drawn.randrange(1, 12)):
        character = chr(drawn.choice([drawn.randrange(128), drawn.randrange(0x80, 0xD800), 0x1F642, 0x20AC, 0xFFFD]))
        kind = drawn.randrange(4)
        if isinstance(tokenizer, NumberTokenizer) or kind == 0:
            ids.append(drawn.randrange(tokenizer.vocab_size))
        elif kind == 1:
            ids.append(drawn.randrange(0x80, 0x100))
        else:
            whole = list(map(int, tokenizer.encode(character)))
            ids += whole if kind == 2 else whole[: drawn.randrange(len(whole) + 1)]
    return [token for token in ids if token not in (tokenizer.separator_id, *tokenizer.end_ids)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_what_is_streamed_is_what_decoding_the_whole_gives(tokenizer):
    drawn = random.Random(0)
    for _ in range(1000):
        ids = random_ids(tokenizer, drawn)
        whole, row = tokenizer.decode(ids), Row(tokenizer, [])
        pieces = [row.take(token) for token in ids]
        assert "".join([*pieces, row.finish()]) == row.text == whole, ids
        stop = whole[drawn.randrange(len(whole)) :][: drawn.randrange(1, 4)] if whole else "x"
        row = Row(tokenizer, [stop, "never there"])
        pieces = [row.take(token) for token in ids if not row.ended]
        assert "".join([*pieces, row.finish()]) == row.text == whole.partition(stop)[0], (ids, stop)
        assert row.ended == (stop in whole)
        cut = drawn.randrange(len(ids) + 1)  # the first part as decoded by a call that another one goes on from
        head = Row(tokenizer, [])
        shown = [head.take(token) for token in ids[:cut]]
        rest = Row(tokenizer, [], before=ids[:cut])
        assert "".join([*shown, *map(rest.take, ids[cut:]), rest.finish()]) == whole, (ids, cut)


OF_BYTES = [name for name in TOKENIZERS if name != "numbers"]


@pytest.mark.parametrize("name", OF_BYTES)
def test_any_bytes_are_streamed_as_they_are_decoded_at_once(name):
    """Bytes of which most are no UTF-8, and UTF-8 of any character, a token for each byte or in longer tokens."""
    tokenizer = TOKENIZERS[name]
    ids = {tokenizer.token_content(token): token for token in range(tokenizer.vocab_size)}
    del ids[b""]  # special ids
    longer = [content for content in ids if len(content) > 1]
    drawn = random.Random(1)
    for number in range(600):
        parts = [drawn.randbytes(drawn.randrange(4)) for _ in range(4)]
        parts += [chr(drawn.choice([0, 9, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, 0x10FFFF])).encode()]
        drawn.shuffle(parts)
        tokens = [token for part in parts for token in ([part] if part in ids else [bytes([byte]) for byte in part])]
        tokens += drawn.sample(longer, 2) if longer else []
        raw = b"".join(tokens)
        whole = raw.decode(errors="replace")
        assert tokenizer.decode([ids[token] for token in tokens]) == whole
        stop = whole[number % len(whole) :][: 1 + number % 5] if number % 2 else "\ue000never"
        row = Row(tokenizer, [stop])
        shown = "".join(row.take(ids[token]) for token in tokens if not row.ended) + row.finish()
        assert shown == row.text == whole.partition(stop)[0], (raw, stop)
        assert row.stopped == row.ended == (stop in whole)


@pytest.mark.parametrize("name", OF_BYTES)
def test_a_stop_of_any_tokens_ends_a_row_wherever_these_begin_and_end(name):
    tokenizer = TOKENIZERS[name]
    text = "  the é字🙂 the  the\r\n字 end"
    for begin in range(len(text)):
        for length in (1, 2, 5, 9):
            stop = text[begin : begin + length]
            row = Row(tokenizer, ["not there", stop])
            shown = [row.take(int(token)) for token in tokenizer.encode(text) if not row.ended]
            assert "".join([*shown, row.finish()]) == text.partition(stop)[0] and row.stopped


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (b"\x80\xf0\x9f\x99\x82", ["\ufffd", "", "", "", "🙂", ""]),
        (b"\xf0\x9f\xe2\x82\xac", ["", "", "\ufffd", "", "€", ""]),
        (b"\xf0\x9fa", ["", "", "\ufffda", ""]),
        (b"\xff" * 5, [*"\ufffd" * 5, ""]),
        (b"\xed\xa0\x80", ["", "", "\ufffd\ufffd\ufffd", ""]),  # a surrogate, which UTF-8 has not
        (b"ab\xe2\x82", ["a", "b", "", "", "\ufffd"]),
    ],
)
def test_invalid_bytes_take_no_character_with_them(text, pieces):
    assert streamed(text)[0] == pieces
    assert "".join(pieces) == text.decode(errors="replace")


def test_a_row_ends_at_every_end_of_a_text_and_at_the_next_document():
    tokenizer = library_tokenizer()
    end = tokenizer.vocab_size - 1
    for ends, stopping in ((None, [tokenizer.separator_id]), ([end, 5], [end, 5, tokenizer.separator_id])):
        tokenizer = library_tokenizer(ends)
        for token in range(tokenizer.vocab_size):
            row = Row(tokenizer, [])
            row.take(token)
            assert row.ended == (token in stopping)
            assert not (row.ended and row.text)


def test_nothing_of_a_stop_is_shown():
    pieces, row = streamed(b"one. two. END three", "END", "three")
    assert "".join(pieces) == row.text == "one. two. " and row.ended
    pieces, row = streamed(b"one EN", "END")
    assert "".join(pieces) == row.text == "one EN" and not row.ended
    row = Row(ByteTokenizer(), ["xyz"])
    assert [row.take(token) for token in (97, 120, 256)] == ["", "", "ax"] and row.ended and row.finish() == ""
