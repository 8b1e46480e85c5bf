"""Reads contexts of any length in bounded memory; the lengths and texts of evaluations by length."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longmix.batch import Batch, documents_of
from longmix.data.text_data import TextData
from longmix.data.tokens.token_files import TokenFile
from longmix.errors import ConfigError
from longmix.evaluation.subject import TOKENS_AT_ONCE, Subject


def context_lengths_of(subject: Subject, factors: list[float], key: str) -> list[int]:
    """The lengths of the word `seq_len`, or the trained one times each of `factors`; shortest first.

    Args:
        subject: what is evaluated.
        factors: multiples of the trained length.
        key: where they stand in the configuration.

    Raises:
        ConfigError: there is none, or one of them is not above 0.
    """
    if subject.config.seq_len is not None:
        return subject.seq_lens()
    if not factors or min(factors) <= 0:
        raise ConfigError(f"{key}={factors} must be a list of multiples of the trained length, each above 0.")
    return sorted({max(1, round(factor * subject.trained_seq_len)) for factor in factors})


def text_of(subject: Subject, task: str) -> TokenFile:
    """The tokens of the subject's split, for a task that needs text.

    Raises:
        ConfigError: the data are a synthetic task.
        DataError: there is no such split.
    """
    if not isinstance(subject.data, TextData):
        raise ConfigError(
            f"task={task} reads text, and the data are a synthetic task; use task=accuracy with several seq_len."
        )
    return subject.data.token_file(subject.split)


def pieces_of_hidden(subject: Subject, tokens: Tensor) -> Iterator[Tensor]:
    """Hidden vectors at each position of some rows, piece by piece, without gradients. Each row is one document.

    Rows of more than `TOKENS_AT_ONCE` tokens together pass in pieces, with the model's state between them, so that
    nothing but the state grows with their length.

    Args:
        subject: holds the model.
        tokens: int64 [B, T], on the model's device.

    Yields:
        [B, t, D], one after the other until all T positions are there; `LanguageModel.logits` turns it into scores.
    """
    model, rows = subject.model, len(tokens)
    whole = tokens.numel() <= TOKENS_AT_ONCE
    state = None if whole else model.init_state(rows)
    for piece in tokens.split(tokens.shape[1] if whole else max(1, TOKENS_AT_ONCE // rows), 1):
        with torch.no_grad(), subject.restored.autocast():
            output = model(piece, state=state)
        state = output.state
        yield output.hidden


def read_rows(subject: Subject, batch: Batch) -> None:
    """Pass rows with their documents through the model, for what watches it; in pieces as `pieces_of_hidden` does.

    Args:
        subject: holds the model.
        batch: on the model's device.
    """
    model, tokens, ids = subject.model, batch["tokens"], batch["document_ids"]
    rows, length = tokens.shape
    if tokens.numel() <= TOKENS_AT_ONCE:
        with torch.no_grad(), subject.restored.autocast():
            model(tokens, **documents_of(batch))
        return
    state: Any = model.init_state(rows)
    width = max(1, TOKENS_AT_ONCE // rows)
    for start in range(0, length, width):
        piece = slice(start, start + width)
        with torch.no_grad(), subject.restored.autocast():
            state = model(tokens[:, piece], state=state, document_ids=None if ids is None else ids[:, piece]).state


def last_hidden(subject: Subject, tokens: Tensor, count: int) -> Tensor:
    """The last `count` positions of `pieces_of_hidden`, [B, count, D]."""
    left, kept = tokens.shape[1], []
    for hidden in pieces_of_hidden(subject, tokens):
        left -= hidden.shape[1]
        if left < count:
            kept.append(hidden[:, -(count - left) :])
    return torch.cat(kept, 1)
