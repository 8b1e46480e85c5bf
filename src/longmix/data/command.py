"""`prepare_splits(config)`: what `prepare.py` does."""

import logging
import time
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from longmix import config as configuration
from longmix.config import build
from longmix.data.datamodule import TokenData
from longmix.data.preparation import Preparation
from longmix.errors import ConfigError

ANY_LENGTH = 65536
"""Token files do not depend on it; a synthetic task has room in so many."""


def prepare_splits(config: DictConfig) -> list[dict[str, Any]]:
    """Make the token files that `config` describes and are not there, and print where they lie.

    Returns:
        For each token file its split, folder, documents, tokens, bytes and shards.

    Raises:
        LongmixError: see `longmix.errors`.
    """
    words = configuration.resolved(config)
    configuration.check_keys(words, configuration.PrepareConfig)
    preparation = Preparation(words["shard_tokens"], words["workers"])
    tokenizer = build(words["tokenizer"], "tokenizer")
    data: TokenData = build(words["data"], "data", tokenizer=tokenizer, seq_len=ANY_LENGTH, batch_size=1, seed=0)
    data.preparation = preparation
    splits = list(data.splits) if words["splits"] is None else words["splits"]
    unknown = [split for split in splits if split not in data.splits]
    if unknown or not splits:
        raise ConfigError(f"splits={splits} must be among those of the data: {', '.join(data.splits)}.")
    logging.getLogger("longmix").setLevel(logging.INFO)
    began, files = time.monotonic(), []
    for split in splits:
        for token_file in data.token_files(split):
            counts = {name: token_file.manifest[name] for name in ("documents", "tokens", "bytes")}
            files.append({"split": split, **counts, "shards": len(token_file.shards), "folder": str(token_file.folder)})
    _print(files, time.monotonic() - began)
    return files


def _print(files: list[dict[str, Any]], seconds: float) -> None:
    tokens = sum(file["tokens"] for file in files)
    table = Table(title=f"{tokens:,} tokens in {seconds:,.1f} s")
    for column in ("split", "documents", "tokens", "bytes", "shards"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for file in files:
        table.add_row(file["split"], *(f"{file[name]:,}" for name in ("documents", "tokens", "bytes", "shards")))
    console = Console()
    console.print(table)
    for file in files:
        console.print(file["folder"], highlight=False, markup=False, soft_wrap=True)
