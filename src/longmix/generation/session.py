"""A model in the middle of some rows of text: what it remembers, and the scores of the next token.

One object serves all mixers and mixtures of them: a state per layer, of which nothing is known here but that tensors
begin with the batch. It can be saved and gone on with, and one row can be forked into many.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmix.aliases import path_now
from longmix.checkpoints import load_tensors, reading, save_tensors
from longmix.checkpoints.reading import check_weight
from longmix.model.backbone import LanguageModel

FORMAT, WITHOUT_DIGEST = 2, 1
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

    def standing_at(self, rows: Sequence[Sequence[int]]) -> "Session":
        """A session of the same rows that has read these tokens of each and nothing else.

        Rows advance together, so that one which ended early has read tokens that are not part of its text. What a mixer
        remembers cannot be taken back; the tokens are read again, from the first on.

        Args:
            rows: all tokens of each row.
        """
        session = Session(self.model, len(rows))
        device = self.model.head.weight.device
        session.prefill([torch.tensor(row, device=device) for row in rows])
        return session

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
        save_tensors(path, content)

    @classmethod
    def load(cls, path: Path, model: LanguageModel, device: torch.device) -> tuple["Session", dict[str, Any]]:
        """What `save` wrote, and its `about`; loading runs no code of the file's.

        Raises:
            CheckpointError: there is no such file, or it is damaged, of another format or of another model.
        """
        content = load_tensors(
            path, "saved generation", format_number=FORMAT, without_digest=WITHOUT_DIGEST, device=device
        )
        with reading(path, "saved generation of this model"):
            session = cls.__new__(cls)
            session.model, session.batch, session.length = model, content["batch"], content["length"]
            session.logits, about = content["logits"], content["about"]
            session._check_sizes()
            begun = model.init_state(session.batch)
            session.state = _Restorer(begun, session.batch).restored(content["state"], begun)
            if not isinstance(about, dict):
                raise ValueError("it does not say what it is of")
            session._check_goes_on(device)
        return session, about

    def _check_sizes(self) -> None:
        for name, number in (("batch", self.batch), ("length", self.length)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"its {name} is {number!r}")
        wanted = (self.batch, self.model.head.weight.shape[0])
        logits = self.logits
        check_weight("the scores", logits)
        if not (isinstance(logits, Tensor) and logits.is_floating_point() and tuple(logits.shape) == wanted):
            raise ValueError(f"its scores do not have the shape {list(wanted)}")

    def _check_goes_on(self, device: torch.device) -> None:
        """One more token on a copy: sizes that do not fit each other show at once, whatever the mixers remember."""
        self.fork(1).step(torch.zeros(self.batch, dtype=torch.int64, device=device))


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
    return {"class": _kind(state), "fields": {name: _plain(part) for name, part in named.items()}}


class _Restorer:
    """Puts states together again from what `_plain` made of them.

    Args:
        begun: the model's state before the first token, which says of which classes a state is. No other class is
            looked for, so that a file cannot name one.
        batch: rows, with which every tensor of a state begins.
    """

    def __init__(self, begun: Any, batch: int) -> None:
        self._kinds: dict[str, type] = {}
        self._batch = batch
        self._collect(begun)

    def _collect(self, state: Any) -> None:
        if is_dataclass(state) and not isinstance(state, type):
            parts = [getattr(state, field.name) for field in fields(state)]
        elif isinstance(state, list | tuple):
            parts = list(state)
        else:
            return
        if type(state) not in (list, tuple):
            self._kinds[_kind(state)] = type(state)
        for part in parts:
            self._collect(part)

    def restored(self, plain: Any, like: Any) -> Any:
        """A state from its plain form.

        Args:
            plain: as it was read.
            like: the state before the first token in its place; None if there is none to compare with.

        Raises:
            ValueError: it is of another class, or a tensor is of another kind.
        """
        if isinstance(plain, Tensor):
            self._check_tensor(plain, like)
            return plain
        if isinstance(plain, list):
            if isinstance(like, list | tuple) and len(like) != len(plain) and not hasattr(like, "_fields"):
                raise ValueError(f"it has {len(plain)} states in the place of {len(like)}")
            others = list(like) if isinstance(like, list | tuple) and len(like) == len(plain) else [None] * len(plain)
            return [self.restored(part, other) for part, other in zip(plain, others, strict=True)]
        if isinstance(plain, dict):
            kind = self._kinds.get(path_now(plain["class"]))
            if kind is None or (is_dataclass(like) and type(like) is not kind):
                raise ValueError(f"it names {plain['class']}, which is no state of this model")
            parts = plain["fields"].items()
            return kind(**{name: self.restored(part, getattr(like, name, None)) for name, part in parts})
        if like is not None and plain is not None and type(plain) is not type(like):
            raise ValueError(f"it holds {plain!r} in the place of a {type(like).__name__}")
        return plain

    def _check_tensor(self, found: Tensor, like: Any) -> None:
        wrong = found.layout != torch.strided or found.is_meta or found.is_quantized
        wrong = wrong or found.ndim < 1 or found.shape[0] != self._batch
        if isinstance(like, Tensor):
            wrong = wrong or found.ndim != like.ndim or found.is_floating_point() != like.is_floating_point()
        if wrong:
            raise ValueError(f"it holds a tensor of shape {list(found.shape)} that is no state of this model")


def _kind(state: Any) -> str:
    return f"{type(state).__module__}.{type(state).__qualname__}"
