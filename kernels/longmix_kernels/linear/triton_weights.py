"""What the linear-attention kernels do with gates: exact sums, and the weights between tokens.

Logarithms are in base 2. Sums of them are whole multiples of 2 ** -32 in int64, so that they are exact: a gate is held
to +-8192, and the 1024 of a chunk add up to less than 2 ** 23. As float32 a sum is a pair of whole number and rest in
[0, 1], whose differences are as exact as the rests.
"""

import triton
import triton.language as tl


@triton.jit
def to_base_2(gate):
    """Return a natural logarithm in base 2, held to +-8192: past that every weight is 0 or without meaning."""
    return tl.minimum(tl.maximum(gate * 1.4426950408889634, -8192.0), 8192.0)


@triton.jit
def to_fixed(x):
    """float32 to multiples of 2 ** -32."""
    return (x * 4294967296.0).to(tl.int64)


@triton.jit
def to_float(fixed):
    """Return multiples of 2 ** -32 as float32, rounded once."""
    return fixed.to(tl.float32) * 2.3283064365386963e-10


@triton.jit
def whole_and_rest(fixed):
    """Return multiples of 2 ** -32 as two float32: a whole number, exact below 2 ** 24, and a rest in [0, 1]."""
    whole = fixed >> 32
    return whole.to(tl.float32), to_float(fixed - (whole << 32))


@triton.jit
def pair_weights(row_whole, row_rest, column_whole, column_rest, visible):
    """Return the weights [rows, columns] from the vectors of both, already spread; 0 where not visible."""
    weights = tl.exp2((row_whole + column_whole) + (row_rest + column_rest))
    return tl.where(visible, weights, 0.0)
