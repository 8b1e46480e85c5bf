"""The parts of a `tokenizer.json` around its model, and which of them leave every text as it is."""

from typing import Any

EXACT_SPLITTERS = {"ByteLevel", "Digits", "FixedLength", "Punctuation", "Split", "UnicodeScripts"}
"""Pre-tokenizers that split a text and alter none of it, if they are told neither to remove nor to add."""


def parts_of(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The descriptions of a normalizer, pre-tokenizer or decoder, those of a sequence one by one."""
    waiting, parts = [description] if description else [], []
    while waiting:
        part = waiting.pop(0)
        lists = (part.get(key) for key in ("pretokenizers", "decoders", "normalizers"))
        inner: list[dict[str, Any]] | None = next(filter(None, lists), []) if part["type"] == "Sequence" else None
        if inner is None:
            parts.append(part)
        else:
            waiting = [*inner, *waiting]
    return parts


def drops_text(splitter: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer leaves text out or adds some, or is none of those that do not."""
    known = splitter["type"] in EXACT_SPLITTERS
    return not known or splitter.get("behavior") == "Removed" or bool(splitter.get("add_prefix_space"))


def described(splitter: dict[str, Any]) -> str:
    """What a pre-tokenizer does to a text, in words."""
    if splitter.get("add_prefix_space"):
        return "a prefix space (add_prefix_space)"
    if splitter.get("behavior") == "Removed":
        return f"a pre-tokenizer of type {splitter['type']} that removes what it finds"
    return f"a pre-tokenizer of type {splitter['type']}"
