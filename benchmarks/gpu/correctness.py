"""The kernels against their definition in float64: outputs and gradients, repeated, and with NaN beside the inputs."""

from typing import Any

import torch

from benchmarks.gpu.case import CheckFailed
from benchmarks.gpu.engine_calls import EngineCall, Tensors, make

ALLOWED = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 2e-5}
"""Largest error of a result: the norm of the difference over the norm of what is right."""

GUARD = 8
"""Numbers of NaN around each axis of the inputs."""


def check(*, engine: str, dtype: str, device: str, **settings: Any) -> dict[str, Any]:
    """Results of the Triton kernels: right, the same bits again, and from nothing that lies beside the inputs.

    Returns:
        The error of each result.
    """
    call = make(engine, dtype=dtype, device=device, **settings)
    ours = call.results("triton")
    wanted = call.results("reference", call.exact())
    errors = errors_of(ours, wanted, ALLOWED[dtype])
    check_repeats(call, ours)
    # Other strides give torch's own operations around the engine other last bits.
    errors_of(call.results("triton", {name: among_nan(x) for name, x in call.tensors.items()}), wanted, ALLOWED[dtype])
    return {"errors": errors, "largest": max(errors.values())}


def check_repeats(call: EngineCall, first: Tensors, times: int = 1) -> None:
    """The same call gives the same bits.

    Raises:
        CheckFailed: naming the result and the repetition.
    """
    for number in range(1, times + 1):
        for name, x in call.results("triton").items():
            if not torch.equal(x, first[name]):
                differing = int((x != first[name]).sum())
                raise CheckFailed(f"{name} differs in {differing} of {x.numel()} numbers in repetition {number}")


def errors_of(ours: Tensors, wanted: Tensors, allowed: float) -> dict[str, float]:
    """The error of each result.

    Raises:
        CheckFailed: naming those above `allowed`.
    """
    errors = {name: relative_error(x, wanted[name]) for name, x in ours.items()}
    wrong = [f"{name}: {error:.2e}" for name, error in errors.items() if not error <= allowed]
    if wrong:
        raise CheckFailed(f"errors above {allowed:g}: {', '.join(wrong)}")
    return errors


def relative_error(x: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of `wanted`, in float64; infinite where `x` is not finite."""
    difference = (x.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-12)
    return float(difference) if bool(x.isfinite().all()) else float("inf")


def among_nan(x: torch.Tensor) -> torch.Tensor:
    """A view with the same numbers into a larger tensor of NaN; the last axis keeps its unit stride."""
    room = torch.full([size + GUARD for size in x.shape], torch.nan, dtype=x.dtype, device=x.device)
    return room[tuple(slice(size) for size in x.shape)].copy_(x)
