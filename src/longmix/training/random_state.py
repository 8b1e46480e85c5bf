"""The state of every random generator, in types that a checkpoint can hold without pickled code."""

import random
from typing import Any

import numpy as np
import torch

GeneratorStates = dict[str, Any]
"""The states of one process's generators, by library."""


def capture() -> GeneratorStates:
    """States of torch (CPU and this process's CUDA device), NumPy's legacy generator and Python's `random`."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def restore(state: GeneratorStates) -> None:
    """Put every generator of this process back; a CUDA state from elsewhere goes to the device that is here."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():  # older checkpoints hold one for each device
        torch.cuda.set_rng_state(state["cuda"][min(torch.cuda.current_device(), len(state["cuda"]) - 1)])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def diverge(seed: int, rank: int, step: int) -> None:
    """Let a process draw other numbers than the first, whose generators stay: dropout zeroes other places in its rows.

    Args:
        seed: of the run.
        rank: of the process.
        step: from which on.
    """
    if rank:
        torch.manual_seed((seed << 31) ^ (step << 20) ^ rank)


def of_process(states: list[GeneratorStates] | GeneratorStates, rank: int) -> GeneratorStates:
    """Which of the saved states a process continues with.

    On as many processes as before, each goes on with its own. On more, process r takes that of r modulo the number
    before: all processes of a run begin with the same state, for what they draw alike must stay alike. On fewer, the
    others' states end. Training draws nothing after its weights, but for dropout, or a module of one's own; see
    `diverge`.

    Args:
        states: of each process by rank; older checkpoints hold that of the first one alone.
        rank: of this process.
    """
    return states if isinstance(states, dict) else states[rank % len(states)]
