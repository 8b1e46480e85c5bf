"""Choosing the implementation that runs an engine call; shared by all engines."""

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
