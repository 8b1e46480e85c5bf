"""Loads that the scatter kernels share: the table of blocks, and sums over rows as averages with a logarithm.

Sums over rows r_j with weights w_ja are stored divided by exp(scale_a), the largest weight that entered, so that their
total weight is at least 1 if there is any row. Kernels load them as exp(log_a) u_a with the average
u_a = sum_j w_ja r_j / sum_j w_ja. An average is no larger than a row, so in half precision it does not overflow,
however many rows there are.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from longmix_kernels.scatter.launch import Sums
from longmix_kernels.tiles import load_block, load_block_transposed

LOWEST = tl.constexpr(-4e37)
"""The number that stands for the logarithm of 0. It is finite, and so are sums of a few of it, so that their
differences are not NaN.
"""


class Sizes(NamedTuple):
    """Compile-time numbers of a kernel: features and columns of values, and how many of them a step takes."""

    FEATURES: tl.constexpr
    VALUE_DIM: tl.constexpr
    FEATURE_BLOCK: tl.constexpr
    VALUE_BLOCK: tl.constexpr


@triton.jit
def load_slot(blocks, slot):
    """Return a slot's entry in the table of `bounds.read_blocks`.

    These are the first query row, one past the last, the first key row, and how the sums begin.
    """
    place = blocks + slot * 4
    return tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)


@triton.jit
def sums_at(sums, place, FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Return pointers to the sums of the slot at this place among all slots of all heads."""
    deltas = sums.scales  # not used without deltas: Triton 3.6 has no None in what a function returns
    if sums.deltas is not None:
        deltas = sums.deltas + place * FEATURES
    scales, weights = sums.scales + place * FEATURES, sums.weights + place * FEATURES
    return Sums(scales, weights, deltas, sums.sums + place * (FEATURES * VALUE_DIM))


@triton.jit
def load_logs(sums, feature, SIZES: tl.constexpr):
    """Return the logarithms of total weights, [FEATURE_BLOCK], and one over the weights as they are stored.

    They are `LOWEST` and 0 where there is no weight.
    """
    features = feature + tl.arange(0, SIZES.FEATURE_BLOCK)
    there = features < SIZES.FEATURES
    scale = tl.load(sums.scales + features, mask=there, other=0.0)
    weight = tl.load(sums.weights + features, mask=there, other=0.0)
    some = weight > 0.0
    weight = tl.where(some, weight, 1.0)
    return tl.where(some, scale + tl.log(weight), LOWEST), tl.where(some, 1.0 / weight, 0.0)


@triton.jit
def load_averages(sums, inverse, row, column, dtype: tl.constexpr, SIZES: tl.constexpr):
    """Return averages [FEATURE_BLOCK, VALUE_BLOCK] from feature `row` and column `column` on."""
    block = load_block(sums.sums, row, SIZES.FEATURE_BLOCK, SIZES.FEATURES, column, SIZES.VALUE_BLOCK, SIZES.VALUE_DIM)
    return (block * inverse[:, None]).to(dtype)


@triton.jit
def load_averages_transposed(sums, inverse, row, column, dtype: tl.constexpr, SIZES: tl.constexpr):
    """Return the same averages as [VALUE_BLOCK, FEATURE_BLOCK]."""
    block = load_block_transposed(
        sums.sums, row, SIZES.FEATURE_BLOCK, SIZES.FEATURES, column, SIZES.VALUE_BLOCK, SIZES.VALUE_DIM
    )
    return (block * inverse[None, :]).to(dtype)
