"""Prompts to continue, each with words of its own: from a file of JSON Lines, or from the command's own words."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longmix.caches.cache import CacheKind
from longmix.caches.exact import Exact
from longmix.caches.kinds import settings_of
from longmix.caches.star import Star
from longmix.config import GenerateConfig, unknown_key
from longmix.config.border import plain, read
from longmix.data.corpora.json_records import JsonRecords
from longmix.errors import ConfigError, DataError, LongmixError
from longmix.files import sha256_of_json
from longmix.generation.decoding import Choosing, check_ranges
from longmix.generation.run import encoded, given_prompts, identity
from longmix.reading import shortened
from longmix.restore import Restored

OWN_WORDS = (
    *("max_tokens", "samples", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "logprobs", "seed", "stop"),
)
"""Words that a prompt may have of its own."""

DIGEST_LETTERS = 16


@dataclass(frozen=True)
class Request:
    """A prompt with all that its answer depends on.

    Attributes:
        index: its number in the input, from 0.
        identifier: any JSON value that the user gave as `id`; the answers have it too. None if there is none.
        config: the words for this prompt.
    """

    index: int
    identifier: Any
    config: GenerateConfig


@dataclass(frozen=True)
class Prepared:
    """A request in the terms of a model.

    Attributes:
        request: as it was given.
        ids: tokens of the prompt, with the separator.
        choosing: of the next tokens.
        digest: of the prompt, its words and the weights, by which answers are known again.
    """

    request: Request
    ids: list[int]
    choosing: Choosing
    digest: str

    @property
    def samples(self) -> int:
        """How many answers are asked for."""
        return self.request.config.samples

    @property
    def longest(self) -> int:
        """Tokens of the longest row that this can become."""
        return len(self.ids) + self.request.config.max_tokens


def requests_of(config: GenerateConfig) -> list[Request]:
    """What a command is to answer.

    Raises:
        ConfigError: a word of a prompt is unknown or impossible; names the prompt.
        DataError: the file cannot be read, is no JSON, or a prompt is no text.
    """
    if config.input is None:
        prompts = given_prompts(config)
        return [
            Request(index, None, dataclasses.replace(config, prompt=text, prompt_file=None))
            for index, text in enumerate(prompts)
        ]
    if config.prompt_file is not None or config.prompt != "":
        raise ConfigError("give prompt, prompt_file or input, not several of them.")
    found = [_request(config, index, record) for index, record in enumerate(_records(config.input))]
    if not found:
        raise DataError(f"input={config.input} holds no prompt.")
    return found


def _records(path: str) -> Iterator[Any]:
    try:
        with Path(path).open("rb") as stream:  # which may be a pipe
            yield from JsonRecords(stream, f"input={path}")
    except OSError as error:
        raise DataError(f"input={path} cannot be read: {error.strerror}.") from error


def _request(config: GenerateConfig, index: int, record: Any) -> Request:
    where = f"input={config.input}: record {index:,} (counted from 0)"
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(f'{where} is not of the form {{"prompt": "a text"}}: {shortened(record, 60)}.')
    own = {name: value for name, value in record.items() if name not in ("prompt", "id")}
    try:
        if unknown := next((name for name in own if name not in OWN_WORDS), None):
            raise ConfigError(
                f"{unknown_key(shortened(unknown), unknown, ['prompt', 'id', *OWN_WORDS])} What is to be carried along "
                "may stand in id."
            )
        if isinstance(own.get("stop"), str):
            own["stop"] = [own["stop"]]
        made = config
        if own:
            made = read(GenerateConfig, plain(config) | own)
            check_ranges(made)
    except LongmixError as error:
        raise type(error)(f"{where}: {error}") from error
    return Request(index, record.get("id"), dataclasses.replace(made, prompt=record["prompt"], input=None))


def prepared(
    requests: list[Request], restored: Restored, cache: CacheKind | None = None, star: Star | None = None
) -> list[Prepared]:
    """The requests in the terms of a model, of the cache that was asked for, and of how prompts are read.

    Raises:
        ConfigError: a word does not fit the model; names the prompt.
        DataError: a prompt cannot be encoded; names it.
    """
    of_model = {**identity(restored), "precision": restored.precision}
    if cache is not None and cache.name != Exact.name:
        of_model["cache"] = [cache.name, settings_of(cache)]
    if star is not None:
        of_model["prefill"] = settings_of(star)
    return [_prepared(request, restored, of_model) for request in requests]


def _prepared(request: Request, restored: Restored, of_model: dict[str, Any]) -> Prepared:
    config = request.config
    assert isinstance(config.prompt, str)
    try:
        choosing = Choosing.of(config, restored.tokenizer, restored.model.vocab_size)
        ids = encoded(restored.tokenizer, config.prompt)
    except LongmixError as error:
        raise type(error)(f"prompt {request.index:,} (counted from 0): {error}") from error
    words = {name: getattr(config, name) for name in OWN_WORDS if name != "logit_bias"}
    words |= {"seed": config.seed or 0, "bias": sorted(choosing.penalties.bias.items()), "ids": ids}
    return Prepared(request, ids, choosing, sha256_of_json([of_model, words])[:DIGEST_LETTERS])
