"""Tokenizers as checkpoints and token files carry them."""

from typing import Any

from longmix.data.tokens.ids import IdTokenizer
from longmix.data.tokens.tokenizers import ByteTokenizer, LibraryTokenizer, NumberTokenizer, Tokenizer
from longmix.data.tokens.world import WorldTokenizer
from longmix.errors import DataError


def tokenizer_from_state(state: dict[str, Any], source: str = "the saved tokenizer") -> Tokenizer:
    """Rebuild the tokenizer whose `state()` this is.

    Args:
        state: of this version or an earlier one.
        source: where it was read, for messages.

    Raises:
        DataError: the state is not one that longmix wrote.
    """
    kind = state.get("kind") if isinstance(state, dict) else state
    try:
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "numbers":
            return NumberTokenizer(state["vocab_size"])
        if kind == "ids":
            return IdTokenizer(state["vocab_size"], state["separator"])
        if kind == "world":
            return WorldTokenizer(state["vocabulary"], state["vocab_size"], source)
        if kind == "library":
            options = {key: state[key] for key in ("missing_bytes", "end_ids") if key in state}
            return LibraryTokenizer(state["json"], state["separator"], source, **options)
    except (KeyError, TypeError) as error:
        raise DataError(f"{source} is damaged: {type(error).__name__}: {error}") from error
    raise DataError(
        f"{source}: unknown tokenizer kind {kind!r}; expected 'bytes', 'ids', 'library', 'numbers' or 'world'"
    )
