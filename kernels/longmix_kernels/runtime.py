"""Choosing the implementation that runs an engine call; shared by all engines. Triton is imported only if asked for."""

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What the engines take."""


class UnsupportedDevice(ValueError):
    """A GPU cannot run a kernel: it is too old, or has less shared memory than the smallest tile takes."""


_assumed: str | None = None
"""The type of device that tensors count as being on; None for the one they are on."""


@contextlib.contextmanager
def assumed_device(kind: str) -> Iterator[None]:
    """Let fake tensors stand for those of a device that is not there, so that calls are planned as they would run.

    Args:
        kind: "cuda" or "cpu".
    """
    global _assumed
    before, _assumed = _assumed, kind
    try:
        yield
    finally:
        _assumed = before


def device_kind(device: torch.device) -> str:
    """The type of device that tensors on `device` count as being on, such as "cuda"."""
    return _assumed or device.type


def on_gpu(x: torch.Tensor) -> bool:
    """Say whether a tensor is on a CUDA device, or counts as being on one."""
    return device_kind(x.device) == "cuda"


def choose_backend(backend: str | None, device: torch.device, implemented: tuple[str, ...]) -> str:
    """Return the name of the implementation to run.

    Args:
        backend: the caller's wish; None leaves the choice to the device.
        device: where the inputs are.
        implemented: the names the engine offers; "blocked" is always one of them.

    Returns:
        The wish itself, or for None "triton" on a CUDA device where the engine offers it and "blocked" elsewhere.

    Raises:
        ValueError: `backend` is not a name the engine offers.
    """
    if backend is None:
        return "triton" if device_kind(device) == "cuda" and "triton" in implemented else "blocked"
    if backend not in implemented:
        allowed = ", ".join(repr(name) for name in implemented)
        raise ValueError(f"backend={backend!r} is not available here; allowed are None, {allowed}")
    return backend


def backend_of_call(backend: str | None, implemented: tuple[str, ...], max_dim: int, **tensors: torch.Tensor) -> str:
    """Return the name of the implementation that runs a call: `choose_backend`, but Triton only where it covers it.

    Args:
        backend, implemented: see `choose_backend`.
        max_dim: largest head dimension of the Triton kernels.
        tensors: [B, T, H, D] by name; where they are decides too.

    Raises:
        ValueError: `backend` is not offered, or is "triton" and cannot run the call.
    """
    device = next(iter(tensors.values())).device
    uncovered = triton_limits(max_dim, **tensors)
    if uncovered and backend is None:
        implemented = tuple(name for name in implemented if name != "triton")
    chosen = choose_backend(backend, device, implemented)
    if chosen == "triton":
        if uncovered:
            raise ValueError(f"backend='triton' got {uncovered}")
        check_triton_device(device)
    return chosen


def triton_limits(max_dim: int, **tensors: torch.Tensor) -> str | None:
    """Say which of the tensors [B, T, H, D] Triton kernels do not cover, and why; None if they cover all."""
    for name, x in tensors.items():
        if x.dtype == torch.float64:
            return f"{name} of dtype torch.float64; allowed are torch.float16, torch.bfloat16 and torch.float32"
        if x.shape[3] > max_dim:
            return f"{name} with head dimension {x.shape[3]}; allowed are 1 to {max_dim}"
    return None


def is_readable(x: torch.Tensor) -> bool:
    """Say whether values can be looked at for nothing: on the CPU, outside of compilation, and if there are any."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def has_values(x: torch.Tensor) -> bool:
    """Say whether a tensor holds numbers, and not shapes alone."""
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def check_device(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    """Check that a tensor is where the query is.

    Raises:
        ValueError: it is not.
    """
    if x.device != query.device:
        raise ValueError(f"{name} is on {x.device}; allowed is {query.device}, where query is")


def check_chunks(query: torch.Tensor, document_ids: torch.Tensor | None, chunk_size: int | None) -> None:
    """Check what a chunked recurrence over query [B, T, H, D] is told of documents and chunks.

    Raises:
        ValueError: ids that are no integers [B, T], that decrease (read on the CPU only) or are elsewhere; a chunk size
            that is no power of two from 16 on.
    """
    if document_ids is not None:
        if document_ids.shape != query.shape[:2] or document_ids.dtype not in (torch.int32, torch.int64):
            got, shape = f"{document_ids.dtype} {list(document_ids.shape)}", list(query.shape[:2])
            raise ValueError(f"document_ids is {got}; allowed is torch.int32 or torch.int64 {shape}")
        check_device("document_ids", document_ids, query)
        if is_readable(document_ids) and (document_ids[:, 1:] < document_ids[:, :-1]).any():
            raise ValueError("document_ids must not decrease along its last axis")
    if chunk_size is not None and (chunk_size < 16 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size is {chunk_size}; allowed are powers of two from 16 on, or None")


def check_triton_device(device: torch.device) -> None:
    """Check that Triton kernels can run on a device.

    Raises:
        ValueError: it is neither a CUDA device nor the CPU under Triton's interpreter.
    """
    if device_kind(device) == "cuda" or (device.type == "cpu" and _triton_is_interpreted()):
        return
    raise ValueError(
        f"backend='triton' got tensors on {device}; allowed are a CUDA device, or the CPU where TRITON_INTERPRET=1 was "
        "set in the environment before triton was imported"
    )


def _triton_is_interpreted() -> bool:
    """Say whether kernels are defined for the interpreter; Triton decides that when a kernel is defined."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)
