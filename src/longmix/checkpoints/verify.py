"""What every reader of saved files shares: nothing is believed before it is verified, and nothing runs code."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.aliases import renewed
from longmix.errors import CheckpointError, LongmixError
from longmix.files import sha256_of_file, sha256_of_json
from longmix.reading import LONGEST_REASON, read_json, require_regular, shortened

INFO_FILE = "info.json"

WHOLE, SHARDED = 1, 2
"""Formats: one file of everything, or tensors in a file of each process."""

ALIASES = "aliases"
"""Key in the rest of a sharded checkpoint: further names of tensors."""

Facts = dict[str, Any]
"""The facts of a file: `bytes` and `sha256`."""


def facts_of(path: Path | str) -> Facts:
    """Size and SHA-256 of a file."""
    path = Path(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def read_info(checkpoint: Path | str) -> dict[str, Any]:
    """The `info.json` of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = Path(checkpoint) / INFO_FILE
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}. {cure(checkpoint)}") from error


def weights_digest(checkpoint: Path | str) -> str:
    """A digest of a checkpoint's files. It does not depend on where the folder is.

    Raises:
        CheckpointError: its `info.json` is missing or damaged.
    """
    info = read_info(checkpoint)
    return sha256_of_json([info.get("sha256"), info.get("files")])


def check_size(path: Path | str, facts: Facts) -> None:
    """Refuse a file of a checkpoint that is missing or has another size than it was written with.

    Raises:
        CheckpointError: names the file and the cure.
    """
    path = Path(path)
    try:
        require_regular(path)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. {cure(path.parent)}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}. {cure(path.parent)}") from error
    if size != facts.get("bytes"):
        raise CheckpointError(
            f"{path} has {size} bytes instead of {shortened(facts.get('bytes'))}. {cure(path.parent)}"
        )


def check_file(path: Path | str, facts: Facts) -> None:
    """Refuse a file of a checkpoint that is not, byte for byte, the one that was written; reads 1 MiB at a time.

    Raises:
        CheckpointError: names the file and the cure.
    """
    path = Path(path)
    check_size(path, facts)
    with reading(path, "file that can be read", f"; {cure(path.parent).rstrip('.')}"):
        found = sha256_of_file(path)
    if found != facts.get("sha256"):
        raise CheckpointError(
            f"{path} is damaged or of another checkpoint: its SHA-256 is not the one in {INFO_FILE}. "
            f"{cure(path.parent)}"
        )


def cure(checkpoint: Path | str) -> str:
    """The sentence that tells the user what to do about a damaged checkpoint."""
    return f"Delete {checkpoint} and use an older checkpoint beside it."


@contextlib.contextmanager
def reading(path: Path | str, what: str, cure: str = "") -> Iterator[None]:
    """Turn any error that a damaged file raises while it is read into one message.

    Args:
        path: the file.
        what: it should hold.
        cure: what to do about it.

    Raises:
        CheckpointError: names the file, what it lacks and the cure.
    """
    try:
        yield
    except LongmixError:
        raise
    except Exception as error:  # damaged bytes can raise any kind
        raise CheckpointError(f"{path} holds no {what} ({reason_of(error)}){cure}.") from error


def reason_of(error: Exception) -> str:
    """The reason of a reading error, in one short line."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "it does not fit in memory"
    short = shortened(error)
    return short if type(error) is ValueError else f"{type(error).__name__}: {short}"


def as_state(content: Any) -> dict[str, Any]:
    """A saved state whose keys are texts and whose weights are tensors of plain numbers; call inside `reading`.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"it holds a {type(content).__name__} in the place of a state")
    step = content.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"its step is {step!r}"[:LONGEST_REASON])
    if not isinstance(content.get("model", {}), dict):
        raise ValueError("its model is no dict of weights")
    for name, weight in content.get("model", {}).items():
        check_weight(name, weight)
    return content | {"config": renewed(content["config"])} if "config" in content else content


def check_weight(name: Any, weight: Any) -> None:
    """Refuse a weight that is no tensor of plain numbers in CPU memory or on the disk.

    Raises:
        ValueError: names it.
    """
    if not isinstance(name, str) or not isinstance(weight, Tensor):
        raise ValueError(f"{name!r} is no weight"[:LONGEST_REASON])
    if weight.layout != torch.strided or weight.is_meta or weight.is_quantized:
        raise ValueError(f"{name} is not a tensor of plain numbers")


SHOWN = 4
"""The most differences that a message lists."""


def weight_differences(
    found: dict[str, Tensor], needed: dict[str, Tensor], unread: Callable[[Tensor], str | None] = lambda weight: None
) -> str | None:
    """How weights differ from those of a model, in one line; None if they fit.

    Args:
        found: as read.
        needed: the model's, which may be without memory.
        unread: says why a weight of the right shape cannot be taken all the same.
    """
    problems = [f"{name} is missing" for name in needed if name not in found]
    for name, weight in found.items():
        if name not in needed:
            problems.append(f"{name} is not a part of the model")
        elif weight.shape != needed[name].shape:
            problems.append(f"{name} has shape {list(weight.shape)} instead of {list(needed[name].shape)}")
        elif reason := unread(weight):
            problems.append(f"{name} is {reason}")
        elif weight.is_floating_point() != needed[name].is_floating_point():
            problems.append(f"{name} is {weight.dtype} instead of {needed[name].dtype}")
    more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more or None
