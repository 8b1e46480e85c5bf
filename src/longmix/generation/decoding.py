"""Rows that go on side by side, token by token, each as if it were alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from longmix.config import GenerateConfig
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError
from longmix.generation.biases import biases
from longmix.generation.draws import uniforms
from longmix.generation.penalties import Penalties, TokenCounts
from longmix.generation.sampling import Sampling, check_finite
from longmix.generation.session import Session
from longmix.generation.text import Row

FinishReason = Literal["stop", "end", "length"]


@dataclass(frozen=True)
class TokenScore:
    """How likely the model found a token that was drawn, whatever the settings made of that.

    Attributes:
        token: the id.
        logprob: logarithm of its probability after the tokens before it, in nats.
        top: the most likely ids with the logarithms of theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Continuation:
    """What one row was continued with.

    Attributes:
        text: without the prompt and without a stop.
        tokens: ids of what was generated, with the id that ended the text, or those of the stop.
        finish_reason: "stop" at a text of `stop`, "end" at an id that ends a text, "length" at `max_tokens`.
        logprobs: of each token; None if nobody asked.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenScore] | None


@dataclass
class Writing:
    """A row in the course of being continued.

    Attributes:
        ids: its tokens so far, prompt included.
        prompt: how many of them were given and not generated.
        key: of its random numbers; see `longmix.generation.draws`.
        row: its text since this began.
        limit: the most tokens to add.
        scores: of the tokens that were added, where they are asked for.
    """

    ids: list[int]
    prompt: int
    key: int
    row: Row
    limit: int
    scores: list[TokenScore] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether nothing more is added."""
        return self.row.ended or self.row.count >= self.limit

    def continuation(self, with_scores: bool) -> Continuation:
        """What was added; call it after the end."""
        reason: FinishReason = "stop" if self.row.stopped else "end" if self.row.ended else "length"
        added = self.ids[len(self.ids) - self.row.count :]
        return Continuation(self.row.text, added, reason, self.scores if with_scores else None)


@dataclass(frozen=True)
class Choosing:
    """How the next tokens of some rows are chosen.

    Attributes:
        sampling: filters of the distribution.
        penalties: changes of the scores before.
        logprobs: how many likely tokens to note beside each that is drawn; None notes nothing.
    """

    sampling: Sampling
    penalties: Penalties
    logprobs: int | None

    @classmethod
    def of(cls, config: GenerateConfig, tokenizer: Tokenizer, vocab_size: int) -> "Choosing":
        """That of a command's words.

        Raises:
            ConfigError: a word is out of its range, or names a token that there is not.
        """
        if config.logprobs is not None and config.logprobs > vocab_size:
            raise ConfigError(f"logprobs={config.logprobs} is more than the {vocab_size:,} ids of this model.")
        bias = biases(config.logit_bias or {}, tokenizer, vocab_size)
        return cls(_sampling_of(config), _penalties_of(config, bias), config.logprobs)

    def chosen(self, logits: Tensor, rows: Sequence[Writing], counts: TokenCounts | None) -> Tensor:
        """The next token of each row, int64 [B].

        Args:
            logits: the model's scores [B, V].
            rows: whose turn it is.
            counts: of their tokens, where `penalties.counts_tokens`.

        Raises:
            NonFiniteError: a score is infinite or not a number.
        """
        check_finite(logits)
        scores = self.penalties.applied(logits, counts)
        numbers = uniforms([row.key for row in rows], [len(row.ids) for row in rows])
        tokens = self.sampling.draw(scores, numbers)
        if self.logprobs is not None:
            for row, score in zip(rows, token_scores(logits, tokens, self.logprobs), strict=True):
                if not row.is_done:
                    row.scores.append(score)
        return tokens


def check_ranges(config: GenerateConfig) -> None:
    """Refuse words that no model could take, before one is loaded.

    Raises:
        ConfigError: a word is out of its range, or a stop is empty.
    """
    _sampling_of(config)
    _penalties_of(config, {})
    if "" in config.stop:
        raise ConfigError("stop has an empty text, which every text ends with; leave it out.")


def _sampling_of(config: GenerateConfig) -> Sampling:
    return Sampling(config.temperature, config.top_k, config.top_p, config.min_p)


def _penalties_of(config: GenerateConfig, bias: Mapping[int, float]) -> Penalties:
    return Penalties(config.repetition_penalty, config.presence_penalty, config.frequency_penalty, bias)


def token_scores(logits: Tensor, tokens: Tensor, top: int) -> list[TokenScore]:
    """How likely the model finds one token of each row, and the likeliest ones.

    Args:
        logits: the model's scores [B, V].
        tokens: int64 [B].
        top: how many of the likeliest.
    """
    logprobs = logits.double().log_softmax(-1)
    own = logprobs.gather(-1, tokens[:, None])[:, 0]
    best = logprobs.topk(top, -1)
    rows = zip(tokens.tolist(), own.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenScore(token, logprob, list(zip(ids, values, strict=True))) for token, logprob, ids, values in rows]


def write_on(
    session: Session,
    rows: Sequence[Writing],
    choosing: Choosing,
    shown: Callable[[str], None] | None = None,
    read_last: bool = False,
) -> Iterator[int]:
    """Continue rows until each is done, and yield how many still go on before each token; the caller may stop.

    Args:
        session: has read the rows' tokens.
        rows: are extended; call `Row.finish` on them afterwards.
        choosing: of the next tokens.
        shown: is given the text of a lone row as it becomes certain.
        read_last: let the session read the last tokens too, so that it can go on.
    """
    device = session.model.head.weight.device
    counts = None
    if choosing.penalties.counts_tokens:
        lengths = [row.prompt for row in rows]
        counts = TokenCounts([row.ids for row in rows], lengths, session.model.head.weight.shape[0], device)
    while going := sum(not row.is_done for row in rows):
        yield going
        assert session.logits is not None
        tokens = choosing.chosen(session.logits, rows, counts)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if not row.is_done:
                row.ids.append(token)
                text = row.row.take(token)
                if shown is not None:
                    shown(text)
        if counts is not None:
            counts.add(tokens)
        if read_last or any(not row.is_done for row in rows):
            session.step(tokens)
