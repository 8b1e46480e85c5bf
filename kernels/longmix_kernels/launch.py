"""How the kernels of every engine are launched: fixed configurations per architecture, and a call that hands them over.

Nothing here imports Triton. An engine's `launch` has its `TABLE`, the one place that says how its kernels are launched,
and its `Call`, which knows grids and compile-time arguments. Entries are fixed, so no length and no batch size ever
starts a search or a compile; `LaunchTable.override` replaces one for a benchmark or a test.
"""

import contextlib
import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch

from longmix_kernels.accelerators import TUNED
from longmix_kernels.runtime import UnsupportedDevice, on_gpu

Value = TypeVar("Value")
Config = TypeVar("Config", bound="LaunchConfig")

Key = tuple[str, int, int, int]
"""Kernel, architecture, bytes of an element, and the largest width that the entry is for."""

Rows = Sequence[Sequence[int]]
"""The arguments of a kernel's configurations, one for each width."""


class LaunchConfig:
    """One way to launch a kernel: engines add the sizes of its tiles.

    Attributes:
        warps: warps of a program.
        stages: steps that loads are ahead of their use.
    """

    warps: int
    stages: int

    def sizes(self) -> dict[str, int]:
        """Return the fields that are sizes of tiles, powers of two that may be halved down to 16."""
        raise NotImplementedError

    def smaller(self) -> Self | None:
        """Return the next configuration that takes less shared memory, or None if there is none.

        It has one stage less, as that keeps the tile; with a single stage, the longest side of the tile is halved.
        """
        if self.stages > 1:
            return replace(self, stages=self.stages - 1)  # type: ignore[type-var]
        name, size = max(self.sizes().items(), key=lambda item: item[1])
        return replace(self, **{name: size // 2}) if size > 16 else None  # type: ignore[type-var]

    def tiles(self) -> dict[str, int]:
        """Return the sizes of tiles as compile-time arguments, of which a kernel takes those it has."""
        raise NotImplementedError

    def used_by(self, kernel: str) -> Collection[str]:
        """Return the names of the attributes that make a difference to a kernel."""
        return vars(self).keys()

    def options(self) -> dict[str, int | bool]:
        """Return the compiler's options. Fused multiply-adds are asked for, since Triton 3.10 no longer uses them."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class LaunchTable(Generic[Config]):
    """The configurations of an engine's kernels.

    Args:
        config: their class.
        widths: what an entry is for, in the engine's measure: the largest head dimension, or the sum of both.
        tuned: for inputs of two bytes, by architecture and kernel, the arguments of `config` for each width.
        float32: for inputs of four bytes, by kernel, for every architecture and width. Their products run outside the
            tensor cores; they are for checks, and may spill.
        interpreted: by kernel, for tensors on the CPU in Triton's interpreter.
        measured: for inputs of two bytes, by kernel, architecture and width, rows that were found to be faster on a GPU
            than those of `tuned`; `python -m benchmarks.gpu --tune` proposes them.
    """

    watch: Callable[[str, int, Any], None] | None = None
    """Is told the kernel, the width and the configuration of each entry that is taken; see `watched`."""

    def __init__(
        self,
        config: type[Config],
        widths: Sequence[int],
        tuned: Mapping[int, Mapping[str, Rows]],
        float32: Mapping[str, Sequence[int]],
        interpreted: Mapping[str, Config],
        measured: Mapping[tuple[str, int, int], Sequence[int]],
    ) -> None:
        self.widths = tuple(widths)
        self.interpreted = interpreted
        self.overrides: dict[str, Config] = {}
        self.entries: dict[Key, Config] = {}
        for architecture, kernels in tuned.items():
            for kernel, rows in kernels.items():
                for width, row in zip(widths, rows, strict=True):
                    self.entries[kernel, architecture, 2, width] = config(*row)
                    self.entries[kernel, architecture, 4, width] = config(*float32[kernel])
        for (kernel, architecture, width), row in measured.items():
            self.entries[kernel, architecture, 2, width] = config(*row)

    def entry(self, kernel: str, architecture: int, size: int, width: int) -> Config:
        """Return the configuration of a kernel for elements of `size` bytes and up to this width."""
        covering = self.covering(width)
        config = self.entries[kernel, known_architecture(architecture), size, covering]
        if self.watch is not None:
            self.watch(kernel, covering, config)
        return config

    def covering(self, width: int) -> int:
        """Return the smallest of the table's widths that is enough."""
        return min(known for known in self.widths if known >= width)

    def override(self, kernel: str, config: Config) -> contextlib.AbstractContextManager[None]:
        """Launch a kernel with this configuration, whatever the architecture, while the context lasts."""
        return replaced(self.overrides, kernel, config)

    def watched(self, watch: Callable[[str, int, Any], None]) -> contextlib.AbstractContextManager[None]:
        """Tell `watch` the kernel, the width and the configuration of each entry taken while the context lasts."""
        return replaced(vars(self), "watch", watch)


class Call(ABC, Generic[Config]):
    """The tensors and numbers of one call, as an engine's kernels take them."""

    TABLE: ClassVar[LaunchTable]

    SPREAD: ClassVar[Mapping[str, tuple[str, int]]] = {}
    """By kernel, the size of a tile that is halved where there are few programs, and the least it may be."""

    query: torch.Tensor
    """Its device and dtype decide how kernels are launched."""

    @abstractmethod
    def entry(self, kernel: str, architecture: int, size: int) -> Config:
        """Return the table's configuration of a kernel for this call."""

    @abstractmethod
    def fitted(self, kernel: str, config: Config) -> Config:
        """Return the configuration with tiles no larger than this call has use for."""

    @abstractmethod
    def programs(self, kernel: str, config: Config) -> int:
        """Return how many programs a kernel takes."""

    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments besides tiles, of which a kernel takes those it has."""

    def config(self, kernel: str) -> Config:
        """Return the configuration with which to launch a kernel.

        Raises:
            UnsupportedDevice: the device has too little shared memory for the smallest tile.
        """
        if kernel in self.TABLE.overrides:
            return self.fitted(kernel, self.TABLE.overrides[kernel])
        if not on_gpu(self.query):
            return self.fitted(kernel, self.TABLE.interpreted[kernel])
        device = self.query.device
        config = self.fitted(kernel, self.entry(kernel, architecture_of(device), self.query.element_size()))
        config = self.spread(kernel, config, processors_of(device))
        while _too_large and self.code(kernel, config) in _too_large:
            smaller = config.smaller()
            if smaller is None:
                raise UnsupportedDevice(f"backend='triton': {_too_large[self.code(kernel, config)]}; {_ELSEWHERE}")
            config = smaller
        return config

    def spread(self, kernel: str, config: Config, processors: int) -> Config:
        """Return the configuration with a tile halved until every processor of the device has a program.

        A kernel that goes from chunk to chunk is as slow as one program, so with few rows and heads narrower programs
        end earlier. A tile takes few sizes, those from the table's down to `SPREAD`'s, so few batch sizes compile anew.
        """
        name, least = self.SPREAD.get(kernel, ("", 0))
        while name and getattr(config, name) > least and self.programs(kernel, config) < processors:
            config = replace(config, **{name: getattr(config, name) // 2})  # type: ignore[type-var]
        return config

    def code(self, kernel: str, config: Config) -> Hashable:
        """Return what decides how much of the device a kernel takes, but for tensors that are left out."""
        return self.query.device, type(self), kernel, self.query.dtype, config, tuple(self.constants().items())

    def launch(self, kernel: str, function: Any, *arguments: Any) -> None:
        """Launch a kernel on the device of the call.

        Args:
            kernel: its name in the launch table.
            function: the kernel, under `triton.jit`.
            arguments: those that are no compile-time constants, in order.

        Raises:
            TooLarge: the device has less shared memory than the tile takes; the next call takes a smaller one.
        """
        config = self.config(kernel)
        constants = {**self.constants(), **config.tiles(), "UPCAST": not on_gpu(self.query)}
        taken = {name: constant for name, constant in constants.items() if name in function.arg_names}
        try:
            with on_device(self.query):
                function[(self.programs(kernel, config),)](*arguments, **taken, **config.options())
        except Exception as error:
            if kernel in self.TABLE.overrides or not _is_out_of_resources(error):
                raise
            _too_large[self.code(kernel, config)] = reason = f"{function.__name__} takes {_resources(error)}"
            raise TooLarge(reason) from error


class TooLarge(Exception):
    """A tile takes more shared memory than the device has; if the call is repeated, it takes a smaller tile."""


_too_large: dict[Hashable, str] = {}
"""What was found to have no room on a device, by `Call.code`, and why."""

_ELSEWHERE = "backend='blocked' runs on this one"


def with_room(function: Callable[..., Value]) -> Callable[..., Value]:
    """Return a function that repeats a call with smaller tiles until all its kernels have room on the device.

    Tiles decide about grids and arguments, so the whole call is repeated. That happens once for each kernel, on devices
    with less shared memory than their launch table expects; a warning says so.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Value:
        while True:
            try:
                return function(*arguments)
            except TooLarge as error:
                warnings.warn(f"{error}: a smaller tile is taken, which may be slower", stacklevel=2)

    return call


def _is_out_of_resources(error: Exception) -> bool:
    """Say whether Triton found that a kernel takes more than the device has."""
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources)


def _resources(error: Any) -> str:
    """Say what a kernel takes and what there is, by Triton's error."""
    unit = "bytes of " if "memory" in error.name else ""
    return f"{error.required} {unit}{error.name}, and the GPU has {error.limit}"


def strides(*tensors: torch.Tensor | None) -> list[int]:
    """Return the strides of batch, row and head of tensors [B, T, H, ...], 0 for None.

    The stride of a single batch row is 0, since it is not used: what it is would be another kernel to Triton.
    """
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else (_batch_stride(x), *x.stride()[1:3]))]


