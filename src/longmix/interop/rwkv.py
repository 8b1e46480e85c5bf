"""RWKV-7 models in the format of RWKV-LM and of the `rwkv` package, out of longmix and into it.

python -m longmix.interop.rwkv CHECKPOINT OUTPUT.pth

Matrices keep their order [out, in], but the thin ones, which that format holds as [in, out]. States are transposed:
ours are [keys, values], theirs [values, keys]. Such a file holds weights alone: its sizes are theirs, and the epsilons
of its norms are those of the authors' code.
"""

import sys
from collections.abc import Mapping, Sequence
from math import isclose
from pathlib import Path

import torch
from torch import Tensor

from longmix import startup
from longmix.checkpoints import chosen_checkpoint, load_foreign_tensors, save_tensors
from longmix.checkpoints.contents import Weights, load_model_state, rebuilding
from longmix.checkpoints.verify import weight_differences
from longmix.command_line.options import OptionParser, path_option
from longmix.config import ModelConfig
from longmix.errors import CheckpointError, ConfigError, LongmixError
from longmix.files import check_replaceable
from longmix.interop.layouts import Layout, Place, renamed, rows, transposed, vector
from longmix.mixers.rwkv7 import RWKV7
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Block
from longmix.model.build import build_model, model_over_checkpoint
from longmix.model.rwkv_blocks import ChannelMix, RWKVBlocks
from longmix.model.sharing_conversion import dense_state
from longmix.model.tuned_states_file import tune_states
from longmix.trust import check_model_nodes

NORM_EPS, HEAD_NORM_EPS = 1e-5, 64e-5
"""Epsilons in the authors' code, that of a head's norm whatever its width."""

CONTEXT = 4096
"""Tokens of a training row; a file does not say how many, and released models have seen at least so many."""

LOW_RANK = {"decay": "w", "rate": "a", "value_mix": "v", "gate": "g"}
"""Our names of the thin matrices, and the letters of theirs."""

PLACEHOLDERS = tuple(f"blocks.0.att.v{number}" for number in range(3))
"""Weights of a value residual in the first layer, which that format has and nobody reads."""

STATE = "att.time_state"


def layout(heads: int) -> Layout:
    """The names of all weights, of a model with so many heads in a layer."""
    layer = {
        "mixer.shifts": rows(*(f"att.x_{letter}" for letter in "rwkvag")),
        "mixer.removal_scale": vector("att.k_k", 1, 1, -1),
        "mixer.replacement_scale": vector("att.k_a", 1, 1, -1),
        "mixer.bonus": vector("att.r_k", heads, -1),
        "mixer.tuned.initial.memory": Place((STATE,), lambda state: [state.mT], lambda parts: parts[0].mT.contiguous()),
        "mlp.shift": vector("ffn.x_k", 1, 1, -1),
        "mlp.key.weight": renamed("ffn.key.weight"),
        "mlp.value.weight": renamed("ffn.value.weight"),
    }
    for ours, theirs in {"query": "receptance", "key": "key", "value": "value", "output": "output"}.items():
        layer[f"mixer.{ours}.weight"] = renamed(f"att.{theirs}.weight")
    for ours, letter in LOW_RANK.items():
        layer[f"mixer.{ours}.down.weight"] = transposed(f"att.{letter}1")
        layer[f"mixer.{ours}.up.weight"] = transposed(f"att.{letter}2")
        if letter != "g":
            layer[f"mixer.{ours.removesuffix('_mix')}_base"] = vector(f"att.{letter}0", 1, 1, -1)
    outside = {"embedding.weight": renamed("emb.weight"), "head.weight": renamed("head.weight")}
    for part in ("weight", "bias"):
        norms = {"mixer_norm": "ln1", "mlp_norm": "ln2", "mixer.head_norm": "att.ln_x"}
        layer |= {f"{ours}.{part}": renamed(f"{theirs}.{part}") for ours, theirs in norms.items()}
        outside |= {
            f"norm.{part}": renamed(f"ln_out.{part}"),
            f"embedding_norm.{part}": renamed(f"blocks.0.ln0.{part}"),
        }
    return Layout(outside, layer, "blocks.")


