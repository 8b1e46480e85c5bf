"""Run Muon (Jordan et al. 2024) on many matrices at once, whole or divided over processes."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from longmix.distributed.divided_matrices import DividedMatrices, copy_each

STACK_NUMBERS = 2**26
"""The most numbers that matrices iterated together have: 128 MiB in bfloat16. An iteration holds a few such stacks."""

Member = tuple[nn.Parameter, dict[str, Any]]
"""A matrix and its parameter group."""


class BatchedMuon(torch.optim.Muon):
    """torch's Muon in few launches: it iterates matrices of one shape together.

    On a GPU the iteration is in bfloat16, as in torch. On a CPU it is in the dtype of the weights, since bfloat16 there
    is emulated, and hundreds of times slower. Where the rows of matrices are divided over processes (FSDP), each
    process takes some whole matrices, by two exchanges a step. Weights get the update of Liu et al. 2025 (arXiv
    2502.16982, equation 4), so `adjust_lr_fn` has to say that too.

    Attributes:
        iterated_in: the dtype of the iteration on every device; None for the choice above.
    """

    iterated_in: torch.dtype | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; state and parameter groups are those of `torch.optim.Muon`.

        With divided matrices all processes must call it, and the same matrices must have gradients.

        Args:
            closure: computes gradients and returns the loss; None if the gradients are there.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a matrix is divided otherwise than by rows.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[tuple[Any, ...], list[Member]] = defaultdict(list)
        for group in self.param_groups:
            settings = tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"]
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[settings, _mesh(weight), self._dtype(weight)].append((weight, group))
        for (settings, mesh, dtype), members in alike.items():
            coefficients, steps, eps = settings
            function = functools.partial(orthogonalised, coefficients=coefficients, steps=steps, eps=eps)
            if mesh is None:
                self._step_whole(members, function, dtype)
            else:
                self._step_divided(members, function, dtype, mesh)
        return loss

    def _dtype(self, weight: Tensor) -> torch.dtype:
        return self.iterated_in or (torch.bfloat16 if weight.device.type == "cuda" else weight.dtype)

    def _step_whole(self, members: list[Member], function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        by_shape: dict[torch.Size, list[Member]] = defaultdict(list)
        for weight, group in members:
            by_shape[weight.shape].append((weight, group))
        for shape, alike in by_shape.items():
            for part in _parts(alike):
                stack = _local(part[0][0]).new_empty(len(part), *shape, dtype=dtype)
                self._write_updates(part, stack.unbind())
                # foreach is fast only for equal dtypes and strides, and the result of a tall matrix is a transpose.
                exact = function(stack).to(part[0][0].dtype, memory_format=torch.contiguous_format)
                _move(part, exact.unbind())

    def _step_divided(
        self, members: list[Member], function: Callable[[Tensor], Tensor], dtype: torch.dtype, mesh: DeviceMesh
    ) -> None:
        shapes = [(weight.shape[0], weight.shape[1]) for weight, _ in members]
        divided = DividedMatrices(shapes, mesh.get_group(), _local(members[0][0]).new_empty(0, dtype=dtype))
        rows = iter(divided.rows)
        for part in _parts(members):
            self._write_updates(part, [next(rows) for _ in part])
        divided.apply(functools.partial(_in_parts, function))
        rows = iter(divided.rows)
        for part in _parts(members):
            directions = [next(rows) for _ in part]
            if dtype != part[0][0].dtype:
                exact = [torch.empty_like(_local(weight)) for weight, _ in part]
                copy_each(exact, directions)
                directions = exact
            _move(part, directions)

    def _write_updates(self, members: list[Member], places: Sequence[Tensor]) -> None:
        """Add the gradients to the momentum, and write what is to be iterated; for divided matrices, their own rows."""
        for weight, _ in members:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        for group, indices in _by(members, lambda weight, group: id(group)):
            weights = [members[index][0] for index in indices]
            gradients = [_local(weight.grad) for weight in weights if weight.grad is not None]
            averages = [_local(self.state[weight]["momentum_buffer"]) for weight in weights]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
            copy_each([places[index] for index in indices], updates)


def _move(members: list[Member], directions: Sequence[Tensor]) -> None:
    """Decay weights, and move them against their directions; for divided matrices, their own rows."""
    for group, indices in _by(members, lambda weight, group: (id(group), max(weight.shape))):
        weights = [_local(members[index][0]) for index in indices]
        rate = group["lr"] * 0.2 * math.sqrt(max(members[indices[0]][0].shape))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(weights, [directions[index] for index in indices], alpha=rate)


def _by(members: list[Member], key: Callable[..., Any]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yield for members with equal keys their parameter group and their places."""
    found: dict[Any, list[int]] = defaultdict(list)
    for index, member in enumerate(members):
        found[key(*member)].append(index)
    for indices in found.values():
        yield members[indices[0]][1], indices


def _parts(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Yield members in order, in the parts that this process iterates or updates at once."""
    part: list[Member] = []
    numbers = 0
    for weight, group in members:
        numbers += _local(weight).numel()
        if part and numbers > STACK_NUMBERS:
            yield part
            part, numbers = [], _local(weight).numel()
        part.append((weight, group))
    yield part


def _in_parts(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """Return the function of a stack, applied to at most `STACK_NUMBERS` numbers, or one matrix, at once."""
    parts = stack.split(max(1, STACK_NUMBERS // stack[0].numel()))
    return function(stack) if len(parts) == 1 else torch.cat([function(part) for part in parts])


def _mesh(weight: Tensor) -> DeviceMesh | None:
    """Return the processes over which the rows of a matrix are divided; None if each process has the whole matrix.

    Raises:
        ValueError: the matrix is divided otherwise.
    """
    if not isinstance(weight, DTensor) or weight.device_mesh.size() == 1 or weight.placements == (Replicate(),):
        return None
    if weight.placements != (Shard(0),):
        raise ValueError(f"a matrix is placed as {weight.placements}; allowed is (Shard(dim=0),), as FSDP does it")
    return weight.device_mesh


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return roughly the nearest semi-orthogonal matrices, by a quintic Newton-Schulz iteration (Jordan et al. 2024).

    Singular values end between about 0.7 and 1.2 instead of at 1, which is as good for the optimizer.

    Args:
        matrices: [N, rows, columns].
        coefficients: (a, b, c) of x <- a x + b x^3 + c x^5 on the singular values.
        steps: how many iterations to take.
        eps: the smallest norm to divide by.

    Returns:
        [N, rows, columns], in the dtype of `matrices`.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
