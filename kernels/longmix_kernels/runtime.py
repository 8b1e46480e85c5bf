"""Choose the implementation that runs a call, for all engines. Triton is imported only where a call asks for it."""

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that the engines take."""


class UnsupportedDevice(ValueError):
    """A GPU cannot run a kernel: it is too old, or has less shared memory than the smallest tile takes."""


_assumed: str | None = None
"""The type of device that every tensor counts as being on; None if each counts as being where it is."""


@contextlib.contextmanager
def assumed_device(kind: str) -> Iterator[None]:
    """Let fake tensors count as being on another type of device, so that calls are planned as they would run there.

    Args:
        kind: the type of device, "cuda" or "cpu".
    """
    global _assumed
    before, _assumed = _assumed, kind
    try:
        yield
    finally:
        _assumed = before


def device_kind(device: torch.device) -> str:
    """Return the type of device that tensors on `device` count as being on, such as "cuda"."""
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
        backend: the caller's wish; None leaves the choice to the device and the tensors.
        implemented: the names the engine offers.
        max_dim: the largest head dimension of the Triton kernels.
        tensors: the tensors [B, T, H, D] of the call by name; the device of the first decides.

    Returns:
        The wish itself, or for None "triton" where it covers the call on a CUDA device, and "blocked" elsewhere.

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
    """Return which of the tensors [B, T, H, D] the Triton kernels do not cover, and why; None if they cover all.

    Args:
        max_dim: the largest head dimension of the Triton kernels.
        tensors: the tensors by name.
    """
    for name, x in tensors.items():
        if x.dtype == torch.float64:
            return f"{name} of dtype torch.float64; allowed are torch.float16, torch.bfloat16 and torch.float32"
        if x.shape[3] > max_dim:
            return f"{name} with head dimension {x.shape[3]}; allowed are 1 to {max_dim}"
    return None


def is_readable(x: torch.Tensor) -> bool:
    """Say whether reading values costs no wait: the tensor has values, on the CPU, and nothing is being compiled.

    A tensor that counts as being on a GPU is not readable: there, reading waits for the device.
    """
    on_cpu = x.device.type == "cpu" and not on_gpu(x)
    return on_cpu and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def has_values(x: torch.Tensor) -> bool:
    """Say whether a tensor holds numbers, and not shapes alone."""
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def check_device(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    """Check that a tensor is on the device of the query.

    Args:
        name: the tensor's name, for the message.
        x: the tensor.
        query: the query.

    Raises:
        ValueError: the tensor is on another device.
    """
    if x.device != query.device:
        raise ValueError(f"{name} is on {x.device}; allowed is {query.device}, where query is")


def check_chunks(query: torch.Tensor, document_ids: torch.Tensor | None, chunk_size: int | None) -> None:
    """Check the document ids and the chunk size of a chunked recurrence.

    Args:
        query: [B, T, H, D].
        document_ids: int32 or int64 [B, T], non-decreasing along T, or None.
        chunk_size: a power of two from 16 on, or None.

    Raises:
        ValueError: an argument is something else, or the ids are on another device than the query. The order of the
            ids is read on the CPU only.
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
    """Say whether Triton defines kernels for its interpreter, which it decides when it defines a kernel."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)
