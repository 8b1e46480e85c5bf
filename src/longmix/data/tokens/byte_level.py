"""Exact `tokenizer.json` files: their parts alter no text, and each byte of a text has a token.

A byte-level vocabulary writes the bytes of a text as letters. Some vocabularies lack a few of these: bytes that UTF-8
never has, and control characters that their training texts did not hold. The library drops such a byte without a word.
"""

import contextlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from longmix.data.tokens.parts import described, drops_text, parts_of
from longmix.data.tokens.pieces import is_of_pieces, made_exact
from longmix.errors import ConfigError, DataError
from longmix.reading import shortened

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

STANDARD_ERROR = 2

MISSING_BYTES = ("refuse", "replace")
"""The ways to treat a character with a byte that has no token."""

SUBSTITUTES = ("\ufffd", "?")
"""Replacements of such a character; the first that the vocabulary can write is used."""

UTF8_BYTES = frozenset({*range(0xC0), *range(0xC2, 0xF5)})
"""Bytes that a text in UTF-8 can hold."""

MOST_MISSING = len(UTF8_BYTES) // 2
"""The fewest bytes of a byte-level vocabulary; with fewer, its letters stand for something else."""

MOST_IDS = 1 << 24
"""The largest id: a table of all ids is kept, and a file with larger ones is damaged or hostile."""

PROBE = "Naïve  cafe\u0301\r\n\tx=0; ﬁ Ω 漢字 🙂\u200d \u00a0<|endoftext|> <s> [MASK]\x00▁ "
PROBES = (
    *(PROBE, "", " ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000", "\ufeff"),
    *(" x", "x ", "  x", "x  ", "   x   ", "\nx", "x\n", "\n\nx\n\n", "\tx\t", "\r\nx\r\n", "\u00a0x\u00a0", "\u3000x"),
    *("x y", "x  y", "x   y", "x\n y", "x \ny", "x\r\ny", "x\ry", "x\u2028y", "x\x00y", "x\x7fy"),
    *("do n't I 'm , we 've . it 's ! ?", "don't I'M WE'VE", " .", " ,", "( x )", "`` x ''", "a-b_c", "##x", "x##y"),
    *("1", "12", "123", "1234567890", " 1 22 333", "1,000.50", "x1y22", "½ ²", "١٢٣"),
    *("▁", "▁x", "x▁y", "Ġ", "Ġx", "Ċ", "</w>", "x</w> y", "<0x0A>", "<0xE2><0x96>", "@@ x", "<unk>", "[UNK]", "[CLS]"),
    *(
        "é",
        "e\u0301",
        "ﬁ",
        "Å",
        "İ",
        "ß",
        "漢字",
        "漢 字",
        "한글",
        "ไทย",
        "हिन्दी",
        "🙂",
        "👩\u200d👩\u200d👧",
        "\U00010348",
    ),
    *("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ABC abc AbC", "x" + " " * 40 + "y", "\n" * 20, "=" * 33),
)
"""Texts whose tokens must stand for all of their bytes and give them back: blanks at each end and in runs, kinds of
characters, and the marks that other kinds of tokenizers put into their tokens."""

_EXACT_DECODERS = {"ByteLevel", "Fuse"}


