"""Checks before generation whether rows fit into the free memory."""

import torch

from longmix import machine_memory
from longmix.errors import ConfigError
from longmix.restore import Restored

ROW_BYTES = 1024
"""The least that a row takes besides tensors: its ids and text."""


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine_memory.free_bytes()


def check_rows(restored: Restored, rows: int, named: str) -> None:
    """Refuse more rows than the free memory holds, before any is made.

    The estimate is below what any mixer takes, so that nothing that fits is refused: the scores of the next token, the
    state after one token, and the row's text.

    Args:
        restored: the model.
        rows: that go on side by side.
        named: the words that asked for them, for the message.

    Raises:
        ConfigError: names the numbers and the cure.
    """
    free = free_bytes(restored.device)
    model = restored.model
    # states of the smallest type, as one may be kept in bf16
    needed = rows * (ROW_BYTES + 4 * model.vocab_size + model.state_bytes(1) // 2)
    if free is not None and needed > free:
        raise ConfigError(
            f"{named}: {rows:,} rows at once take more memory than there is, {needed / 2**30:,.1f} GiB at least where "
            f"{free / 2**30:,.1f} GiB are free; give fewer samples, or fewer prompts."
        )
