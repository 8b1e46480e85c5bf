"""Cover the columns of a head dimension with powers of two, which is what Triton's tiles have."""

from typing import NamedTuple


class Columns(NamedTuple):
    """A head dimension as a compile-time argument: its size, and two powers of two that cover it; `split_dim`."""

    SIZE: int
    MAIN: int
    REST: int

    @classmethod
    def of(cls, dim: int) -> "Columns":
        """Return the columns of a head dimension."""
        return cls(dim, *split_dim(dim))


def cover(size: int) -> int:
    """Return the smallest power of two, at least 16, that is no smaller than a head dimension."""
    return max(1 << (size - 1).bit_length(), 16)


def fit(block: int, dim: int) -> int:
    """Return a block of at most `block` columns that wastes few of them on a head dimension.

    The block, a power of two, is no larger than `dim` needs. It is halved, down to 32, as long as all blocks together
    then cover fewer columns.
    """
    block = min(block, cover(dim))
    while block > 32 and -(-dim // (block // 2)) * (block // 2) < -(-dim // block) * block:
        block //= 2
    return block


def split_dim(dim: int) -> tuple[int, int]:
    """Return two powers of two, at least 16, that together cover a head dimension; the second is 0 if one is enough.

    48, 80, 96, 144, 160 and 192 waste nothing (32 + 16, 64 + 16, 64 + 32, 128 + 16, 128 + 32, 128 + 64), where one
    power of two would waste up to 60 %; 112, 176 and 240 waste 16 columns, 224 wastes 32 and 208 wastes 48.
    """
    main = max(1 << (dim.bit_length() - 1), 16)
    rest = max(1 << (dim - main - 1).bit_length(), 16) if dim > main else 0
    # Two equal parts would only be a slower way to take the next power of two.
    return (2 * main, 0) if rest == main else (main, rest)


def is_padded(dim: int) -> bool:
    """Say whether columns past a head dimension have to be masked."""
    return sum(split_dim(dim)) > dim


def dim_constants(dim: int, value_dim: int) -> dict[str, int]:
    """Return the compile-time arguments that say how `split_dim` splits both head dimensions."""
    main, rest = split_dim(dim)
    value_main, value_rest = split_dim(value_dim)
    return {
        "DIM": dim,
        "DIM_MAIN": main,
        "DIM_REST": rest,
        "VALUE_DIM": value_dim,
        "VALUE_MAIN": value_main,
        "VALUE_REST": value_rest,
    }
