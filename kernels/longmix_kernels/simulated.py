"""A GPU that is not there: calls choose tiles and specialise kernels for it, and run nothing.

`simulated_gpu` does so for calls on CPU tensors, and with `FakeCalls` for those on fake tensors. What kernels would
write holds whatever memory held before, so only launches and shapes tell anything.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from longmix_kernels import launch
from longmix_kernels.accelerators import SHARED_MEMORY
from longmix_kernels.aot import lowered
from longmix_kernels.runtime import assumed_device

Launched = dict[str, Any]


@dataclass
class SimulatedGPU:
    """What was launched.

    Attributes:
        architecture: compute capability, times ten.
        limit: bytes of shared memory of a program.
        takes: says how many bytes a launch takes, for want of which nothing is compiled; None compiles and looks.
        variants: by kernel, what Triton would compile once each.
        launches: by kernel, numbers among the arguments, options and grid of each launch, in order.
        shared: by kernel, bytes of shared memory of each launch.
        known: the same, by variant.
    """

    architecture: int
    limit: int
    takes: Callable[[Launched], int] | None
    variants: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    launches: dict[str, list[Launched]] = field(default_factory=lambda: defaultdict(list))
    shared: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    known: dict[str, int] = field(default_factory=dict)

    def run(self, function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Do what `JITFunction.run` does before it launches."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend
        from triton.runtime.errors import OutOfResources
        from triton.runtime.jit import create_function_from_signature

        name, target = function.__name__, GPUTarget("cuda", self.architecture, 32)
        backend = make_backend(target)
        bind = create_function_from_signature(function.signature, function.params, backend)
        bound, specialization, _ = bind(*arguments, **options)
        numbers = {key: x for key, x in bound.items() if x is None or isinstance(x, int | float)}
        launched = {**numbers, **options, "grid": grid[0]}
        constants = [(key, x) for key, x in options.items() if key in bound or key.startswith("num_")]
        key = str((function.__module__, name, specialization, constants))
        if key not in self.known:
            packed = function._pack_args(backend, options, bound, specialization, {})
            self.known[key] = _shared_memory(function, target, *packed) if self.takes is None else self.takes(launched)
        if self.known[key] > self.limit:
            raise OutOfResources(self.known[key], self.limit, "shared memory")
        self.shared[name].append(self.known[key])
        self.variants[name].add(key)
        self.launches[name].append(launched)

    def num_launches(self) -> int:
        """Return how many kernels were launched."""
        return sum(map(len, self.launches.values()))

    def num_variants(self) -> int:
        """Return how many kernels Triton would compile."""
        return sum(map(len, self.variants.values()))


def _shared_memory(function: Any, target: Any, options: Any, signature: Any, constants: Any, attributes: Any) -> int:
    from triton.compiler import ASTSource

    source = ASTSource(function, signature, constants, attributes)
    return lowered(source, target, vars(options), "llir")[1]["shared"]


@contextlib.contextmanager
def _standing_in(holder: Any, **members: Any) -> Iterator[None]:
    """Let other members of a module or class stand in for its own while the context lasts."""
    own = {name: vars(holder)[name] for name in members}
    try:
        for name, member in members.items():
            setattr(holder, name, member)
        yield
    finally:
        for name, member in own.items():
            setattr(holder, name, member)


@contextlib.contextmanager
def simulated_gpu(
    architecture: int,
    limit: int | None = None,
    takes: Callable[[Launched], int] | None = lambda launched: 0,
    processors: int = 1,
) -> Iterator[SimulatedGPU]:
    """Let tensors on the CPU count as being on a GPU of this architecture and size while the context lasts."""
    from triton.runtime.jit import JITFunction

    gpu = SimulatedGPU(architecture, SHARED_MEMORY[architecture] if limit is None else limit, takes)
    with (
        assumed_device("cuda"),
        _standing_in(launch, architecture_of=lambda _: architecture, processors_of=lambda _: processors, _too_large={}),
        _standing_in(JITFunction, run=lambda *arguments, **options: gpu.run(*arguments, **options)),
    ):
        yield gpu


class FakeCalls(TorchDispatchMode):
    """Lets engines that get fake tensors launch as they would, on zeros in the places of those tensors.

    Enter it within `simulated_gpu`, after the `FakeTensorMode`. What is returned are fake tensors all the same.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call, and for an operator of ours launch as well."""
        library, _, name = function._schema.name.partition("::")
        launches = library == "longmix" and "_blocked" not in name
        if launches and any(isinstance(x, FakeTensor) for x in tree_leaves(args)):
            with unset_fake_temporarily():
                function(*tree_map_only(FakeTensor, _zeros, args), **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _zeros(fake: torch.Tensor) -> torch.Tensor:
    """Zeros with the strides of a fake tensor, and as far from the beginning of their memory."""
    last = sum((size - 1) * stride for size, stride in zip(fake.shape, fake.stride(), strict=True))
    reach = fake.storage_offset() + (last + 1 if fake.numel() else 0)
    return torch.zeros(reach, dtype=fake.dtype).as_strided(fake.shape, fake.stride(), fake.storage_offset())
