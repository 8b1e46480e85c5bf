"""Report what the kernels of a decoding step compile to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from longmix_kernels import aot
from longmix_kernels.attention import decode_launch
from longmix_kernels.attention.decode_launch import FEW_ROWS, WIDE_ROWS
from longmix_kernels.columns import Columns, cover

BITS = (8, 4, 2)
"""How many bits a code may have."""

FEATURES = ("plain", "ragged")
"""What a segment may have besides codes and an index."""

_RAGGED = ("decode", "decode_wide", "decode_codes", "decode_weights")
_NUMBERS = ("key_low", "key_step", "key_scale", "value_low", "value_step", "value_scale")


@dataclass(frozen=True)
class Build(aot.Build):
    """One kernel to compile.

    Attributes:
        dim, value_dim: the head dimensions of keys and of values.
        feature: "plain", or "ragged" where each row reads a run of its own.
        bits: bits of a code, where keys and values are codes; 0 elsewhere.
        config: the configuration; None for that of the launch table.
    """

    dim: int
    value_dim: int
    feature: str = "plain"
    bits: int = 0
    config: decode_launch.LaunchConfig | None = None

    FUNCTIONS: ClassVar = {
        **dict.fromkeys(
            ("decode", "decode_wide", "decode_index"), "longmix_kernels.attention.triton_decode_exact.decode_kernel"
        ),
        "decode_codes": "longmix_kernels.attention.triton_decode_codes.decode_codes_kernel",
        "decode_merge": "longmix_kernels.attention.triton_decode_merge.decode_merge_kernel",
        "decode_weights": "longmix_kernels.attention.triton_decode_weights.decode_weights_kernel",
    }
    TYPES: ClassVar = {
        **dict.fromkeys(("items_place", "programs_place", "parts_place", "slots", "places", "segments"), "i32"),
        **dict.fromkeys(("rows", "row_tiles", "height", "tile_keys", "key_repeats"), "i32"),
        **dict.fromkeys(("queries", "key_heads", "group"), "i32"),
        **dict.fromkeys(("scale", "scale_log2"), "fp32"),
        **dict.fromkeys(("count", "first", "index", "lists"), "*i32"),
        **dict.fromkeys(("partial", "partial_logsumexp", "logsumexp", "weights"), "*fp32"),
        **dict.fromkeys(_NUMBERS, "*fp16"),
    }

    def type_of(self, name: str) -> str:
        """Return Triton's name of the type of an argument that is no constant."""
        return "*u8" if self.bits and name in ("key", "value") else super().type_of(name)

    def launch_config(self) -> decode_launch.LaunchConfig:
        """Return the configuration to compile."""
        width, size = max(self.dim, self.value_dim), aot.DTYPES[self.dtype]
        return self.config or decode_launch.TABLE.entry(self.kernel, self.architecture, size, width)

    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments, of which a kernel takes those it has; None stands for an absent tensor."""
        absent = [] if self.kernel == "decode_index" else ["index"]
        absent += ["count", "first"] if self.feature == "plain" else []
        absent += [] if self.bits else _NUMBERS
        width = decode_launch.code_width(self.dim, self.dim)
        # As KIVI has it: 32 channels of a value share a step. Other numbers make tiles of more columns.
        value_width = decode_launch.code_width(self.value_dim, 32)
        return {
            "NEGATIVE_SCALE": False,
            "UPCAST": False,
            "DIM": Columns.of(self.dim),
            "VALUE_DIM": Columns.of(self.value_dim),
            "DIM_COVER": cover(self.dim),
            "VALUE_COVER": cover(self.value_dim),
            "KEY_BITS": self.bits,
            "VALUE_BITS": self.bits,
            "WIDTH": width,
            "COUNT": self.dim // width,
            "VALUE_WIDTH": value_width,
            "VALUE_COUNT": self.value_dim // value_width,
            "FULL": self.dtype == "fp32",
            "ROWS": WIDE_ROWS if self.kernel == "decode_wide" else FEW_ROWS,
            **self.launch_config().tiles(),
            **dict.fromkeys(absent),
        }

    def columns(self) -> dict[str, Any]:
        """Return the report's columns for it, with the work of one step of its inner loop."""
        keys, both = self.launch_config().keys, self.dim + self.value_dim
        rows = WIDE_ROWS if self.kernel == "decode_wide" else FEW_ROWS
        size = self.bits / 8 if self.bits else aot.DTYPES[self.dtype]
        if self.kernel == "decode_merge":
            flops, loaded, exponentials = 0, keys * self.value_dim * 4.0, keys
        elif self.kernel == "decode_weights":
            flops, loaded, exponentials = 2 * rows * keys * self.dim, keys * self.dim * size, rows * keys
        else:
            flops, loaded, exponentials = 2 * rows * keys * both, keys * both * size, rows * keys
        return {
            "dim": self.dim,
            "mode": "segment",
            "feature": f"{self.feature}, {self.bits} bits" if self.bits else self.feature,
            "tile_mflop": flops / 1e6,
            "tile_kib": loaded / 1024,
            "tile_kexp": exponentials / 1e3,
        }

    def wants_wgmma(self) -> bool:
        """Return whether its tiles are large enough for that instruction: those of 64 query rows are."""
        return self.kernel == "decode_wide"


def builds(
    architectures: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[str] = ("bf16",),
    features: Sequence[str] = FEATURES,
) -> list[Build]:
    """Return every kernel for every combination of the arguments.

    Args:
        architectures: compute capabilities, times ten.
        dims: head dimensions, of keys and of values alike. Codes are left out where these are no multiples of 32,
            or larger than the kernel covers.
        dtypes: element types of queries, of `aot.DTYPES`.
        features: of `FEATURES`.
    """
    return [
        Build(kernel, architecture, dtype, dim, dim, feature, bits)
        for architecture in architectures
        for dtype in dtypes
        for dim in dims
        for kernel in decode_launch.KERNELS
        for feature in FEATURES
        if feature in features and (feature == "plain" or kernel in _RAGGED)
        for bits in _bits_of(kernel)
        if not bits or (dim % 32 == 0 and dim <= decode_launch.CODES_MAX_DIM)
    ]


def _bits_of(kernel: str) -> tuple[int, ...]:
    """Return the bits of codes that a kernel is compiled for, 0 standing for none."""
    if kernel == "decode_codes":
        return BITS
    return (0, 4) if kernel == "decode_weights" else (0,)
