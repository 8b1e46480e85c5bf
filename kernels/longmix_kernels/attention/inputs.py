"""The arguments of one attention call, as its implementations and torch operators take them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from longmix_kernels import operators
from longmix_kernels.attention.pattern import BlockList, Pattern


@dataclass(frozen=True)
class Inputs(operators.Inputs):
    """The arguments of one call.

    Attributes:
        query: [B, Tq, Hq, D].
        key: [B, Tk, Hkv, D].
        value: [B, Tk, Hkv, Dv].
        pattern: which keys a row sees. For the Triton kernels, bounds that have a closed form may be None.
        scale: the factor on the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pattern: Pattern
    scale: float

    @classmethod
    def schema(cls) -> str:
        """Return the argument list of the torch operator, with the pattern taken apart."""
        return (
            "Tensor query, Tensor key, Tensor value, Tensor? lo, Tensor? hi, Tensor? query_rows, Tensor? key_rows, "
            "Tensor? alibi_slopes, Tensor? row_offsets, Tensor? row_blocks, Tensor? key_offsets, Tensor? key_blocks, "
            "int block_size, bool causal, int? window, float scale"
        )

    def flat(self) -> tuple[Any, ...]:
        """Return the values of the arguments that `schema` names, in its order."""
        pattern = self.pattern
        size, *lists = (0, None, None, None, None) if pattern.blocks is None else pattern.blocks
        orders = pattern.query_rows, pattern.key_rows, pattern.alibi_slopes
        rest = size, pattern.causal, pattern.window, self.scale
        return self.query, self.key, self.value, pattern.lo, pattern.hi, *orders, *lists, *rest

    @classmethod
    def of(cls, flat: Iterable[Any]) -> "Inputs":
        """Return the inputs of which `flat` returned these values."""
        query, key, value, lo, hi, query_rows, key_rows, slopes, *lists, size, causal, window, scale = flat
        blocks = BlockList(size, *lists) if size else None
        return cls(query, key, value, Pattern(lo, hi, query_rows, key_rows, slopes, blocks, causal, window), scale)