@contextlib.contextmanager
def library_errors(source: str, doing: str) -> Iterator[None]:
    """Turn what the library raises, panics of its Rust code included, into one `DataError`.

    A lone surrogate stays a UnicodeEncodeError: it is a fault of the text.
    """
    try:
        with _panics_unprinted():
            yield
    except (DataError, UnicodeEncodeError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise DataError(f"{source} {doing} ({shortened(error) or type(error).__name__})") from error


_held = threading.Lock()
"""Held by the thread that keeps the standard error back."""


@contextlib.contextmanager
def _panics_unprinted() -> Iterator[None]:
    """Hold the standard error back, and drop it if the code within raises.

    Rust writes several lines about a panic to the descriptor itself before Python hears of it. What else was written
    meanwhile, such as by a progress bar in another thread, follows when there was no panic.
    """
    if not _held.acquire(blocking=False):
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(_held.release)
        try:
            terminal = os.dup(STANDARD_ERROR)
            written = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        except OSError:  # there is no standard error, or no room for a file
            yield
            return
        stack.callback(os.close, terminal)
        os.dup2(written.fileno(), STANDARD_ERROR)
        try:
            yield
        except BaseException as error:
            if _is_panic(error):
                written.truncate(0)
            raise
        finally:
            os.dup2(terminal, STANDARD_ERROR)
            if written.seek(0, os.SEEK_END):
                written.seek(0)
                with contextlib.suppress(OSError):
                    os.write(STANDARD_ERROR, written.read())


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def open_library(text: str, separator: str, source: str) -> "tokenizers.Tokenizer":
    """The library's tokenizer of a `tokenizer.json`, with all that would change or cut a text taken out.

    Raises:
        DataError: the library cannot read it, one of its parts alters text, or it has no such separator.
    """
    from tokenizers import Tokenizer as Library

    with library_errors(source, "is not a tokenizer.json that `tokenizers` can read"):
        library = Library.from_str(text)
    tree = json.loads(text)
    has_pieces = is_of_pieces(tree)
    if has_pieces:
        library = Library.from_str(made_exact(tree, source))
    if library.token_to_id(separator) is None:
        specials = [token.content for token in library.get_added_tokens_decoder().values() if token.special]
        raise DataError(
            f"tokenizer.separator: {source} has no token {separator!r}; its special tokens are {', '.join(specials)}"
        )
    if not has_pieces:
        _refuse_inexact_parts(library, source)
        library.normalizer = None
    # some files hold it in the vocabulary only, where the library would not treat it as special
    library.add_special_tokens([separator])
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True
    if getattr(library.model, "dropout", None):
        logger.warning("%s asks for BPE dropout; it is left out, so that a text has one encoding", source)
        library.model.dropout = None
    return library


def _refuse_inexact_parts(library: "tokenizers.Tokenizer", source: str) -> None:
    splitters, decoders = _parts(library.pre_tokenizer), _parts(library.decoder)
    kinds = {part["type"] for part in splitters}
    if "ByteLevel" not in kinds:
        given = " and ".join(sorted(kinds)) or "no pre-tokenizer"
        raise DataError(
            f"{source} is not byte-level: its text is split by {given}, and its model, {type(library.model).__name__}, "
            "has no tokens for single bytes (byte_fallback), so some text would be lost. Use another tokenizer, or "
            "tokenizer=bytes or tokenizer=bpe."
        )
    altering = [described(part) for part in splitters if drops_text(part)]
    altering += [f"a decoder of type {part['type']}" for part in decoders if part["type"] not in _EXACT_DECODERS]
    if altering or not decoders:
        reason = " and ".join(altering) or "no decoder"
        raise DataError(
            f"{source} does not reproduce every text byte for byte: it has {reason}. Use a byte-level tokenizer "
            "whose decoder is ByteLevel alone and which adds no prefix space, or tokenizer=bytes or tokenizer=bpe."
        )


def _parts(whole: Any) -> list[dict[str, Any]]:
    """The descriptions of a pre-tokenizer or decoder of the library, those of a sequence one by one."""
    return [] if whole is None else parts_of(json.loads(whole.__getstate__()))


def is_byte_level(library: "tokenizers.Tokenizer") -> bool:
    """Whether the letters of the vocabulary stand for bytes."""
    return "ByteLevel" in {part["type"] for part in _parts(library.pre_tokenizer)}


def bytes_by_token(library: "tokenizers.Tokenizer", source: str) -> np.ndarray:
    """Bytes of UTF-8 that each id stands for, int32 [ids]; 0 for special tokens and ids without one."""
    vocabulary = library.get_vocab(with_added_tokens=False)
    added = library.get_added_tokens_decoder()
    num_ids = 1 + max([*vocabulary.values(), *added])
    if num_ids > MOST_IDS:
        raise DataError(f"{source} has a token of id {num_ids - 1:,}; ids from {MOST_IDS:,} on are not taken.")
    counts = np.zeros(num_ids, np.int32)
    for token, index in vocabulary.items():
        counts[index] = len(token)
    for index, special_or_not in added.items():
        counts[index] = 0 if special_or_not.special else len(special_or_not.content.encode())
    return counts


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies, as GPT-2 published them.

    A byte that is a printable letter of Latin-1 stands for itself; the others take the letters from U+0100 in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def bytes_of_letters(token: str) -> bytes:
    """The bytes that a token's letters stand for; a token with any other letter stands for its own UTF-8 bytes."""
    found = [_BYTES_BY_LETTER.get(letter) for letter in token]
    return token.encode() if None in found else bytes(cast(list[int], found))


_BYTES_BY_LETTER = {letter: byte for byte, letter in enumerate(byte_letters())}


def without_letter(library: "tokenizers.Tokenizer") -> bytes:
    """Bytes of UTF-8 that a byte-level vocabulary has no token for."""
    letters, vocabulary = byte_letters(), library.get_vocab(with_added_tokens=False)
    return bytes(byte for byte in sorted(UTF8_BYTES) if letters[byte] not in vocabulary)


class ByteRepertoire:
    """The bytes that a vocabulary has tokens for, and what happens to a text with others.

    Args:
        missing: bytes of UTF-8 without a token.
        missing_bytes: "refuse" such a text, or "replace" the characters by U+FFFD (by "?" where that has none either).
        source: for messages.

    Attributes:
        missing: bytes of UTF-8 without a token.

    Raises:
        ConfigError: `missing_bytes` is something else.
        DataError: most bytes are missing, or nothing is left to replace by.
    """

    def __init__(self, missing: bytes, missing_bytes: str, source: str) -> None:
        if missing_bytes not in MISSING_BYTES:
            raise ConfigError(f"tokenizer.missing_bytes={missing_bytes} must be one of {', '.join(MISSING_BYTES)}.")
        self.missing = missing
        if len(self.missing) > MOST_MISSING:
            raise DataError(
                f"{source} is not byte-level: {len(self.missing)} of the {len(UTF8_BYTES)} bytes of UTF-8 have no "
                "token, so most text would be lost. Use a byte-level tokenizer, or tokenizer=bytes or tokenizer=bpe."
            )
        self._source, self._substitute = source, None
        if missing_bytes == "replace":
            usable = [text for text in SUBSTITUTES if not self._lacking(text)]
            if not usable:
                raise DataError(f"tokenizer.missing_bytes=replace: {source} has tokens for neither U+FFFD nor '?'.")
            self._substitute = usable[0]

    def admit(self, text: str) -> str:
        """The text, with every character that cannot be written replaced if so chosen.

        Raises:
            DataError: it holds one and none is replaced; names byte and place.
            UnicodeEncodeError: it holds a lone surrogate.
        """
        if not self.missing or not (lacking := self._lacking(text)):
            return text
        if self._substitute is not None:
            return text.translate(dict.fromkeys(map(ord, lacking), self._substitute))
        index = min(text.index(character) for character in lacking)
        byte = next(byte for byte in text[index].encode() if byte in self.missing)
        raise DataError(
            f"{self._source} has no token for the byte 0x{byte:02x} of the character U+{ord(text[index]):04X} at "
            f"{index:,} (counted from 0). Take it out of the text, have all such characters replaced by "
            "tokenizer.missing_bytes=replace, or use another tokenizer."
        )

    def without_missing(self, text: str) -> str:
        """The text without the characters that cannot be written."""
        return text.translate(dict.fromkeys(map(ord, self._lacking(text))))

    def _lacking(self, text: str) -> list[str]:
        raw = text.encode()
        if len(raw.translate(None, self.missing)) == len(raw):
            return []
        return [character for character in set(text) if not set(self.missing).isdisjoint(character.encode())]


def first_inexact(library: "tokenizers.Tokenizer", texts: Sequence[str], counts: np.ndarray) -> tuple[str, str] | None:
    """The first of some texts whose tokens do not stand for it, with what came back; None if all do.

    Raises:
        DataError: one text has several encodings.
    """
    rows = [library.encode(text, add_special_tokens=False).ids for text in texts]
    again = library.encode_batch_fast(list(texts), add_special_tokens=False)
    for text, ids, second in zip(texts, rows, again, strict=True):
        if ids != second.ids:
            return text, "two different encodings"
        decoded = library.decode(ids, skip_special_tokens=True)
        if counts[ids].sum() != len(text.encode()) or decoded != text:
            return text, repr(decoded)
    return None
