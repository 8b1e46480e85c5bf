"""Old paths of classes, as earlier checkpoints, run folders and exports name them.

A name that was ever written stays readable: whoever moves or renames a class adds its old path here.
"""

from collections.abc import Callable
from typing import Any

DEEPEST = 50
"""The most levels of a configuration that are searched; longmix's have about ten."""

PARTS = "longmix.mixers.parts"
TASKS = "longmix.evaluation.tasks"


def _head_decay(node: dict[str, Any]) -> str:
    kinds = {"alibi": "lightning.Lightning", "retention": "retention.Retention", "learned": "simple_gla.SimpleGLA"}
    return f"longmix.mixers.{kinds.get(node.get('decay', 'alibi'), 'lightning.Lightning')}"


def _gated_memory(node: dict[str, Any]) -> str:
    kinds = {"none": "deltanet.DeltaNet", "channel": "kda.KDA", "sigmoid": "gla.GLA"}
    return f"longmix.mixers.{kinds.get(node.get('decay', 'head'), 'gated_deltanet.GatedDeltaNet')}"


BY_SETTINGS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "longmix.mixers.decayed.Decayed": (f"{PARTS}.head_decay.HeadDecay", _head_decay),
    "longmix.mixers.deltanet.GatedDelta": (f"{PARTS}.gated_memory.GatedMemory", _gated_memory),
}
"""Classes that became several: the one that can be any of them, and which it is by a node's settings."""

CLASSES = {
    "longmix.mixers.mlstm.MLSTM": "longmix.mixers.mlstm_tfla.MLSTMTFLA",
    "longmix.mixers.sparse_flash.HashAttention": "longmix.mixers.sparse_flash.SparseFlash",
    "longmix.mixers.sparse_flash.DropAttention": "longmix.mixers.sparse_flash_drop.SparseFlashDrop",
    "longmix.data.corpora.Sotu": "longmix.data.corpora.sotu.Sotu",
    "longmix.data.corpora.HubDataset": "longmix.data.corpora.hub.HubDataset",
    "longmix.data.tokenizers.BpeTokenizer": "longmix.data.tokens.bpe.BpeTokenizer",
    "longmix.data.tokens.tokenizers.BpeTokenizer": "longmix.data.tokens.bpe.BpeTokenizer",
    "longmix.analysis.attention.attention": f"{TASKS}.attention.Attention",
    "longmix.analysis.decode_cost.decode_cost": f"{TASKS}.decode_cost.DecodeCost",
    "longmix.analysis.states.states": f"{TASKS}.states.States",
    "longmix.analysis.task.causality": f"{TASKS}.causality.Causality",
    "longmix.evaluation.accuracy.accuracy": f"{TASKS}.accuracy.Accuracy",
    "longmix.evaluation.by_position.loss_by_position": f"{TASKS}.loss.Loss",
    "longmix.evaluation.context_lengths.context_lengths": f"{TASKS}.context_lengths.ContextLengths",
    "longmix.evaluation.lm_eval.lm_eval": f"{TASKS}.lm_eval.LMEval",
    "longmix.evaluation.needle.needle": f"{TASKS}.needle.Needle",
}
"""Old path of a class, or of the function that it was, and its path now."""

MODULES = {
    "longmix.data.datamodule": "longmix.data.text_data",
    "longmix.data.corpora": "longmix.data.corpora.files",
    "longmix.data.needle": "longmix.data.synthetic.needle",
    "longmix.data.synthetic": "longmix.data.synthetic.base",
    "longmix.data.synthetic_tasks": "longmix.data.synthetic.tasks",
    "longmix.data.tokenizers": "longmix.data.tokens.tokenizers",
    "longmix.data.variable_tracking": "longmix.data.synthetic.variable_tracking",
}
"""Old path of a module whose other classes kept their names, and its path now."""


def path_now(path: str) -> str:
    """The path of a class that may be known by an old one."""
    if path in BY_SETTINGS:
        return BY_SETTINGS[path][0]
    module, _, name = path.rpartition(".")
    return CLASSES.get(path) or (f"{MODULES[module]}.{name}" if module in MODULES else path)


def renewed(value: Any, levels: int = DEEPEST) -> Any:
    """A configuration as this version writes it: the paths at `_target_`, in all its levels, are those of today."""
    if levels and isinstance(value, list):
        return [renewed(item, levels - 1) for item in value]
    if not levels or not isinstance(value, dict):
        return value
    new = {key: renewed(item, levels - 1) for key, item in value.items()}
    target = new.get("_target_")
    if isinstance(target, str):
        new["_target_"] = BY_SETTINGS[target][1](new) if target in BY_SETTINGS else path_now(target)
    return new
