"""The small change of the attention scores that raises the loss most (AT; Kitada and Iyatomi 2020, arXiv 2009.12064).

    s_ij = q_i . k_j / sqrt(d) + r_j            in the chosen layers, for each key head
    g = dL/dr at r = 0
    r = xi g / |g|                              the norm over the keys of a document, for each row, layer and head

A key's bias is seen by the later tokens of its document alone, so that the model stays causal; the gradient of it knows
their targets, which is what makes it adversarial.

What differs from the paper, whose model attends once over a sentence and classifies it: a bias is the same for all
queries that see the key. Its "interpretable" form (iAT) is out: as its authors' program computes it, the direction is
the gradient with the opposite sign, which lowers the loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from longmix.errors import ConfigError
from longmix.mixers.parts.key_bias import key_biases
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.model.backbone import LanguageModel


class Adversary:
    """Biases of the keys in some layers of a model: zeros that gather gradients, then the worst ones.

    Args:
        mixers: those whose scores change.
        xi: length of the change of a head's scores in a document, above 0.
    """

    def __init__(self, mixers: Sequence[SoftmaxAttention], xi: float) -> None:
        self.mixers, self.xi = mixers, xi

    @contextmanager
    def watching(self, tokens: Tensor) -> Iterator[list[Tensor]]:
        """Let the mixers add zeros [B, T, Hkv] to their scores over tokens [B, T]; yields them for their gradients."""
        weight = self.mixers[0].value.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        zeros = [
            torch.zeros(*tokens.shape, mixer.num_kv_heads, dtype=exact, device=tokens.device, requires_grad=True)
            for mixer in self.mixers
        ]
        with key_biases(self.mixers, zeros):
            yield zeros

    @contextmanager
    def attacking(self, gradients: Sequence[Tensor], document_ids: Tensor | None) -> Iterator[None]:
        """Let the mixers add the biases of length xi that raise the loss most, to first order.

        Args:
            gradients: [B, T, Hkv] of each mixer, of the loss for the zeros of `watching`.
            document_ids: int [B, T], non-decreasing along T; None while every row is one document.
        """
        with key_biases(self.mixers, [self.xi * unit(gradient, document_ids) for gradient in gradients]):
            yield


def unit(x: Tensor, document_ids: Tensor | None) -> Tensor:
    """x [B, T, H] without gradient, scaled to norm 1 over the tokens of each document; what is all zero stays.

    Args:
        x: any.
        document_ids: int [B, T], non-decreasing along T; None while every row is one document.
    """
    exact = x.detach().double()
    norm = _document_norm(exact, document_ids)
    return torch.where(norm > 0, exact / norm, 0.0).to(x.dtype)


def _document_norm(x: Tensor, document_ids: Tensor | None) -> Tensor:
    """The norm of each document's x, at each of its tokens, [B, T or 1, H]."""
    if document_ids is None:
        return x.norm(dim=1, keepdim=True)
    first = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    _, lengths = first.flatten().cumsum(0).unique_consecutive(return_counts=True)
    # one segment after another, and never atomically: the same sums in every run
    sums = torch.segment_reduce(x.square().flatten(0, 1), "sum", lengths=lengths)
    return sums.sqrt().repeat_interleave(lengths, 0).view_as(x)


def attacked_mixers(model: LanguageModel, layers: Sequence[int] | None, word: str) -> list[SoftmaxAttention]:
    """The mixers of some layers, whose scores an adversary can change.

    Args:
        model: it may be without memory.
        layers: their numbers, from 0; None takes all that can.
        word: what the user calls `layers`.

    Raises:
        ConfigError: a layer is not there, is named twice, or has no scores to change; or none has.
    """
    mixers = model.mixers()
    if layers is None:
        found = [mixer for mixer in mixers if isinstance(mixer, SoftmaxAttention) and mixer.takes_key_bias]
        if not found:
            names = ", ".join(dict.fromkeys(type(mixer).__name__ for mixer in mixers))
            raise ConfigError(
                f"{word}: no layer has attention scores of pairs of tokens that could change ({names}); take a softmax "
                "mixer, such as mixer=flash, or leave this out."
            )
        return found
    if not layers or len(set(layers)) < len(layers):
        raise ConfigError(f"{word}={list(layers)} must name at least one layer, and none twice.")
    chosen = []
    for number in layers:
        if not 0 <= number < len(mixers):
            raise ConfigError(f"{word}={list(layers)}: there is no layer {number}; layers are 0 to {len(mixers) - 1}.")
        mixer = mixers[number]
        if not isinstance(mixer, SoftmaxAttention) or not mixer.takes_key_bias:
            raise ConfigError(
                f"{word}={list(layers)}: layer {number}, {type(mixer).__name__}, has no attention scores of pairs of "
                "tokens that could change by a bias alone; leave it out."
            )
        chosen.append(mixer)
    return chosen
