"""Scores of the next token that depend on the tokens before it, or on the user's wish, before a token is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longmix.errors import ConfigError

LARGEST = 1e6
"""Of every number here, so that scores stay finite."""


@dataclass(frozen=True)
class Penalties:
    """Changes of the scores, applied in this order: bias, repetition, frequency and presence.

    Attributes:
        repetition: positive scores of tokens that the prompt or the generated text holds are divided by it, others are
            multiplied (Keskar et al. 2019, arXiv 1909.05858, section 4.1, with the sign as transformers has it); 1
            changes nothing. The separator in front of a prompt counts too.
        presence: is subtracted from the score of every token that was generated, as in OpenAI's interface.
        frequency: is subtracted as many times as a token was generated, as there.
        bias: numbers that are added to the scores of tokens, by id.

    Raises:
        ConfigError: a number out of range.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 / LARGEST <= self.repetition <= LARGEST:  # not a number is refused too
            raise ConfigError(
                f"repetition_penalty={self.repetition} must be from {1 / LARGEST:g} to {LARGEST:g}; 1 changes nothing."
            )
        for name in ("presence", "frequency"):
            if not abs(getattr(self, name)) <= LARGEST:
                raise ConfigError(
                    f"{name}_penalty={getattr(self, name)} must be from -{LARGEST:g} to {LARGEST:g}; 0 changes nothing."
                )
        for token, value in self.bias.items():
            if not abs(value) <= LARGEST:
                raise ConfigError(f"logit_bias of token {token} must be from -{LARGEST:g} to {LARGEST:g}, not {value}.")

    @property
    def counts_tokens(self) -> bool:
        """Whether earlier tokens change anything."""
        return (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)

    def applied(self, logits: Tensor, counts: "TokenCounts | None") -> Tensor:
        """The changed scores [B, V], of the type of `logits`, which stay as they are.

        Args:
            logits: scores [B, V].
            counts: of the tokens before; needed where `counts_tokens`.
        """
        scores = logits
        if self.bias:
            ids = torch.tensor(list(self.bias), device=logits.device)
            values = torch.tensor(list(self.bias.values()), dtype=logits.dtype, device=logits.device)
            scores = scores.index_add(-1, ids, values.expand(len(logits), -1))
        if not self.counts_tokens:
            return scores
        assert counts is not None
        if self.repetition != 1:
            punished = torch.where(scores < 0, scores * self.repetition, scores / self.repetition)
            scores = torch.where(counts.seen, punished, scores)
        if self.frequency or self.presence:
            generated = counts.generated.to(scores.dtype)
            scores = scores - self.frequency * generated - self.presence * (generated > 0).to(scores.dtype)
        return scores


class TokenCounts:
    """How often each row holds each token.

    Args:
        rows: tokens of each row, prompt included.
        prompts: how many of these are the prompt.
        vocab_size: ids are below it.
        device: of the counts.

    Attributes:
        seen: whether the row holds the token, bool [B, V].
        generated: how often the token came after the prompt, int32 [B, V].
    """

    def __init__(
        self, rows: Sequence[Sequence[int]], prompts: Sequence[int], vocab_size: int, device: torch.device | str
    ) -> None:
        self.seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
        self.generated = torch.zeros(len(rows), vocab_size, dtype=torch.int32, device=device)
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            tokens = torch.tensor(row, dtype=torch.int64, device=device)
            self.seen[number, tokens] = True
            self.generated[number] = tokens[prompt:].bincount(minlength=vocab_size)

    def add(self, tokens: Tensor) -> None:
        """Count one more token of each row, int64 [B]."""
        self.seen.scatter_(1, tokens[:, None], True)
        self.generated.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.int32))