def rwkv_weights(model: LanguageModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of a model's weights by RWKV-LM's names; tuned states come as `att.time_state` [H, V, K].

    Args:
        model: any.
        dtype: to cast to; None leaves them as they are.

    Raises:
        ConfigError: a layer is not RWKV-7's, or a norm's epsilon is not that of the authors' code.
    """
    for index, block in enumerate(model.blocks):
        if not (isinstance(block, Block) and isinstance(block.mixer, RWKV7) and isinstance(block.mlp, ChannelMix)):
            raise ConfigError(f"layer {index} is not RWKV-7's; this format needs mixer=rwkv7 and block=rwkv7.")
        if block.mixer.tuned is not None and block.mixer.tuned.memory is not None:
            raise ConfigError("this format has no place for a tuned memory; tune states with tuning.features=0.")
        found = {"model.norm_eps": model.shape.norm_eps, "mixer.norm_eps": block.mixer.head_norm.eps}
        for (name, own), theirs in zip(found.items(), (NORM_EPS, HEAD_NORM_EPS), strict=True):
            if not isclose(own, theirs, rel_tol=1e-12):
                raise ConfigError(f"{name}={own:g} cannot be said in this format, whose code has {theirs:g}.")
    if model.logit_softcap is not None:
        raise ConfigError(f"model.logit_softcap={model.logit_softcap} cannot be said in this format.")
    first = model.mixers()[0]
    assert isinstance(first, RWKV7)
    weights = layout(first.num_heads).to_theirs(model.state_dict())
    empty = first.shifts.detach()
    width = first.recent_channels
    for name, shape in zip(PLACEHOLDERS, ((1, 1, width), (width, 1), (1, width)), strict=True):
        weights[name] = empty.new_zeros(shape)
    return {name: weight.detach().to(dtype or weight.dtype, copy=True) for name, weight in weights.items()}


def read_file(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model in a file of RWKV-LM's, and its weights by our names in float32, which holds shorter types exactly.

    Args:
        path: of the file, as training there saves it.

    Raises:
        CheckpointError: it is missing, damaged, or holds another model than RWKV-7's.
    """
    theirs = load_foreign_tensors(path, "weights of RWKV-7")
    for name in PLACEHOLDERS:
        theirs.pop(name, None)
    config, heads = _config_of(path, theirs)
    try:
        found = layout(heads).to_ours(theirs)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = build_model(config, len(found["embedding.weight"]))
        if any(name.endswith(STATE) for name in theirs):
            tune_states(model)
    if differences := weight_differences(found, model.state_dict()):
        raise CheckpointError(f"the weights in {path} are not those of an RWKV-7: {differences}.")
    return config, {name: found[name].float() for name in model.state_dict()}


def _config_of(path: Path, weights: Mapping[str, Tensor]) -> tuple[ModelConfig, int]:
    """What a model is built from that has such weights, and the heads of a layer."""

    def sizes(name: str, dimensions: int) -> list[int]:
        weight = weights.get(name)
        if weight is None or weight.ndim != dimensions or 0 in weight.shape:
            shape = "is missing" if weight is None else f"has shape {list(weight.shape)}"
            raise CheckpointError(f"{path} holds no RWKV-7 in its authors' layout: {name} {shape}.")
        return list(weight.shape)

    width = sizes("emb.weight", 2)[1]
    heads, head_dim = sizes("blocks.0.att.r_k", 2)
    layers = 1
    while f"blocks.{layers}.att.r_k" in weights:
        layers += 1
    hidden = sizes("blocks.0.ffn.key.weight", 2)[0]
    last = f"blocks.{layers - 1}.att"
    letters = {"decay": "w", "rate": "a", "gate": "g", **({"value": "v"} if layers > 1 else {})}
    mixer = {
        "_target_": f"{RWKV7.__module__}.{RWKV7.__qualname__}",
        "head_dim": head_dim,
        **{f"{name}_rank": None for name in ("decay", "rate", "value", "gate")},
        **{f"{name}_rank": sizes(f"{last}.{letter}1", 2)[1] for name, letter in letters.items()},
        "norm_eps": HEAD_NORM_EPS,
    }
    model = {
        "_target_": f"{LanguageModel.__module__}.{LanguageModel.__qualname__}",
        "d_model": width,
        "num_layers": layers,
        "num_heads": 1,
        "mlp_hidden": hidden,
        "tie_head": False,
        "logit_penalty": 0.0,
        "norm_eps": NORM_EPS,
        "activation_checkpointing": "none",
        "block": {
            "_target_": f"{RWKVBlocks.__module__}.{RWKVBlocks.__qualname__}",
            "channel_factor": hidden / width,
        },
    }
    return ModelConfig.of({"model": model, "mixer": mixer}), heads


def write_file(
    checkpoint: Path, output: Path, dtype: torch.dtype = torch.float32, weights_of: Weights = "trained"
) -> dict[str, Tensor]:
    """Write a checkpoint's model in RWKV-LM's format, and return the weights that the file holds.

    Args:
        checkpoint: folder of a run or checkpoint.
        output: file to write, ending in .pth.
        dtype: of the weights.
        weights_of: "trained" or "ema"; see `longmix.interop.huggingface.export.export`.

    Raises:
        ConfigError: the model is not RWKV-7, or the file's name cannot be replaced.
        CheckpointError: there is no such checkpoint, or it is damaged.
        StorageError: the file cannot be written; what was there before stays.
    """
    check_replaceable(output)
    path = chosen_checkpoint(checkpoint)
    state = load_model_state(path, weights_of)
    with rebuilding(path):
        check_model_nodes(state["config"])
        weights = rwkv_weights(model_over_checkpoint(dense_state(state)), dtype)
    save_tensors(output, weights)
    return weights


def main(words: Sequence[str] | None = None) -> int:
    """Write a checkpoint of RWKV-7 in the format of the rwkv package, and return the exit code.

    Args:
        words: those of the process if not given.
    """
    parser = OptionParser(
        prog="python -m longmix.interop.rwkv",
        description="Write a checkpoint of RWKV-7 in the format of the rwkv package.",
    )
    parser.add_argument("checkpoint", type=path_option, help="folder of a run or checkpoint")
    parser.add_argument("output", type=path_option, help="file to write, ending in .pth")
    try:
        arguments = parser.parse_args(words)
        weights = write_file(arguments.checkpoint, arguments.output)
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {len(weights)} tensors to {arguments.output}")
    return 0


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
