"""A model in the middle of some rows of text: what it remembers, and the scores of the next token.

One object serves all mixers and mixtures of them: a state per layer, of which nothing is known here but that tensors
begin with the batch. It can be saved and gone on with, and one row can be forked into many.
"""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.checkpoints import load_tensors, reading
from longmix.errors import CheckpointError
from longmix.files import replace_file
from longmix.model.backbone import LanguageModel

FORMAT = 1
PREFILL_TOKENS = 4096
"""Tokens of a prompt, over all rows, that pass the model at once: what bounds its memory."""


class Session:
    """Rows of text that go on.

    Args:
        model: in evaluation mode.
        batch: how many rows.

    Attributes:
        state: the model's, after every token so far.
        logits: float32 [B, V], scores of each row's next token; None before the first.
        length: tokens so far, padding included.
    """

    def __init__(self, model: LanguageModel, batch: int) -> None:
        self.model = model
        self.state: Any = model.init_state(batch)
        self.logits: Tensor | None = None
        self.length = 0
        self.batch = batch

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor]) -> None:
        """Read prompts, int64 [T] each and not empty; a shorter one waits behind padding in a document of its own."""
        assert self.length == 0 and len(prompts) == self.batch
        longest = max(map(len, prompts))
        device = prompts[0].device
        tokens = torch.zeros(self.batch, longest, dtype=torch.int64, device=device)
        ids = torch.zeros(self.batch, longest, dtype=torch.int32, device=device)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = prompt
            ids[row, longest - len(prompt) :] = 1
        padded = any(len(prompt) < longest for prompt in prompts)
        step = max(1, PREFILL_TOKENS // self.batch)
        for start in range(0, longest, step):
            piece = slice(start, start + step)
            self._advance(tokens[:, piece], ids[:, piece] if padded else None)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> None:
        """Go on by one token a row, int64 [B]."""
        self._advance(tokens[:, None], None)

    def _advance(self, tokens: Tensor, ids: Tensor | None) -> None:
        output = self.model(tokens, state=self.state, document_ids=ids)
        self.state = output.state
        self.logits = self.model.logits(output.hidden[:, -1])
        self.length += tokens.shape[1]

    def fork(self, count: int) -> "Session":
        """Every row `count` times, as rows of a new session that go on independently of these."""
        forked = Session.__new__(Session)
        forked.model, forked.length, forked.batch = self.model, self.length, self.batch * count
        forked.state = mapped(self.state, lambda x: x.repeat_interleave(count, 0))
        forked.logits = None if self.logits is None else self.logits.repeat_interleave(count, 0)
        return forked

    def state_bytes(self) -> int:
        """Bytes of all tensors that are remembered."""
        return sum(x.nbytes for x in _tensors(self.state))

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write everything needed to go on, and `about`, which must be of tensors, numbers and texts.

        Raises:
            StorageError: the file cannot be written.
        """
        content = {
            "format": FORMAT,
            "state": _plain(self.state),
            "logits": self.logits,
            "length": self.length,
            "batch": self.batch,
            "about": about,
        }
        replace_file(path, lambda temporary: torch.save(content, temporary))

    @classmethod
    def load(cls, path: Path, model: LanguageModel, device: torch.device) -> tuple["Session", dict[str, Any]]:
        """What `save` wrote, and its `about`; loading runs no code of the file's.

        Raises:
            CheckpointError: there is no such file, or it is damaged or of another format.
        """
        with reading(path, "saved generation"):
            content = load_tensors(path, FORMAT, device)
            session = cls.__new__(cls)
            session.model, session.state = model, _restored(content["state"])
            session.logits, session.length, session.batch = content["logits"], content["length"], content["batch"]
            return session, content["about"]


def mapped(state: Any, change: Any) -> Any:
    """A state with `change` applied to every tensor in it."""
    if isinstance(state, Tensor):
        return change(state)
    if is_dataclass(state) and not isinstance(state, type):
        return type(state)(**{field.name: mapped(getattr(state, field.name), change) for field in fields(state)})
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(mapped(part, change) for part in state))
    if isinstance(state, list | tuple):
        return type(state)(mapped(part, change) for part in state)
    if isinstance(state, dict):
        return {key: mapped(part, change) for key, part in state.items()}
    return state


def _tensors(state: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    mapped(state, found.append)
    return iter(found)


def _plain(state: Any) -> Any:
    """A state as lists, dicts, tensors and numbers; an object becomes its class's name and its fields."""
    if is_dataclass(state) and not isinstance(state, type):
        named = {field.name: getattr(state, field.name) for field in fields(state)}
    elif isinstance(state, tuple) and hasattr(state, "_asdict"):
        named = state._asdict()
    elif isinstance(state, list | tuple):
        return [_plain(part) for part in state]
    else:
        return state
    kind = f"{type(state).__module__}.{type(state).__qualname__}"
    return {"class": kind, "fields": {name: _plain(part) for name, part in named.items()}}


def _restored(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_restored(part) for part in plain]
    if not isinstance(plain, dict):
        return plain
    module, _, name = plain["class"].rpartition(".")
    if module.split(".")[0] not in ("longmix", "longmix_kernels"):
        raise CheckpointError(f"a saved generation names {plain['class']}, which is not part of longmix.")
    kind = getattr(importlib.import_module(module), name)
    if not (is_dataclass(kind) or hasattr(kind, "_fields")):
        raise CheckpointError(f"a saved generation names {plain['class']}, which is not a state.")
    return kind(**{name: _restored(part) for name, part in plain["fields"].items()})
