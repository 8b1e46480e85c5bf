"""`GivenTokens`: token files of other programs as data, read where they lie."""

from collections.abc import Sequence
from typing import Unpack

from longmix.data.corpora.token_corpus import TokenFiles
from longmix.data.text_data import PackedOptions, TokenData
from longmix.data.tokens.token_files import TokenFile
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import settings_at


class GivenTokens(TokenData):
    """Token files of Megatron-LM, RWKV, llm.c, modded-nanogpt, OLMo or NumPy; see `TokenData`.

    Args:
        path, format, dtype, eod, validation, test, validation_fraction, test_fraction: see `TokenFiles`.
        tokenizer: the one that the files were made with.
        order: see `TokenData`.
        options: see `TokenData`.

    Raises:
        ConfigError: a setting is impossible.
        DataError: see `TokenFiles`.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        tokenizer: Tokenizer,
        *,
        format: str = "auto",
        dtype: str = "auto",
        eod: int | None = None,
        validation: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.0,
        order: str = "shuffled",
        **options: Unpack[PackedOptions],
    ) -> None:
        with settings_at("data", TokenFiles.usual_place):
            corpus = TokenFiles(path, format, dtype, eod, validation, test, validation_fraction, test_fraction)
        super().__init__(corpus, tokenizer, order=order, **options)

    def _token_file_of(self, name: str, split: str) -> TokenFile:
        with settings_at("data", TokenFiles.usual_place):
            return super()._token_file_of(name, split)
