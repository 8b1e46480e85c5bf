"""What launching Triton kernels takes in every engine: devices, tiles of a head dimension, configurations replaced."""

import contextlib
import functools
from collections.abc import Iterator
from typing import TypeVar

import torch

Value = TypeVar("Value")


@contextlib.contextmanager
def replaced(table: dict[str, Value], key: str, value: Value) -> Iterator[None]:
    """Put a value into a table while the context lasts."""
    before = table.get(key)
    table[key] = value
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before


@functools.cache
def architecture_of(device: torch.device) -> int:
    """Return the compute capability of a CUDA device, times ten."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def split_dim(dim: int) -> tuple[int, int]:
    """Return the powers of two, at least 16, that cover a head dimension; the second is 0 if the first is enough.

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
    """Return the compile-time arguments that say how both head dimensions are split."""
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


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the device of a tensor the current one; Triton launches on that."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself if its last axis has unit stride, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
