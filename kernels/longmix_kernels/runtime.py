"""Choosing the implementation that runs an engine call; shared by all engines. Triton is imported only if asked for."""

import torch


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
        return "triton" if device.type == "cuda" and "triton" in implemented else "blocked"
    if backend not in implemented:
        allowed = ", ".join(repr(name) for name in implemented)
        raise ValueError(f"backend={backend!r} is not available here; allowed are None, {allowed}")
    return backend


def check_triton_device(device: torch.device) -> None:
    """Check that Triton kernels can run on a device.

    Raises:
        ValueError: it is neither a CUDA device nor the CPU under Triton's interpreter.
    """
    if device.type == "cuda" or (device.type == "cpu" and _triton_is_interpreted()):
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
