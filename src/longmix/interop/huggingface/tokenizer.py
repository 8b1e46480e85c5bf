"""Our tokenizers as files that `transformers.AutoTokenizer` loads, with the same ids.

Bytes are a byte-level BPE without merges, whose 256 letters stand for the bytes in their order. Numbers are whole
words, without leading zeros. `tokenizer(text)` puts the separator before the text, as every document had it in training
and as generate.py does; with `add_special_tokens=False` the ids are exactly those of `Tokenizer.encode`. A separator
spelled out in a text is text.
"""

from typing import TYPE_CHECKING, Any

from longmix.data.tokens.byte_level import byte_letters
from longmix.data.tokens.ids import IdTokenizer
from longmix.data.tokens.tokenizers import SEPARATOR, ByteTokenizer, LibraryTokenizer, NumberTokenizer, Tokenizer
from longmix.errors import ConfigError
from longmix.interop.huggingface.specials import end_token

if TYPE_CHECKING:
    import tokenizers


def huggingface_tokenizer(tokenizer: Tokenizer) -> Any:
    """A `PreTrainedTokenizerFast` of the same ids.

    Raises:
        ConfigError: a tokenizer of another kind.
    """
    from transformers import PreTrainedTokenizerFast

    specials = {}
    if isinstance(tokenizer, NumberTokenizer | IdTokenizer):
        library = _numbers(tokenizer.vocab_size)
    elif isinstance(tokenizer, ByteTokenizer | LibraryTokenizer):
        library = _bytes() if isinstance(tokenizer, ByteTokenizer) else _library(tokenizer)
        separator = str(library.id_to_token(tokenizer.separator_id))
        _begin_with(library, separator, tokenizer.separator_id)
        end = str(library.id_to_token(end_token(tokenizer)))
        specials = {"bos_token": separator, "eos_token": end, "pad_token": end}
    else:
        raise ConfigError(f"a {type(tokenizer).__name__} has no form that AutoTokenizer loads.")
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        split_special_tokens=True,  # a text that spells a special token out is text
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **specials,
    )


def _bytes() -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    library = Library(models.BPE(vocab={letter: byte for byte, letter in enumerate(byte_letters())}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([SEPARATOR])
    return library


def _library(tokenizer: LibraryTokenizer) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Library

    return Library.from_str(tokenizer.library_json())


def _numbers(vocab_size: int) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.WordLevel(vocab={str(number): number for number in range(vocab_size)}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return library


def _begin_with(library: "tokenizers.Tokenizer", separator: str, separator_id: int) -> None:
    from tokenizers import processors

    library.post_processor = processors.TemplateProcessing(
        single=[separator, "$A"],
        pair=[separator, "$A", separator, "$B:1"],
        special_tokens=[(separator, separator_id)],
    )
