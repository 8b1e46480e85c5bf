"""Launch the kernels of every engine: with a fixed configuration per architecture, and with the arguments of a call.

An engine's `launch` has its `TABLE`, the one place that says how its kernels are launched, and its `Call`, which knows
grids and compile-time arguments. Entries are fixed, so no length and no batch size ever starts a search or a compile;
`LaunchTable.override` replaces an entry for a benchmark or a test. Nothing here imports Triton.
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
"""What an entry is for: kernel, architecture, bytes of an element, and the largest width."""

Rows = Sequence[Sequence[int]]
"""The arguments of a kernel's configurations, one row for each width."""


class LaunchConfig:
    """One way to launch a kernel; each engine adds the sizes of its tiles.

    Attributes:
        warps: how many warps a program has.
        stages: how many steps loads are ahead of their use.
    """

    warps: int
    stages: int

    def sizes(self) -> dict[str, int]:
        """Return the fields that are sizes of tiles, by name: powers of two that may be halved down to 16."""
        raise NotImplementedError

    def smaller(self) -> Self | None:
        """Return the next configuration that takes less shared memory, or None if there is none.

        A stage less comes first, since it keeps the tile. With a single stage, the longest side of the tile is halved.
        """
        if self.stages > 1:
            return replace(self, stages=self.stages - 1)  # type: ignore[type-var]
        name, size = max(self.sizes().items(), key=lambda item: item[1])
        return replace(self, **{name: size // 2}) if size > 16 else None  # type: ignore[type-var]

    def tiles(self) -> dict[str, int]:
        """Return the sizes of tiles as compile-time arguments, of which a kernel takes those it has."""
        raise NotImplementedError

    def used_by(self, kernel: str) -> Collection[str]:
        """Return the names of the attributes that change a kernel's code."""
        return vars(self).keys()

    def options(self) -> dict[str, int | bool]:
        """Return the compiler's options. They ask for fused multiply-adds, which Triton 3.10 no longer uses unasked."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class LaunchTable(Generic[Config]):
    """The configurations of an engine's kernels.

    Args:
        config: the class of the configurations.
        widths: the largest widths that entries are for, ascending. The engine says what a call's width is: the largest
            head dimension, or the sum of both.
        tuned: by architecture and kernel, the arguments of `config` for each width, for inputs of two bytes.
        float32: by kernel, the arguments for inputs of four bytes, for every architecture and width. Products of such
            inputs run outside the tensor cores; they are for checks, and may spill.
        interpreted: by kernel, the configuration for tensors on the CPU in Triton's interpreter.
        measured: by kernel, architecture and width, the arguments that were faster on a GPU than those of `tuned`, for
            inputs of two bytes; `python -m benchmarks.gpu --tune` proposes them.
    """

    watch: Callable[[str, int, Any], None] | None = None
    """A function that gets the kernel, the width and the configuration of each entry taken; `watched` sets it."""

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
        """Return the configuration of a kernel for one architecture and kind of call.

        Args:
            kernel: the kernel's name.
            architecture: the compute capability, times ten.
            size: bytes of an element.
            width: the call's width, in the engine's measure.

        Raises:
            UnsupportedDevice: the table has no entries for so old an architecture.
        """
        covering = self.covering(width)
        config = self.entries[kernel, known_architecture(architecture), size, covering]
        if self.watch is not None:
            self.watch(kernel, covering, config)
        return config

    def covering(self, width: int) -> int:
        """Return the smallest of the table's widths that is at least this one."""
        return min(known for known in self.widths if known >= width)

    def override(self, kernel: str, config: Config) -> contextlib.AbstractContextManager[None]:
        """Launch a kernel with this configuration, whatever the architecture, while the context lasts."""
        return replaced(self.overrides, kernel, config)

    def watched(self, watch: Callable[[str, int, Any], None]) -> contextlib.AbstractContextManager[None]:
        """Tell `watch` the kernel, the width and the configuration of each entry taken while the context lasts."""
        return replaced(vars(self), "watch", watch)


class Call(ABC, Generic[Config]):
    """The tensors and numbers of one call, as an engine's kernels take them.

    In its methods, `kernel` is a kernel's name in the launch table, `config` its configuration, `architecture` a
    compute capability times ten, and `size` the bytes of an element.
    """

    TABLE: ClassVar[LaunchTable]

    SPREAD: ClassVar[Mapping[str, tuple[str, int]]] = {}
    """By kernel, the name of the tile's size that `spread` halves where there are few programs, and its least value."""

    query: torch.Tensor
    """The tensor whose device and dtype decide how kernels are launched."""

    @abstractmethod
    def entry(self, kernel: str, architecture: int, size: int) -> Config:
        """Return the table's configuration of a kernel for this call."""

    @abstractmethod
    def fitted(self, kernel: str, config: Config) -> Config:
        """Return the configuration with tiles no larger than this call has use for."""

    @abstractmethod
    def programs(self, kernel: str, config: Config) -> int:
        """Return how many programs a kernel is launched with."""

    @abstractmethod
    def constants(self) -> dict[str, Any]:
        """Return the compile-time arguments besides tiles, by name; a kernel takes those it has."""

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

        A kernel that goes from chunk to chunk takes as long as one program, so with few rows and heads narrower
        programs end earlier. The size can only be the table's or its halves down to that of `SPREAD`, so few batch
        sizes start a compile.

        Args:
            kernel: the kernel's name.
            config: the configuration, fitted to the call.
            processors: how many multiprocessors the device has.
        """
        name, least = self.SPREAD.get(kernel, ("", 0))
        while name and getattr(config, name) > least and self.programs(kernel, config) < processors:
            config = replace(config, **{name: getattr(config, name) // 2})  # type: ignore[type-var]
        return config

    def code(self, kernel: str, config: Config) -> Hashable:
        """Return what decides how much of the device a kernel takes, except which optional tensors are absent."""
        return self.query.device, type(self), kernel, self.query.dtype, config, tuple(self.constants().items())

    def launch(self, kernel: str, function: Any, *arguments: Any) -> None:
        """Launch a kernel on the device of the call.

        Args:
            kernel: its name in the launch table.
            function: the kernel, under `triton.jit`.
            arguments: the arguments that are no compile-time constants, in order.

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


class KernelWarning(UserWarning):
    """A kernel runs otherwise than its table says.

    Attributes:
        one_line: file and line of the source say nothing to whoever reads it, so that longmix shows none.
    """

    one_line = True


class TooLarge(Exception):
    """A tile takes more shared memory than the device has; if the call is repeated, it takes a smaller tile."""


_too_large: dict[Hashable, str] = {}
"""The kernels that had no room on a device, by `Call.code`, and why."""

_ELSEWHERE = "backend='blocked' runs on this one"


def with_room(function: Callable[..., Value]) -> Callable[..., Value]:
    """Return a function that repeats a call with smaller tiles until all its kernels have room on the device.

    Tiles decide about grids and arguments, so the whole call is repeated. That happens once for each kernel, on devices
    with less shared memory than the launch table expects. A warning says so.

    Args:
        function: the call; it raises `TooLarge` where a kernel has no room, and then takes a smaller tile.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> Value:
        while True:
            try:
                return function(*arguments)
            except TooLarge as error:
                warnings.warn(f"{error}: a smaller tile is taken, which may be slower", KernelWarning, stacklevel=2)

    return call


def _is_out_of_resources(error: Exception) -> bool:
    """Say whether an error of Triton means that a kernel takes more than the device has."""
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources)


def _resources(error: Any) -> str:
    """Return in words what a kernel takes and what the GPU has, from Triton's error."""
    unit = "bytes of " if "memory" in error.name else ""
    return f"{error.required} {unit}{error.name}, and the GPU has {error.limit}"


def known_architecture(architecture: int) -> int:
    """Return the architecture whose entries a GPU takes: the newest with entries that is not newer than this one.

    sm_120 and sm_121 have the matrix instructions and the shared memory of sm_86 and sm_89, so they take its entries;
    sm_87 has the shared memory of sm_80.

    Args:
        architecture: the GPU's compute capability, times ten.

    Raises:
        UnsupportedDevice: all entries are for newer architectures.
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
    """Return the architecture whose narrower entries an architecture of the table takes: for sm_86 those of sm_80."""
    return 80 if architecture == 86 else architecture


@functools.cache
def architecture_of(device: torch.device) -> int:
    """Return the compute capability of a CUDA device, times ten."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors_of(device: torch.device) -> int:
    """Return how many multiprocessors a CUDA device has; each runs one program at least."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which the tensor's device is the current one, since Triton launches on that."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def replaced(table: dict[str, Value], key: str, value: Value) -> Iterator[None]:
    """Put a value into a table while the context lasts, and the former value back afterwards."""
    before = table.get(key)
    table[key] = value
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before
