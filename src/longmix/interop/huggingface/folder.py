"""The files that longmix adds to such a folder, and readers that verify them.

`longmix.json` is there for the way back: the training configuration and the tokenizer exactly as they were.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from longmix import reading
from longmix.aliases import renewed
from longmix.checkpoints.verify import reason_of, weight_differences
from longmix.errors import CheckpointError, ConfigError

OWN_FILE = "longmix.json"
FORMAT = 1
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def require_transformers() -> None:
    """Refuse with the command that installs transformers if it is missing.

    Raises:
        ConfigError: transformers or safetensors is not installed.
    """
    for package in ("transformers", "safetensors"):
        if find_spec(package) is None:
            raise ConfigError(f"this needs the package {package}: pip install 'longmix[interop]'.")


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file of a folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not path.parent.is_dir():
        raise CheckpointError(f"there is no folder {path.parent}.")
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a folder of a model: it has no {path.name}.")
    try:
        return reading.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}.") from error


def read_own(folder: Path) -> dict[str, Any] | None:
    """The content of `longmix.json`; None in a folder that longmix did not write.

    Raises:
        CheckpointError: it is damaged or of another format.
    """
    path = folder / OWN_FILE
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {reading.shortened(content.get('format'))}; this version of longmix reads {FORMAT}."
        )
    config = content.get("config")
    lacking = {"step", "tokenizer"} - set(content)
    lacking |= {"model", "mixer", "data", "tokenizer", "seq_len", "seed"} - set(
        config if isinstance(config, dict) else {}
    )
    if lacking:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(lacking))}; without that file the model alone is read.")
    return content | {"config": renewed(config)}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by their names there; 16-bit ones in float32, one after the other.

    Raises:
        CheckpointError: there are none as safetensors, or they are damaged.
    """
    from safetensors import safe_open

    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise CheckpointError(f"{folder / INDEX} cannot be read: it has no weight_map.")
        names = sorted({Path(str(name)).name for name in index.values()})
    weights: dict[str, Tensor] = {}
    for path in (folder / name for name in names):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; of weights only safetensors are read.")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    weight = file.get_tensor(name)
                    short = weight.is_floating_point() and weight.element_size() == 2
                    weights[name] = weight.float() if short else weight
        except Exception as error:  # SafetensorError, and what torch raises of types and sizes it does not know
            raise CheckpointError(f"{path} is damaged: {reason_of(error)}.") from error
    return weights


def check_weights(folder: Path, found: dict[str, Tensor], needed: dict[str, Tensor]) -> None:
    """Refuse weights that are not those of the model.

    Args:
        folder: for messages.
        found: as read.
        needed: the model's, of which shapes are taken.

    Raises:
        CheckpointError: some are missing, too many, of another shape or of a type that holds no plain numbers.
    """
    if differences := weight_differences(found, needed, _unread):
        raise CheckpointError(f"the weights in {folder} are not those of its config.json: {differences}.")


def _unread(weight: Tensor) -> str | None:
    """The reason why a tensor's type is refused; None if it is accepted."""
    if weight.element_size() not in (2, 4, 8):
        return f"{str(weight.dtype).removeprefix('torch.')}, which is not read"
    if weight.element_size() == 8 and weight.is_floating_point():
        return "float64, of which float32 would lose digits"
    return None
