"""From a checkpoint to a folder of the Hugging Face libraries."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.checkpoints import chosen_checkpoint
from longmix.checkpoints.contents import Weights, load_model_state, rebuilding
from longmix.config import StoredConfig
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.world import WorldTokenizer
from longmix.errors import ConfigError
from longmix.files import atomic_directory, check_folder, write_json
from longmix.interop import rwkv
from longmix.interop.huggingface import llama
from longmix.interop.huggingface.described import Described
from longmix.interop.huggingface.families import ALONE, FAMILIES, write_folder
from longmix.interop.huggingface.folder import FORMAT, OWN_FILE, WEIGHTS, require_transformers
from longmix.interop.huggingface.seal import MARK, sealed
from longmix.interop.huggingface.specials import VOCABULARY, write_specials
from longmix.interop.huggingface.tokenizer import huggingface_tokenizer
from longmix.model.backbone import LanguageModel
from longmix.model.build import model_over_checkpoint
from longmix.model.sharing_conversion import dense_state
from longmix.wording import counted

KINDS = ("auto", "longmix", "llama", *FAMILIES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CARD = """---
library_name: transformers
tags: [longmix]
---
# {name}

A language model of type `{model_type}`: {parameters:,} parameters, {vocab_size:,} token ids, trained with
longmix for {steps} at {seq_len:,} tokens of context.

```python
{register}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}"){without}
```

`{own_file}` holds the training configuration; `python -m longmix.interop.huggingface import {name} CHECKPOINT` makes a
checkpoint of longmix again.
"""
_FLA = "import fla  # makes the type known; pip install flash-linear-attention; it runs on a GPU\n"
REGISTERS = {
    "longmix": "import longmix.interop.huggingface  # makes the type known; pip install 'longmix[interop]'\n",
    "rwkv7": _FLA,
    "gated_deltanet": _FLA,
}
"""Lines of the card that make a type known to transformers."""


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        model_type: of `config.json`.
        parameters: how many; a tied head counts once.
        dtype: of the weights.
    """

    model_type: str
    parameters: int
    dtype: str


def export(
    checkpoint: Path,
    folder: Path,
    kind: str = "auto",
    dtype: str = "float32",
    force: bool = False,
    weights_of: Weights = "trained",
) -> Exported:
    """Write a checkpoint's model, tokenizer and description to a folder that appears whole or not at all.

    Args:
        checkpoint: folder of a run or checkpoint.
        folder: to write; a name that ends in .pth is a file of RWKV-7's authors' format, without a tokenizer.
        kind: "llama" for a type of Llama's family, or one of `FAMILIES`; "longmix" for ours, which holds any model;
            "auto" for one that transformers runs alone, where one can hold the model.
        dtype: of the weights: "float32" as they were trained, "bfloat16" or "float16".
        force: replace the folder if it is there.
        weights_of: "trained", or "ema" for their average over the steps of a run with loop.ema_decay.

    Raises:
        ConfigError: the folder is there, a word is wrong, or a setting has no place in the type asked for.
        CheckpointError: there is no such checkpoint, or it is damaged.
        StorageError: the folder cannot be written; what was there before stays.
    """
    require_transformers()
    if kind not in KINDS or dtype not in DTYPES:
        raise ConfigError(f"--as is one of {', '.join(KINDS)}, and --dtype one of {', '.join(DTYPES)}.")
    if folder.suffix == ".pth":
        return _as_file(checkpoint, folder, kind, dtype, force, weights_of)
    _check_target(folder, force)
    check_folder(folder.parent)
    path = chosen_checkpoint(checkpoint)
    state = load_model_state(path, weights_of)
    with rebuilding(path):
        _check_trusted(state["config"])
        dense = dense_state(state)  # what layers share has no place in other types, and what they make of it has
        theirs = model_over_checkpoint(dense), StoredConfig.of(dense["config"])
        tokenizer = tokenizer_from_state(state["tokenizer"])
        described = _as_family(*theirs, kind) or _as_llama(*theirs, kind)
        model, stored = theirs if described else (model_over_checkpoint(state), StoredConfig.of(state["config"]))
    config, weights = described or _as_longmix(model, stored)
    fast = None if isinstance(tokenizer, WorldTokenizer) else huggingface_tokenizer(tokenizer)
    write_specials(config, tokenizer)
    for key, value in MARK.items():
        setattr(config, key, value)
    about: dict[str, Any] = {key: state[key] for key in ("step", "config", "tokenizer", "versions") if key in state}
    done = Exported(config.model_type, model.parameter_counts()["total"], dtype)
    with atomic_directory(folder) as temporary:
        if isinstance(config, Described):
            write_folder(temporary, config, weights, DTYPES[dtype])
        else:
            _save(_filled(config, weights, DTYPES[dtype]), temporary)
        if fast is None:
            (temporary / VOCABULARY).write_bytes(str(tokenizer.state()["vocabulary"]).encode())
        else:
            fast.save_pretrained(temporary)
        write_json(temporary / OWN_FILE, sealed(temporary, {"format": FORMAT, **about}))
        card = _card(done, folder.name, model, about, fast is not None)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        replaced = folder.with_name(f".{folder.name}.replaced")
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
    shutil.rmtree(replaced, ignore_errors=True)
    return done


