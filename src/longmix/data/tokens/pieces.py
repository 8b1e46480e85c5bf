"""Vocabularies of SentencePiece's kind (Llama 2, Mistral, Gemma): pieces with ▁ for a blank, and a token for each byte.

They are made exact. The blank that such files put in front of a text is left out, and so is Unicode normalisation. A ▁
of the text itself, which would come back as a blank, is written in bytes. So is none of the text taken for a token
that the vocabulary writes alike, such as <s> or <0x0A>.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from longmix.data.tokens.parts import described, drops_text, parts_of
from longmix.errors import DataError

if TYPE_CHECKING:
    import tokenizers

BLANK = "▁"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def is_of_pieces(tree: dict[str, Any]) -> bool:
    """Whether the content of a `tokenizer.json` has pieces, and bytes for what they lack."""
    kinds = {part["type"] for part in parts_of(tree.get("pre_tokenizer"))}
    return bool((tree.get("model") or {}).get("byte_fallback")) and "ByteLevel" not in kinds


def made_exact(tree: dict[str, Any], source: str) -> str:
    """The same `tokenizer.json` without what alters a text.

    Raises:
        DataError: it has a part that cannot be left out.
    """
    model, splitters = tree["model"], parts_of(tree.get("pre_tokenizer"))
    at_fault = [described(part) for part in splitters if part["type"] != "Metaspace" and drops_text(part)]
    at_fault += [f"the setting {key}" for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if at_fault:
        raise DataError(
            f"{source} does not reproduce every text byte for byte: it has {' and '.join(at_fault)}. Use another "
            "tokenizer, or tokenizer=bytes or tokenizer=bpe."
        )
    for part in splitters:
        if part["type"] == "Metaspace":
            part.pop("add_prefix_space", None)
            part["prepend_scheme"] = "never"
    has_marks = "Metaspace" in {part["type"] for part in splitters} or any(
        part["type"] == "Replace" and part.get("content") == BLANK for part in parts_of(tree.get("normalizer"))
    )
    swap = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    back = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
    decoders = [*([back] if has_marks else []), {"type": "ByteFallback"}, {"type": "Fuse"}]
    exact = {"normalizer": swap if has_marks else None, "decoder": {"type": "Sequence", "decoders": decoders}}
    return json.dumps({**tree, **exact, "truncation": None, "padding": None})


class Pieces:
    """What the ids of such a vocabulary stand for, and exact encoding.

    Args:
        library: of `made_exact`.
        num_ids: ids are below this.

    Attributes:
        contents: bytes of each id; none for special ids and ids without a token.
        bytes: that have a token each.
    """

    def __init__(self, library: "tokenizers.Tokenizer", num_ids: int) -> None:
        self._library, self._has_marks = library, library.normalizer is not None
        vocabulary, added = library.get_vocab(with_added_tokens=False), library.get_added_tokens_decoder()
        self.contents = [b""] * num_ids
        self._byte_ids = {}
        for token, index in [*vocabulary.items(), *((token.content, index) for index, token in added.items())]:
            if byte := BYTE.fullmatch(token):
                self._byte_ids[int(byte[1], 16)] = index
                self.contents[index] = bytes.fromhex(byte[1])
            else:
                text = token.replace(BLANK, " ") if self._has_marks else token
                self.contents[index] = text.encode(errors="surrogatepass")
        controls = {token.content for token in added.values() if token.special and not BYTE.fullmatch(token.content)}
        unknown = getattr(library.model, "unk_token", None) or _unknown_piece(library)
        controls |= {unknown} if unknown else set()
        for content in controls:
            if (special := library.token_to_id(content)) is not None:
                self.contents[special] = b""
        self.bytes = frozenset(self._byte_ids)
        self._sizes = np.array([len(content) for content in self.contents], np.int32)
        alike = "|".join(map(re.escape, sorted(filter(None, controls), key=len, reverse=True)))
        self._alike = re.compile(f"{BYTE.pattern}|{alike}" if alike else BYTE.pattern)

    def sizes(self) -> np.ndarray:
        """Bytes of each id, int32 [ids]."""
        return self._sizes.copy()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        rows = [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [
            row if int(self._sizes[row].sum()) == len(text.encode()) else self._in_stretches(text)
            for text, row in zip(texts, rows, strict=True)
        ]

    def _in_stretches(self, text: str) -> list[int]:
        """Ids of a text that spells a token or a mark out."""
        ids: list[int] = []
        for stretch in self._stretches(text):
            if stretch == BLANK and self._has_marks:
                ids += [self._byte_ids[byte] for byte in stretch.encode()]
            else:
                ids += self._library.encode(stretch, add_special_tokens=False).ids
        return ids

    def _stretches(self, text: str) -> Iterator[str]:
        for part in re.split(f"({BLANK})", text) if self._has_marks else [text]:
            begin = 0
            for found in self._alike.finditer(part):
                yield part[begin : found.start() + 1]  # cut within, it is nothing but text
                begin = found.start() + 1
            if part[begin:]:
                yield part[begin:]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.contents[int(i)] for i in ids).decode(errors="replace")

    def first_inexact(self, texts: Sequence[str]) -> tuple[str, str] | None:
        """The first of some texts whose tokens do not stand for it, with what came back; None if all do."""
        for text, ids in zip(texts, self.encode(texts), strict=True):
            if ids != self.encode([text])[0]:
                return text, "two different encodings"
            if self.decode(ids) != text:
                return text, repr(self.decode(ids))
        return None


def _unknown_piece(library: "tokenizers.Tokenizer") -> str | None:
    """The piece of a Unigram model for what it does not know."""
    index = json.loads(library.model.__getstate__()).get("unk_id")
    return None if index is None else library.id_to_token(index)
