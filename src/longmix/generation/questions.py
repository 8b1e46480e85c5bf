"""What caches are told besides prompts: a question, and tokens that a draft model expects."""

from collections.abc import Sequence

from torch import Tensor

from longmix.caches.cache import CacheKind
from longmix.config import GenerateConfig
from longmix.errors import ConfigError, DataError
from longmix.generation.prompts import continuation
from longmix.generation.session import Session
from longmix.generation.specpc import SpecPC
from longmix.model.backbone import LanguageModel
from longmix.restore import Restored, restore


def check_cache_words(config: GenerateConfig, cache: CacheKind | None) -> None:
    """Refuse words that do not go with the cache.

    Raises:
        ConfigError: naming them.
    """
    for name in ("prefill", "shorten"):
        if getattr(config, name) is not None and (config.load is not None or config.save is not None):
            raise ConfigError(
                f"{name} is how a prompt is read, which no saved generation holds; leave save and load out."
            )
    looks_ahead = cache is not None and cache.lookahead_tokens(1) is not None
    if config.load is not None and (config.question is not None or config.draft is not None):
        raise ConfigError("load goes on with the text that was saved; leave question and draft out.")
    if looks_ahead and config.draft is None and config.load is None:
        assert cache is not None
        raise ConfigError(f"cache={cache.name} needs a model that writes ahead; give draft=RUN, or use cache=snapkv.")
    if config.shorten is not None and config.draft is None:
        raise ConfigError("shorten needs a model that chooses what of a prompt is read; give draft=RUN.")
    if config.draft is not None and not looks_ahead and config.shorten is None:
        raise ConfigError(
            f"draft={config.draft} writes ahead for cache=speckv, or chooses for shorten=specpc; give one of them, "
            "or leave draft out."
        )


def question_ids(config: GenerateConfig, restored: Restored) -> list[int]:
    """The tokens of the question; none without one.

    Raises:
        ConfigError: it has none.
        DataError: it is no Unicode, or the tokenizer cannot write it.
    """
    if config.question is None:
        return []
    try:
        tokens = [int(token) for token in restored.tokenizer.encode(config.question)]
    except UnicodeEncodeError as error:
        raise DataError(f"the question is not valid Unicode: {error}.") from error
    if not tokens:
        raise ConfigError("question is empty; give a text, or leave question out.")
    return tokens


def draft_of(config: GenerateConfig, restored: Restored) -> Restored | None:
    """The draft; None without one.

    Raises:
        ConfigError: it has another tokenizer.
        LongmixError: see `restore`.
    """
    if config.draft is None:
        return None
    draft = restore(config.draft, device=config.device, precision=config.precision, trust=config.trust)
    if draft.tokenizer.fingerprint() != restored.tokenizer.fingerprint():
        raise ConfigError(f"draft={config.draft} has another tokenizer than checkpoint={config.checkpoint}.")
    return draft


def shortened(config: GenerateConfig, draft: Restored | None, prompts: Sequence[Tensor]) -> list[Tensor]:
    """What is read of each prompt, int64: all, or what the draft chooses with `shorten`.

    Raises:
        ConfigError: a setting of `shorten` is wrong, or no layer of the draft can choose.
    """
    if config.shorten is None or draft is None:
        return list(prompts)
    config.shorten.check(set(), SpecPC)
    settings: SpecPC = config.shorten.build()
    with draft.autocast():
        found = settings.shortened(draft.model, [prompt.to(draft.device) for prompt in prompts])
    return [kept.to(prompt.device) for kept, prompt in zip(found, prompts, strict=True)]


def lookahead_of(
    config: GenerateConfig, draft: Restored | None, cache: CacheKind | None, prompts: Sequence[Tensor]
) -> Tensor | None:
    """The tokens, int64 [B, n], with which the draft continues each prompt; None where no cache looks ahead."""
    count = None if cache is None else cache.lookahead_tokens(config.max_tokens)
    if draft is None or count is None:
        return None
    with draft.autocast():
        return written_ahead(draft.model, [prompt.to(draft.device) for prompt in prompts], count)


def written_ahead(model: LanguageModel, prompts: Sequence[Tensor], count: int) -> Tensor:
    """The likeliest `count` tokens with which a model continues prompts int64 [T], one after another, int64 [B, n]."""
    session = Session(model, len(prompts))
    session.reserve(max(map(len, prompts)) + count)
    session.prefill(prompts)
    return continuation(session, count)
