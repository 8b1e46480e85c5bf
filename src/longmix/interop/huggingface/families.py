"""The types of recurrent models: each has a module, which says what its folders mean.

`longmix.interop.huggingface.llama` is the one for the types whose `config.json` transformers reads for us.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longmix.config import ModelConfig
from longmix.files import write_json
from longmix.interop.huggingface import gated_deltanet, rwkv7, xlstm
from longmix.interop.huggingface.described import Described
from longmix.interop.huggingface.folder import INDEX, WEIGHTS
from longmix.interop.huggingface.specials import GENERATION
from longmix.model.backbone import LanguageModel

SHARD = "5GB"
"""The most that a file of weights holds before they are cast."""


class Family(Protocol):
    """What a module of a type has; see `longmix.interop.huggingface.rwkv7`."""

    TYPE: str

    def read(self, given: Mapping[str, Any]) -> Described:
        """What a `config.json` says."""
        ...

    def model_config(self, config: Described) -> ModelConfig:
        """What a model is built from that it describes."""
        ...

    def described(self, model: LanguageModel, config: ModelConfig) -> dict[str, Any]:
        """The content of `config.json` for a model."""
        ...

    def to_theirs(self, weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Our weights by their names."""
        ...

    def to_ours(self, weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Their weights by our names."""
        ...


_MODULES: tuple[Family, ...] = (xlstm, rwkv7, gated_deltanet)
FAMILIES = {module.TYPE: module for module in _MODULES}

ALONE = (xlstm.TYPE,)
"""Types that transformers runs without another package."""


def write_folder(folder: Path, config: Described, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write `config.json`, `generation_config.json` and the weights, cast one file at a time.

    Args:
        folder: to fill.
        config: what to say.
        weights: by their names there.
        dtype: to cast to.

    Raises:
        OSError: a file cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    specials = {name: value for name, value in vars(config).items() if name.endswith("_token_id") and value is not None}
    said = {name: value for name, value in vars(config).items() if value is not None}
    write_json(folder / "config.json", {**said, "dtype": str(dtype).removeprefix("torch.")})
    write_json(folder / GENERATION, {"_from_model_config": True, **specials})
    plan = split_torch_state_dict_into_shards(dict(weights), max_shard_size=SHARD)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: weights[name].to(dtype, copy=True, memory_format=torch.contiguous_format) for name in names}
        try:
            save_file(shard, folder / file, {"format": "pt"})
        except SafetensorError as error:  # how a full disk shows itself
            raise OSError(f"{WEIGHTS}: {error}") from error
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
