"""The choice of the next token from its scores."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longmix.errors import ConfigError, NonFiniteError

GREEDY_BELOW = 1e-9
"""Below this temperature the most likely token has all of the probability, unless scores tie."""


@dataclass(frozen=True)
class Sampling:
    """Filters of a distribution, applied in this order before a token is drawn.

    Attributes:
        temperature: scores are divided by it; 0, and whatever is below `GREEDY_BELOW`, takes the most likely token.
        top_k: keep so many of the most likely tokens; None keeps all, as does a number above the vocabulary.
        top_p: keep the fewest most likely tokens that have this probability together (Holtzman et al. 2020, arXiv
            1904.09751).
        min_p: keep tokens of at least this share of the largest probability (Nguyen et al. 2024, arXiv 2407.01082).

    Raises:
        ConfigError: a number out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # not a number is refused too
            raise ConfigError(f"temperature={self.temperature} must be a number from 0; 0 takes the most likely token.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1, or null for all.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p} must be from 0 to 1.")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Float64 probabilities [..., V] of finite logits [..., V]; the temperature must be above 0."""
        logits = logits.double()
        scores = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # at most 0, so that nothing overflows
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            best = scores.topk(self.top_k, -1)
            scores = torch.full_like(scores, -torch.inf).scatter(-1, best.indices, best.values)
        if self.top_p < 1:
            ordered, indices = scores.sort(-1, descending=True)
            ordered = ordered.softmax(-1)
            enough = ordered.cumsum(-1) - ordered >= self.top_p
            scores = scores.masked_fill(torch.zeros_like(enough).scatter(-1, indices, enough), -torch.inf)
        probabilities = scores.softmax(-1)
        if self.min_p > 0:
            least = self.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

    def draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """A token for each row of finite logits [B, V], int64 [B]: the first whose cumulated probability is larger.

        Args:
            logits: scores, on any device.
            uniforms: a random number from 0 to 1 for each row, float64 [B] on the CPU; see `longmix.generation.draws`.
        """
        if self.temperature < GREEDY_BELOW:
            return logits.argmax(-1)
        cumulated = self.probabilities(logits).cpu().cumsum(-1)  # the CPU adds in the same order whatever the batch
        wanted = uniforms[:, None] * cumulated[:, -1:]  # below the sum even where that is not quite 1
        return torch.searchsorted(cumulated, wanted, right=True)[:, 0].to(logits.device)


def check_finite(logits: Tensor) -> None:
    """Refuse scores [B, V] of the next token that are no numbers.

    Raises:
        NonFiniteError: a score is infinite or not a number.
    """
    finite = logits.isfinite().all(-1)
    if not finite.all():
        raise NonFiniteError(
            f"the scores of the next token are infinite or not a number in {int((~finite).sum())} of {len(logits)} "
            "rows: the checkpoint's weights hold such numbers, or bf16 is too short for them. Use another "
            "checkpoint, or precision=float32."
        )
