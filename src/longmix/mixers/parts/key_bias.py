"""A bias of each key, the same for all queries that see it, which a caller gives for a while.

    s_ij = q_i . k_j / sqrt(d) + r_j

It is one more column of queries and keys (`bias_columns`), so that what computes the scores also gives its gradient. No
weight makes it: it is how training asks what a change of the scores would do (`longmix.model.adversarial`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from longmix.mixers.parts.attention_state import Rows
from longmix_kernels.attention import bias_columns


class TakesKeyBias(Protocol):
    """A mixer that adds `key_bias` to its scores."""

    key_bias: Tensor | None


def with_key_bias(rows: Rows, bias: Tensor) -> Rows:
    """The rows with a bias [B, Tk, Hkv] on their keys, best in float32."""
    one = bias.new_ones(1, rows.query.shape[1], 1, 1)
    query, key, scale = bias_columns(rows.query, rows.key, one, bias.unsqueeze(-1), scale=rows.scale, balanced=False)
    return replace(rows, query=query, key=key, scale=scale)


@contextmanager
def key_biases(mixers: Sequence[TakesKeyBias], biases: Sequence[Tensor]) -> Iterator[None]:
    """Give each mixer its bias [B, T, Hkv].

    It has to last until the backward pass is over, which may compute a layer again.
    """
    for mixer, bias in zip(mixers, biases, strict=True):
        mixer.key_bias = bias
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.key_bias = None
