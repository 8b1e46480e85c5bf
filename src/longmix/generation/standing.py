"""What a saved generation says of its rows: their tokens, and the keys of their random numbers."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longmix.data.tokens.tokenizers import Tokenizer
from longmix.generation.draws import KEY_BITS, key_of
from longmix.generation.session import Session
from longmix.wording import counted


@dataclass(frozen=True)
class Standing:
    """A row that can be continued.

    Attributes:
        ids: its tokens, prompt included.
        prompt: how many of them were given and not generated.
        key: of its random numbers; see `longmix.generation.draws`.
    """

    ids: list[int]
    prompt: int
    key: int


def standing_rows(about: dict[str, Any], session: Session, tokenizer: Tokenizer) -> list[Standing]:
    """The rows of a saved generation; call inside `reading`.

    Earlier versions had one generator for all rows, and did not say where the prompts end. Such rows get keys of their
    own, and all of their tokens count as the prompt.

    Args:
        about: as it was saved.
        session: as it was saved.
        tokenizer: of the model.

    Raises:
        ValueError: they are not tokens, or of other rows.
    """
    rows = _checked_ids(about, session, tokenizer)
    if "keys" not in about:
        keys = [key_of(number, row) for number, row in enumerate(rows, _seed_of(about["generator"]))]
        return [Standing(row, len(row), key) for row, key in zip(rows, keys, strict=True)]
    lengths = _checked_numbers("prompts", about, [len(row) + 1 for row in rows])
    keys = _checked_numbers("keys", about, [2**KEY_BITS] * len(rows))
    return [Standing(*row) for row in zip(rows, lengths, keys, strict=True)]


def _checked_ids(about: dict[str, Any], session: Session, tokenizer: Tokenizer) -> list[list[int]]:
    ids = about["ids"]
    known = range(max(tokenizer.vocab_size, session.model.vocab_size))
    if not isinstance(ids, list) or len(ids) != session.batch:
        raise ValueError(f"it does not hold the tokens of {counted(session.batch, 'row')}")
    for row in ids:
        if (
            not isinstance(row, list)
            or len(row) > session.length
            or not all(type(i) is int and i in known for i in row)
        ):
            raise ValueError("a row holds what is no token of the model, or more tokens than were read")
    return ids


def _checked_numbers(name: str, about: dict[str, Any], limits: list[int]) -> list[int]:
    numbers = about[name]
    fitting = isinstance(numbers, list) and len(numbers) == len(limits)
    if not fitting or not all(type(n) is int and 0 <= n < limit for n, limit in zip(numbers, limits, strict=True)):
        raise ValueError(f"its {name} are not those of {counted(len(limits), 'row')}")
    return numbers


def _seed_of(generator: Any) -> int:
    """A seed that depends on the state of a generator."""
    if not isinstance(generator, Tensor) or generator.ndim != 1 or generator.is_floating_point():
        raise ValueError("its generator is no state of one")
    return key_of(0, [abs(int(number)) for number in generator.tolist()]) >> 1
