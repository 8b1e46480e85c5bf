"""How prompts are read: in pieces, before tokens that may come, where caches choose by them, and before a question."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longmix.caches.cache import Cache, CacheKind, PromptReader
from longmix.caches.star import StarReading
from longmix.errors import ConfigError
from longmix.mixers.parts.states import caches, joined, looking_ahead

if TYPE_CHECKING:
    from longmix.generation.session import Session


def read_prompts(
    session: "Session", prompts: Sequence[Tensor], question: Tensor | None, lookahead: Tensor | None, most: int
) -> None:
    """Read prompts into a new session; see `Session.prefill`, whose arguments these are.

    Args:
        session, prompts, question, lookahead: see there.
        most: tokens of all rows that pass the model at once.
    """
    reader = session.cache.reader()
    if reader is not None:
        _read_apart(session, reader, prompts, question)
        return
    longest, device = max(map(len, prompts)), prompts[0].device
    tokens = torch.zeros(session.batch, longest, dtype=torch.int64, device=device)
    ids = torch.zeros(session.batch, longest, dtype=torch.int32, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        ids[row, longest - len(prompt) :] = 1
    known = ids if any(len(prompt) < longest for prompt in prompts) else None
    # the last token is read after the caches have chosen, where tokens to come choose too
    end = longest if lookahead is None or longest == 1 else longest - 1
    if session.star is not None:
        # without a question, the last token chooses the first one that is generated, and sees everything as that does
        star = StarReading(session.star, longest if question is not None else longest - 1)
        for cache in reading_caches(session.state):
            cache.reading = star
    step = session.cache.piece_tokens
    for piece in _pieces(end, max(1, most // session.batch) if step is None else step, step is not None):
        session.advance(tokens[:, piece], None if known is None else known[:, piece])
        for cache in caches(session.state):
            if cache.kind.when == "piece" or piece.stop == longest:
                cache.prompt_ended()
    session.cache.prompts_ended([cache for cache in caches(session.state) if cache.kind.name == session.cache.name])
    for cache in caches(session.state):
        cache.reading = None
    if end < longest and lookahead is not None:
        _look_ahead(session, torch.cat((tokens[:, end:], lookahead), 1), None if known is None else known[:, end:])
        session.advance(tokens[:, end:], None if known is None else known[:, end:])
    if question is not None:
        for piece in question.split(max(1, most // session.batch)):
            session.advance(piece.expand(session.batch, -1), None)


def reading_caches(state: Any) -> list[Cache]:
    """The caches of layers that read prompts as `prefill=star` says; windows and other mixers read as ever."""
    return [cache for cache in caches(state) if cache.kind.takes_star and cache.shape.window is None]


def check_star(kind: CacheKind, state: Any) -> None:
    """Refuse what does not read prompts as `prefill=star` says.

    Raises:
        ConfigError: the cache or all layers are of this sort.
    """
    if not kind.takes_star:
        raise ConfigError(
            f"prefill=star needs a cache that holds a whole prompt and does not look at its weights; "
            f"cache={kind.name} is none. Use cache=exact, cache=quantised or cache=snapkv, or leave prefill out."
        )
    if not reading_caches(state):
        raise ConfigError(
            "prompts are read in blocks by layers of softmax attention that see all tokens, such as flash, and this "
            "model has none; leave prefill=star, or task=locality, out."
        )


def _pieces(length: int, step: int, from_the_end: bool) -> Iterator[slice]:
    """Pieces of `step` tokens; the last one is the shorter, or with `from_the_end` the first."""
    start = 0
    while start < length:
        stop = start + (length % step or step if from_the_end and start == 0 else step)
        yield slice(start, min(stop, length))
        start = stop


def _look_ahead(session: "Session", tokens: Tensor, ids: Tensor | None) -> None:
    """Let the caches compress, knowing the tokens [B, T] that may come; the first of them is the prompt's last."""
    count = tokens.shape[1]
    look = looking_ahead(session.state, count)
    session.model(tokens, state=look, document_ids=None if ids is None else ids.expand(-1, count).contiguous())
    for own, ahead in zip(caches(session.state), caches(look), strict=True):
        own.prompt_ended_before(ahead)


def _read_apart(session: "Session", reader: PromptReader, prompts: Sequence[Tensor], question: Tensor | None) -> None:
    """Read with a kind's own reader: all prompts at once if they have one length, else one by one."""
    logits: list[Tensor] = []

    def advance(tokens: Tensor, state: Any) -> Any:
        output = session.model(tokens, state=state)
        logits[:] = [session.model.logits(output.hidden[:, -1])]
        return output.state

    lengths = {len(prompt) for prompt in prompts}
    groups = [list(prompts)] if len(lengths) == 1 else [[prompt] for prompt in prompts]
    states, found = [], []
    for group in groups:
        begun = session.state if len(groups) == 1 else session.model.decoding_state(1, session.cache)
        asked = None if question is None else question.expand(len(group), -1)
        states.append(reader(advance, begun, torch.stack(group), asked))
        found += logits
    session.state = states[0] if len(states) == 1 else joined(states)
    session.logits = torch.cat(found)
    session.length = max(lengths) + (0 if question is None else len(question))


@torch.no_grad()
def continuation(session: "Session", count: int) -> Tensor:
    """The likeliest next tokens of each row of a session that has read its prompts, one after another, int64 [B, n]."""
    found = []
    for number in range(count):
        assert session.logits is not None
        found.append(session.logits.argmax(-1))
        if number < count - 1:
            session.step(found[-1])
    return torch.stack(found, 1)
