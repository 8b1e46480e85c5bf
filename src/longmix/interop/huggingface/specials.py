"""Tokens that begin and end texts, out of a folder of the Hugging Face libraries and into it.

Such a folder names the ends of texts in three places: `config.json`, `generation_config.json` and the files of its
tokenizer, each with one id or several. transformers' `generate` stops at those of the second, or of the first. Here
texts end at all of them, which a tokenizer keeps as `end_ids`. The separator, which begins every document in training,
is the token that begins texts there.
"""

from pathlib import Path
from typing import Any

from longmix.data.tokens.tokenizers import LibraryTokenizer, Tokenizer, TokenizerFile
from longmix.errors import CheckpointError, DataError
from longmix.interop.huggingface.folder import read_json

TOKENIZER = "tokenizer.json"
BYTES = "bytes"
"""In the place of a tokenizer's file: every byte is a token, as with `tokenizer=bytes` in training."""
VOCABULARY, VOCABULARIES = "rwkv_vocab_v20230424.txt", "rwkv_vocab*.txt"
"""The name of RWKV's vocabulary in such a folder, and names by which it is found there."""

GENERATION = "generation_config.json"


def read_tokenizer(
    folder: Path, theirs: Any, separator: str | None, missing_bytes: str, name: str = TOKENIZER
) -> LibraryTokenizer:
    """The tokenizer of a folder that another library wrote, with the ids that end its texts.

    Args:
        folder: the tokenizer's, which is the model's as a rule.
        theirs: what the model's `config.json` says, with `eos_token_id`.
        separator: the token that starts each document; None takes what the folder begins texts with, else ends them.
        missing_bytes: see `LibraryTokenizer`.
        name: of the tokenizer's file.

    Raises:
        CheckpointError: one of its files is damaged.
        DataError: there is no tokenizer, none that longmix reads, or none that names a token for the separator.
    """
    path = folder / name
    if not path.is_file() and name != TOKENIZER:
        raise DataError(
            f"--tokenizer {path}: there is no such file; give a tokenizer.json, RWKV's vocabulary, a folder with one, "
            f"or {BYTES} for a model of bytes."
        )
    if not path.is_file():
        raise DataError(
            f"{folder} has no {name}, which is the form of tokenizers that longmix reads; give one by --tokenizer, "
            f"or {BYTES} there for a model of bytes."
        )
    named = _named_tokens(folder, theirs.model_type, required=separator is None)
    chosen = _separator(folder, named) if separator is None else separator
    tokenizer = TokenizerFile(str(path), chosen, missing_bytes)
    ends = _end_ids(folder, theirs, None if named is None else named.eos_token_id)
    kept = [token for token in ends if 0 <= token < tokenizer.vocab_size]
    return tokenizer.ending_at(kept) if kept and kept != [tokenizer.separator_id] else tokenizer


def _named_tokens(folder: Path, model_type: str, required: bool) -> Any:
    """transformers' object of the tokenizer; None if that cannot be made and is not required."""
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

    # The former warns of a type of model that transformers does not know.
    loader: Any = AutoTokenizer if model_type in CONFIG_MAPPING else PreTrainedTokenizerFast
    try:
        return loader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever is wrong with it
        if not required:
            return None
        reason = " ".join(str(error).split())
        raise DataError(f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {reason}") from error


def _separator(folder: Path, named: Any) -> str:
    config = folder / "config.json"
    first = _ids(config, "bos_token_id") if config.is_file() else []
    begins = named.convert_ids_to_tokens(first[0]) if first and 0 <= first[0] < len(named) else None
    separator = named.bos_token or begins or named.eos_token
    if separator is None:
        raise DataError(
            f"the tokenizer in {folder} names no token that begins or ends a text; give one by --separator."
        )
    return str(separator)


def _end_ids(folder: Path, theirs: Any, named: int | None) -> list[int]:
    """The ids without repetition. The tokenizer's own comes first, so that `end_token` finds it again."""
    found = [] if named is None else [named]
    found += _ids_of(theirs.eos_token_id, folder / "config.json", "eos_token_id")
    if (folder / GENERATION).is_file():
        found += _ids(folder / GENERATION, "eos_token_id")
    return list(dict.fromkeys(found))


def _ids(path: Path, key: str) -> list[int]:
    return _ids_of(read_json(path).get(key), path, key)


def _ids_of(given: Any, path: Path, key: str) -> list[int]:
    """The ids that a file gives as one number, a list, or not at all."""
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{path}: {key} is {given!r}; it must be an id or a list of ids.")
    return ids


def write_specials(config: Any, tokenizer: Tokenizer) -> None:
    """Tell a configuration of transformers which ids begin, end and pad texts; `generate` there stops where ours does.

    Texts are padded by the token that ends them, as is usual.
    """
    ends = list(tokenizer.end_ids)
    config.bos_token_id = tokenizer.separator_id if tokenizer.separator_id >= 0 else None
    config.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
    config.pad_token_id = end_token(tokenizer) if ends else None


def end_token(tokenizer: Tokenizer) -> int:
    """The id to call the end of a text where there is room for one: the first that is no part of texts."""
    sizes = tokenizer.token_bytes()
    return next((token for token in tokenizer.end_ids if sizes[token] == 0), tokenizer.separator_id)
