"""The provenance of a result: checkpoint, data, settings and machine; and the file name that follows from it."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from longmix.config import Choice
from longmix.data.training_data import TrainingData
from longmix.files import sha256_of_file, sha256_of_json
from longmix.restore import Restored

DIGEST_LETTERS = 8
"""Hex digits in a file's name: among a thousand results in a folder, two collide in one of 8,000 folders."""

LONGEST_LABEL = 60
"""The most letters of the data's name in a file's name."""

IRRELEVANT = (
    *("cache_dir", "num_workers", "validation_tokens", "local_shards", "order"),
    *("packing", "max_document_tokens", "long_documents", "long_document_visits", "document_mask", "positions_go_on"),
)
"""Settings of data that do not change the tokens of a split."""


def model_facts(restored: Restored, states: str | None) -> dict[str, Any]:
    """The evaluated weights: `checkpoint`, its `weights` (a digest), `step`, `states`, `precision`, `mixer` if changed.

    `averaged` is there for weights=ema.

    Args:
        restored: the model.
        states: file or folder of the states that documents begin from, if any.
    """
    return {
        "checkpoint": str(restored.checkpoint),
        "weights": restored.digest(),
        **({} if restored.weights == "trained" else {"averaged": restored.weights}),
        "step": restored.step,
        "trained_seq_len": restored.config.seq_len,
        **({"mixer": dict(restored.changes)} if restored.changes else {}),
        "states": None if states is None else _states_facts(Path(states)),
        "precision": restored.precision,
        "device": torch.cuda.get_device_name() if restored.device.type == "cuda" else "CPU",
    }


def _states_facts(path: Path) -> dict[str, str]:
    file = path / "states.pt" if path.is_dir() else path
    return {"file": str(file), "sha256": sha256_of_file(file)}


def data_facts(data: TrainingData, split: str, is_own: bool) -> dict[str, Any]:
    """The data that were read: `corpus`, `data_fingerprint`, `own_data`, `tokenizer`, `split` and `split_tokens`.

    Args:
        data: what the task read.
        split: which part of it.
        is_own: the data are those of the checkpoint.
    """
    content = data.content(split)
    return {
        "corpus": data.label,
        "data_fingerprint": sha256_of_json(content),
        "own_data": is_own,
        "tokenizer": data.tokenizer.fingerprint(),
        "split": split,
        "split_tokens": content.get("tokens"),
    }


def is_own(given: Choice | None, trained: Choice | None) -> bool:
    """Whether the word `data` means the data that the checkpoint was trained on."""
    return given is None or _relevant(given) == _relevant(trained)


def _relevant(choice: Choice | None) -> dict[str, object]:
    entries = {} if choice is None else choice.entries
    return {name: value for name, value in entries.items() if name not in IRRELEVANT}


def now() -> str:
    """The time in UTC, as ISO 8601 has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def file_name(task: str, facts: dict[str, Any]) -> str:
    """A name that is the same for the same result and differs where data, states, split, weights or settings do."""
    fixed = {
        key: facts.get(key) for key in ("weights", "precision", "device", "data_fingerprint", "tokenizer", "split")
    }
    fixed |= {"mixer": facts["mixer"]} if "mixer" in facts else {}
    states = facts["states"] and facts["states"]["sha256"]
    data = [_short(str(facts["corpus"])), facts["split"]] if facts.get("corpus") else []
    mark = sha256_of_json([task, fixed, states, facts["settings"]])[:DIGEST_LETTERS]
    return "_".join([task, *data, f"step{facts['step']}", mark])


def _short(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", label, flags=re.ASCII).strip("-.")[:LONGEST_LABEL] or "data"
