"""Checks before a pass whether windows fit into the free memory."""

from longmix.errors import ConfigError
from longmix.generation.memory import free_bytes
from longmix.model.backbone import LanguageModel
from longmix.restore import Restored


def check_memory(model: LanguageModel, tokens: int, restored: Restored, key: str) -> None:
    """Refuse a pass over so many tokens if its activations alone are larger than the memory that is free.

    The estimate is below what any mixer takes, so that nothing that fits is refused.

    Args:
        model: to pass through.
        tokens: of all rows together.
        restored: says device and precision.
        key: the setting that asked for it, for the message.

    Raises:
        ConfigError: names the numbers and the cure.
    """
    free = free_bytes(restored.device)
    width = 2 if restored.precision == "bf16" else 4
    needed = tokens * (8 + 2 * model.shape.d_model * width)  # ids and targets; a block's input and its norm
    if free is not None and needed > free:
        raise ConfigError(
            f"{key}: {tokens:,} tokens at once take more than {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB "
            "of memory are free; give shorter windows, or a smaller batch_size."
        )
