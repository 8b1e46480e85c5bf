"""From a folder of the Hugging Face libraries to a checkpoint that evaluate.py, generate.py and train.py take."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.aliases import renewed
from longmix.checkpoints import CheckpointStore
from longmix.checkpoints.contents import check_model_state, rebuilding
from longmix.config import Choice, ModelConfig, Plain, StoredConfig, plain
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.tokenizers import ByteTokenizer, Tokenizer, TokenizerFile
from longmix.data.tokens.world import WorldFile
from longmix.errors import CheckpointError, ConfigError, DataError
from longmix.files import check_folder
from longmix.interop import rwkv
from longmix.interop.huggingface import llama
from longmix.interop.huggingface.described import Described
from longmix.interop.huggingface.families import FAMILIES
from longmix.interop.huggingface.folder import (
    OWN_FILE,
    check_weights,
    read_json,
    read_own,
    read_weights,
    require_transformers,
)
from longmix.interop.huggingface.seal import OWN_HASH, check_seal
from longmix.interop.huggingface.specials import BYTES, TOKENIZER, VOCABULARIES, VOCABULARY, read_tokenizer
from longmix.model.build import build_model
from longmix.model.tuned_states_file import tune_states
from longmix.reading import shortened

KINDS: dict[str, tuple[type, str | None, tuple[str, ...]]] = {
    "bytes": (ByteTokenizer, None, ()),
    "world": (WorldFile, VOCABULARY, ("vocab_size",)),
    "library": (TokenizerFile, TOKENIZER, ("separator", "missing_bytes", "end_ids")),
}
"""Of a tokenizer's state: the class that reads such a tokenizer, its file if it has one, and its further settings."""


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        checkpoint: the folder that was written.
        model_type: of `config.json`.
        has_data: whether the folder said on which data the model was trained; without, evaluate.py needs `data=`.
        tokenizer: of the checkpoint.
    """

    checkpoint: Path
    model_type: str
    has_data: bool
    tokenizer: Tokenizer


def import_folder(
    folder: Path,
    target: Path,
    separator: str | None = None,
    missing_bytes: str | None = None,
    tokenizer: Path | None = None,
) -> Imported:
    """Write a checkpoint of the model in a folder; its weights are float32, which holds the shorter types exactly.

    Args:
        folder: of type longmix, of Llama's family, or of one of `FAMILIES`; or a `.pth` file of RWKV-7's authors.
        target: folder for the checkpoint, as a run has it.
        separator: the token that starts each document; None takes what the folder begins texts with, else ends them.
        missing_bytes: what happens to characters that the tokenizer has no tokens for, "refuse" or "replace"; None
            refuses them.
        tokenizer: a `tokenizer.json`, a vocabulary of RWKV's kind (`.txt`), the folder of one, or `BYTES`; None takes
            the one beside the model.

    Raises:
        CheckpointError: the folder is missing, damaged, or not what it says.
        ConfigError: it is of a type, or has a setting, that longmix has not; or the target holds a checkpoint.
        DataError: there is no tokenizer, or none that longmix reads.
        StorageError: the target cannot be written.
    """
    require_transformers()
    store = CheckpointStore(target / "checkpoints")
    if store.latest() is not None:
        raise ConfigError(f"{target} already holds a checkpoint; give another folder.")
    check_folder(store.folder)
    words = {"--separator": separator, "--missing-bytes": missing_bytes, "--tokenizer": tokenizer}
    with rebuilding(folder):
        if folder.suffix == ".pth":
            theirs, state = _of_file(folder, words)
        else:
            check_seal(folder)
            theirs = _read_config(folder)
            own = read_own(folder)
            state = _foreign(folder, theirs, words) if own is None else _exported(folder, theirs, own, words)
            state["model"] = _weights(folder, theirs, ModelConfig.of(state["config"]))
        made = tokenizer_from_state(state["tokenizer"], str(folder))
        if made.vocab_size > theirs.vocab_size:
            raise DataError(
                f"the tokenizer of {folder} has {made.vocab_size:,} ids, and the model {theirs.vocab_size:,}."
            )
        check_model_state(state)
    source = {"imported": theirs.model_type, "tokens": 0, "validation": {}}
    checkpoint = store.save(state, source)
    return Imported(checkpoint, theirs.model_type, state["config"]["data"] is not None, made)


def _of_file(path: Path, words: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What is known of the model in a file of RWKV-7's authors, and the state of its checkpoint."""
    config, weights = rwkv.read_file(path)
    sizes = {"hidden_size": config.model.number("d_model"), "num_hidden_layers": config.model.number("num_layers")}
    sizes |= {"vocab_size": len(weights["embedding.weight"]), "max_position_embeddings": rwkv.CONTEXT}
    theirs = Described.of(sizes, {"model_type": "rwkv7"})
    return theirs, {**_begun(path.parent, config, theirs, words), "model": weights}


def _foreign(folder: Path, theirs: Any, words: Mapping[str, Any]) -> dict[str, Any]:
    """The state, without weights, of a checkpoint of another project's folder."""
    return _begun(folder, _model_config(theirs), theirs, words)


def _begun(folder: Path, config: ModelConfig, theirs: Any, words: Mapping[str, Any]) -> dict[str, Any]:
    tokenizer = _tokenizer(folder, theirs, words)
    stored = plain(_stored(config, tokenizer.state(), theirs)) | {"batch_size": 1}
    return {"step": 0, "config": stored, "tokenizer": tokenizer.state()}


