"""Exact sums over the steps of a generation, for counts that grow token by token or block by block up to a limit."""


def summed(length: int, steps: int, size: int = 1, most: int | None = None) -> int:
    """The sum of min(n // size, most) over the `steps` numbers n from `length` on; None for no limit."""
    return _before(length + steps, size, most) - _before(length, size, most)


def _before(end: int, size: int, most: int | None) -> int:
    """The sum over 0 <= n < end."""
    growing = end if most is None else min(end, (most + 1) * size)
    whole, rest = divmod(growing, size)
    return size * whole * (whole - 1) // 2 + rest * whole + (end - growing) * (most or 0)