def _as_file(checkpoint: Path, path: Path, kind: str, dtype: str, force: bool, weights_of: Weights) -> Exported:
    """RWKV-7 in one file, as its authors' code reads it."""
    if kind not in ("auto", "rwkv7"):
        raise ConfigError(
            f"{path.name} is the name of a file, which RWKV-7 alone has; leave --as out, or name a folder."
        )
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already; give another name, or --force to replace it.")
    weights = rwkv.write_file(checkpoint, path, DTYPES[dtype], weights_of)
    own = sum(weight.numel() for name, weight in weights.items() if name not in rwkv.PLACEHOLDERS)
    return Exported("rwkv7", own, dtype)


def _check_target(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not force:
        raise ConfigError(f"{folder} is there already; give another folder, or --force to replace it.")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a folder of a model, so --force does not replace it; give another one.")


def _check_trusted(stored: Mapping[str, Any]) -> None:
    from longmix.interop.huggingface.model import trusted

    trusted(stored)


def _as_family(model: LanguageModel, config: StoredConfig, kind: str) -> tuple[Any, dict[str, Tensor]] | None:
    """The model as one of `FAMILIES`; None where "auto" finds none that runs alone."""
    for name in ALONE if kind == "auto" else [kind] if kind in FAMILIES else []:
        family = FAMILIES[name]
        try:
            described = family.described(model, config)
        except ConfigError:
            if kind == "auto":
                continue
            raise
        sizes = {"vocab_size": model.embedding.num_embeddings, "max_position_embeddings": config.seq_len}
        theirs = family.read({**described, **sizes})
        weights = model.state_dict()
        if model.head.weight is model.embedding.weight:
            del weights["head.weight"]
        return theirs, family.to_theirs(weights, theirs)
    return None


def _as_llama(model: LanguageModel, config: StoredConfig, kind: str) -> tuple[Any, dict[str, Tensor]] | None:
    """The model as a type of Llama's family; None where "auto" leaves it to ours."""
    from transformers import AutoConfig

    if kind not in ("auto", "llama"):
        return None
    try:
        described = llama.described(model, config)
    except ConfigError:
        if kind == "auto":
            return None
        raise
    sizes: dict[str, Any] = {"vocab_size": model.embedding.num_embeddings, "max_position_embeddings": config.seq_len}
    theirs = AutoConfig.for_model(**described, **sizes)
    return theirs, llama.their_weights(model.state_dict(), theirs.model_type)


def _as_longmix(model: LanguageModel, config: StoredConfig) -> tuple[Any, dict[str, Tensor]]:
    from longmix.interop.huggingface.model import LongmixConfig

    return LongmixConfig.of(model, config), {f"model.{name}": weight for name, weight in model.state_dict().items()}


def _filled(config: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """transformers' model with these weights; tensors that a mixer always keeps in float32 stay so."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    held = model.state_dict()
    model.load_state_dict({name: weight.to(held[name].dtype) for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    return model


def _save(model: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how a full disk shows itself
        raise OSError(f"{WEIGHTS}: {error}") from error


def _card(done: Exported, name: str, model: LanguageModel, about: dict[str, Any], has_tokenizer: bool) -> str:
    return CARD.format(
        name=name,
        model_type=done.model_type,
        parameters=done.parameters,
        vocab_size=model.embedding.num_embeddings,
        steps=counted(about["step"], "step"),
        seq_len=about["config"]["seq_len"],
        without="" if has_tokenizer else f"  # not with {VOCABULARY}, which RWKV's own code reads",
        register=REGISTERS.get(done.model_type, ""),
        own_file=OWN_FILE,
    )
