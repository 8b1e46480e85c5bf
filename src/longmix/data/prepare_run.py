"""`prepare_splits(config)`: what `prepare.py` does."""

import logging
import shlex
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longmix.command_line.program import program
from longmix.config import PrepareConfig, read
from longmix.data.prepared import find_splits
from longmix.data.text_data import TextData
from longmix.data.tokens.placed import PlacedTokens
from longmix.data.tokens.preparation import Preparation
from longmix.data.training_data import build_data
from longmix.errors import ConfigError, DataError
from longmix.invocation import Invocation
from longmix.wording import counted

OWN_WORDS = ("shard_tokens", "workers", "splits")
"""Words of prepare.py that train.py does not take."""

ANY_LENGTH = 65536
"""A `seq_len` for data that are not trained on: token files do not depend on it, and every synthetic task fits."""


def prepare_splits(config: DictConfig, invocation: Invocation | None = None) -> list[dict[str, Any]]:
    """Make the missing token files of `config`, and print where all of them lie.

    Args:
        config: may have interpolations.
        invocation: how the command was asked for; its words are part of the command that is printed for training.

    Returns:
        For each token file the user's name of its corpus, its split, folder, documents, tokens, bytes and shards.

    Raises:
        LongmixError: see `longmix.errors`.
    """
    own = read(PrepareConfig, config)
    preparation = Preparation(own.shard_tokens, own.workers)
    tokenizer = own.tokenizer.build()
    data = build_data(own.data, tokenizer, seq_len=ANY_LENGTH, batch_size=1, seed=0)
    splits = list(data.splits) if own.splits is None else own.splits
    unknown = [split for split in splits if split not in data.splits]
    if unknown or not splits:
        raise ConfigError(f"splits={splits} must be among those of the data: {', '.join(data.splits)}.")
    if not isinstance(data, TextData):
        raise DataError(f"examples of {data.source} are made when they are needed; there is nothing to prepare.")
    data.preparation = preparation
    logging.getLogger("longmix").setLevel(logging.INFO)
    began, files = time.monotonic(), []
    for split in splits:
        for corpus, token_file in zip(data.part_names, data.token_files(split), strict=True):
            counts = {name: token_file.manifest[name] for name in ("documents", "tokens", "bytes")}
            stored = {"shards": len(token_file.shards), "folder": str(token_file.folder)}
            files.append({"corpus": corpus, "split": split, **counts, **stored})
    _print(files, time.monotonic() - began)
    if {"train", "validation"} <= {file["split"] for file in files} or own.splits is not None:
        in_place = isinstance(data.token_files(splits[0])[0], PlacedTokens)
        _print_uses(None if in_place else Path(files[0]["folder"]).parent, invocation)
    else:
        text = "to train on them, a validation split is needed: give data.corpus.validation_fraction above 0."
        Console().print(text, highlight=False)
    return files


def _print(files: list[dict[str, Any]], seconds: float) -> None:
    tokens = sum(file["tokens"] for file in files)
    table = Table(title=f"{counted(tokens, 'token')} in {seconds:,.1f} s")
    for column in ("corpus", "split", "documents", "tokens", "bytes", "shards"):
        table.add_column(column, justify="left" if column in ("corpus", "split") else "right")
    for file in files:
        table.add_row(
            escape(file["corpus"]),
            file["split"],
            *(f"{file[name]:,}" for name in ("documents", "tokens")),
            f"{file['bytes']:,}" if file["bytes"] else "unknown",
            f"{file['shards']:,}",
        )
    console = Console()
    console.print(table)
    for file in files:
        console.print(file["folder"], highlight=False, markup=False, soft_wrap=True)


def _print_uses(cache_dir: Path | None, invocation: Invocation | None) -> None:
    """Print the commands that train on these token files; None where they are not of longmix's own format."""
    console = Console()
    if invocation is not None:
        words = [word for word in invocation.words if word.partition("=")[0] not in OWN_WORDS]
        line = f"{program('train')} {shlex.join(words)}".rstrip()
        console.print(f"to train on them:  {line}", highlight=False, markup=False, soft_wrap=True)
    if cache_dir is None:
        return
    try:
        find_splits(str(cache_dir))
    except DataError:  # several corpora share the folder
        return
    words = ["data=prepared", f"data.path={cache_dir}", "tokenizer=prepared"]
    line = f"{program('train')} {shlex.join(words)}"
    console.print(f"without the texts: {line}", highlight=False, markup=False, soft_wrap=True)
