"""RWKV-7 models in the format of RWKV-LM and of the `rwkv` package.

python -m longmix.interop.rwkv CHECKPOINT OUTPUT.pth

Matrices keep their order [out, in], but the thin ones, which that format holds as [in, out]. States are transposed:
ours are [keys, values], theirs [values, keys].
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longmix import startup
from longmix.checkpoints import chosen_checkpoint, save_tensors
from longmix.checkpoints.contents import load_model_state, rebuilding
from longmix.command_line.options import OptionParser, path_option
from longmix.errors import ConfigError, LongmixError
from longmix.files import check_replaceable
from longmix.mixers.rwkv7 import RWKV7, SHIFTS, LowRank
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Block
from longmix.model.build import model_from_checkpoint
from longmix.model.rwkv_blocks import ChannelMix
from longmix.trust import check_model_nodes

SHIFT_LETTERS = {"query": "r", "decay": "w", "key": "k", "value": "v", "rate": "a", "gate": "g"}


def rwkv_weights(model: LanguageModel) -> dict[str, Tensor]:
    """The weights of a model by RWKV-LM's names; tuned states come as `att.time_state` [H, V, K].

    Raises:
        ConfigError: a layer is not RWKV-7's.
    """
    for index, block in enumerate(model.blocks):
        if not (isinstance(block, Block) and isinstance(block.mixer, RWKV7) and isinstance(block.mlp, ChannelMix)):
            raise ConfigError(f"layer {index} is not RWKV-7's; this format needs mixer=rwkv7 and block=rwkv7.")
    if model.logit_softcap is not None:
        raise ConfigError(f"model.logit_softcap={model.logit_softcap} cannot be said in this format.")
    weights = {"emb.weight": model.embedding.weight, "head.weight": model.head.weight, **_norm("ln_out", model.norm)}
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        assert isinstance(block.mixer, RWKV7)
        assert isinstance(block.mlp, ChannelMix)
        prefix = f"blocks.{index}"
        if index == 0:
            weights |= _norm(f"{prefix}.ln0", model.embedding_norm)
        weights |= _norm(f"{prefix}.ln1", block.mixer_norm) | _norm(f"{prefix}.ln2", block.mlp_norm)
        weights |= {f"{prefix}.att.{name}": weight for name, weight in _time_mixing(block.mixer).items()}
        weights |= {
            f"{prefix}.ffn.x_k": block.mlp.shift.view(1, 1, -1),
            f"{prefix}.ffn.key.weight": block.mlp.key.weight,
            f"{prefix}.ffn.value.weight": block.mlp.value.weight,
        }
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _norm(name: str, norm: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{part}": getattr(norm, part) for part in ("weight", "bias")}


def _time_mixing(mixer: RWKV7) -> dict[str, Tensor]:
    weights = {
        f"x_{SHIFT_LETTERS[name]}": shift.view(1, 1, -1) for name, shift in zip(SHIFTS, mixer.shifts, strict=True)
    }
    # Theirs holds a value residual in the first layer too, and never reads it.
    value_base = torch.zeros_like(mixer.rate_base) if mixer.value_base is None else mixer.value_base
    value_mix = LowRank(mixer.recent_channels, 1) if mixer.value_mix is None else mixer.value_mix
    for letter, base, pair in (
        ("w", mixer.decay_base, mixer.decay),
        ("a", mixer.rate_base, mixer.rate),
        ("v", value_base, value_mix),
        ("g", None, mixer.gate),
    ):
        if base is not None:
            weights[f"{letter}0"] = base.view(1, 1, -1)
        weights |= {f"{letter}1": pair.down.weight.T, f"{letter}2": pair.up.weight.T}
    weights |= {
        "k_k": mixer.removal_scale.view(1, 1, -1),
        "k_a": mixer.replacement_scale.view(1, 1, -1),
        "r_k": mixer.bonus.view(mixer.num_heads, mixer.head_dim),
        "receptance.weight": mixer.query.weight,
        "key.weight": mixer.key.weight,
        "value.weight": mixer.value.weight,
        "output.weight": mixer.output.weight,
        **_norm("ln_x", mixer.head_norm),
    }
    if mixer.tuned is not None:
        if mixer.tuned.memory is not None:
            raise ConfigError("this format has no place for a tuned memory; tune states with tuning.features=0.")
        weights["time_state"] = mixer.tuned.initial["memory"].transpose(1, 2)
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
        check_replaceable(arguments.output)
        checkpoint = chosen_checkpoint(arguments.checkpoint)
        state = load_model_state(checkpoint)
        with rebuilding(checkpoint):
            check_model_nodes(state["config"])
            weights = rwkv_weights(model_from_checkpoint(state))
        save_tensors(arguments.output, weights)
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {len(weights)} tensors to {arguments.output}")
    return 0


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