def _batch_stride(x: torch.Tensor) -> int:
    return 0 if x.shape[0] == 1 else x.stride(0)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself if it begins at a multiple of 16 bytes, else a copy.

    Triton compiles a kernel anew for pointers that do not, and such a kernel loads less at once.
    """
    return x if x.data_ptr() % 16 == 0 else x.clone()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself if it is `aligned` and its last axis has unit stride, else a copy that is."""
    return aligned(x if x.stride(-1) == 1 else x.contiguous())


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return contiguous and `aligned` tensors, None for None."""
    return [None if x is None else aligned(x.contiguous()) for x in tensors]


def gate(x: torch.Tensor) -> torch.Tensor:
    """Return a gate [B, T, H, ...] whose batch rows begin at multiples of 16 numbers: itself or a copy.

    Without, every length whose rows begin elsewhere would be another kernel to Triton.
    """
    if _batch_stride(x) % 16 == 0:
        return aligned(x)
    length = x.shape[1]
    return torch.nn.functional.pad(x, (*(0, 0) * (x.dim() - 2), 0, -length % 16))[:, :length]


def vectors(like: torch.Tensor, count: int, *shape: int) -> list[torch.Tensor]:
    """Return memory for vectors of float32, on the device of a tensor.

    Each has its own, which begins where Triton takes it for `aligned`; a part of one for all could begin anywhere.
    """
    return [like.new_empty(shape, dtype=torch.float32) for _ in range(count)]


def given(like: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return tensors, with an empty one in place of None, as operators return them."""
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