def _tokenizer(folder: Path, theirs: Any, words: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `--tokenizer` names, which may be `BYTES`, or that lies in the folder."""
    given = words["--tokenizer"]
    place = folder if given is None else given
    if place.is_dir():
        lists = [] if (place / TOKENIZER).exists() else sorted(place.glob(VOCABULARIES))
        place = lists[0] if len(lists) == 1 else place / TOKENIZER
    of_bytes = given is not None and str(given) == BYTES and not place.exists()
    if place.suffix != ".txt" and not of_bytes:
        separator, missing_bytes = words["--separator"], words["--missing-bytes"] or "refuse"
        return read_tokenizer(place.parent, theirs, separator, missing_bytes, place.name)
    for word in ("--separator", "--missing-bytes"):
        if words[word] is not None:
            raise ConfigError(f"{place} has a token for every byte, and id 0 between documents; leave {word} out.")
    return ByteTokenizer() if of_bytes else WorldFile(str(place), theirs.vocab_size)


def _exported(folder: Path, theirs: Any, own: dict[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """The state, without weights, of a checkpoint that longmix exported."""
    for word, given in words.items():
        if given is not None:
            raise ConfigError(f"{folder / OWN_FILE} holds the tokenizer as it was; leave {word} out.")
    _check_same(folder, theirs, own["config"])
    return {key: value for key, value in own.items() if key not in ("format", "files", OWN_HASH)}


def _read_config(folder: Path) -> Any:
    """What a `config.json` says, of a type that can be read here; transformers' object where that knows the type."""
    from transformers import AutoConfig

    given = read_json(folder / "config.json")
    kind = given.get("model_type")
    if kind in FAMILIES:
        return FAMILIES[kind].read(given)
    known = ["longmix", *llama.ARCHITECTURES, *FAMILIES]
    if kind not in known:
        raise ConfigError(
            f"{folder} holds a model of type {shortened(repr(kind))}; the types that can be read are "
            f"{', '.join(known)}."
        )
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # checks of transformers raise whatever they like
        reason = shortened(error)
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {type(error).__name__}: {reason}") from error


def _model_config(theirs: Any) -> ModelConfig:
    if theirs.model_type in FAMILIES:
        return FAMILIES[theirs.model_type].model_config(theirs)
    if theirs.model_type != "longmix":
        return llama.read_config(theirs)
    from longmix.interop.huggingface.model import trusted

    return trusted({"model": theirs.model, "mixer": theirs.mixer})


def _check_same(folder: Path, theirs: Any, stored: Plain) -> None:
    """Refuse a `longmix.json` that lies beside another model than its own."""
    from longmix.interop.huggingface.model import trusted

    config = trusted(stored)
    if theirs.model_type == "longmix":
        ours, said = plain(config), renewed({"model": theirs.model, "mixer": theirs.mixer})
        different = [key for key in ours if ours[key] != said[key]]
    else:
        with torch.device("meta"):
            family = FAMILIES.get(theirs.model_type, llama)
            described = family.described(build_model(config, theirs.vocab_size), config)
        different = [key for key, value in described.items() if getattr(theirs, key, None) != value]
    if different:
        raise CheckpointError(
            f"{folder} holds another model than its {OWN_FILE} says: {', '.join(different)} differ. Delete {OWN_FILE} "
            "to read the model as config.json describes it."
        )


def _stored(config: ModelConfig, tokenizer: Plain, theirs: Any) -> StoredConfig:
    """The configuration of an imported checkpoint; a foreign model has no data."""
    kind, path, known = KINDS[tokenizer["kind"]]
    options: Plain = {key: tokenizer[key] for key in known if key in tokenizer}
    options |= {} if path is None else {"path": path}
    file = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **options}
    return StoredConfig(
        model=config.model,
        mixer=config.mixer,
        data=None,
        tokenizer=Choice.of("tokenizer", file),
        seq_len=theirs.max_position_embeddings,
        seed=0,
    )


def _weights(folder: Path, theirs: Any, config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = build_model(config, theirs.vocab_size)
        if getattr(theirs, "tuned_features", None) is not None:
            tune_states(model, theirs.tuned_features)
    weights = read_weights(folder)
    if theirs.model_type == "longmix":
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    elif theirs.model_type in FAMILIES:
        weights = FAMILIES[theirs.model_type].to_ours(weights, theirs)
    else:
        weights = llama.renamed_weights(weights, theirs)
    needed = model.state_dict()
    tied = model.head.weight is model.embedding.weight
    if tied:
        _drop_same_head(folder, weights)
        del needed["head.weight"]
    check_weights(folder, weights, needed)
    found = {name: weights[name].to(needed[name].dtype) for name in needed}
    return {**found, "head.weight": found["embedding.weight"]} if tied else found


def _drop_same_head(folder: Path, weights: dict[str, Tensor]) -> None:
    """A tied head is written once by transformers, and twice by others."""
    head = weights.pop("head.weight", None)
    if head is not None and not torch.equal(head, weights.get("embedding.weight", head)):
        raise CheckpointError(f"{folder} says that head and embedding are one matrix, and holds two different ones.")