def small_ids(document_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Return document ids [B, T] as contiguous int32; larger ones are counted anew, since only changes matter."""
    if document_ids is None or document_ids.dtype == torch.int32:
        return None if document_ids is None else aligned(document_ids.contiguous())
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.nn.functional.pad(changes.cumsum(1), (1, 0)).int()


def cover(size: int) -> int:
    """Return the smallest power of two, at least 16, that covers a head dimension."""
    return max(1 << (size - 1).bit_length(), 16)


def fit(block: int, dim: int) -> int:
    """Return a block of columns that wastes few of them: no larger than `dim` needs.

    It is halved, down to 32, as long as all blocks together then cover fewer columns.
    """
    block = min(block, cover(dim))
    while block > 32 and -(-dim // (block // 2)) * (block // 2) < -(-dim // block) * block:
        block //= 2
    return block


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


def known_architecture(architecture: int) -> int:
    """Return the architecture whose entries a GPU takes: the newest with entries that is not newer than this one.

    sm_120 and sm_121 have the matrix instructions and the shared memory of sm_86 and sm_89, so they take its entries;
    sm_87 has the shared memory of sm_80.

    Raises:
        UnsupportedDevice: all are newer.
    """
    if architecture < min(TUNED):
        raise UnsupportedDevice(
            f"backend='triton' got tensors on a GPU of architecture sm_{architecture}; allowed are sm_{min(TUNED)} and "
            f"newer; {_ELSEWHERE}"
        )
    if architecture >= 120:
        return 86
    return 80 if architecture == 87 else max(known for known in TUNED if known <= architecture)


def with_tiles_of(architecture: int) -> int:
    """Return the architecture whose narrower entries hold for one with entries: sm_86 takes those of sm_80."""
    return 80 if architecture == 86 else architecture


@functools.cache
def architecture_of(device: torch.device) -> int:
    """Return the compute capability of a CUDA device, times ten."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors_of(device: torch.device) -> int:
    """Return how many multiprocessors a CUDA device has, each of which runs a program."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the device of a tensor the current one; Triton launches on that."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


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
