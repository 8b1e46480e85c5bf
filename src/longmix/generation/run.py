"""`generate(config)`: from a checkpoint and a prompt to text, as it comes."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from longmix.allocation import allocation_errors
from longmix.checkpoints import reading
from longmix.checkpoints.store import final_name
from longmix.config import GenerateConfig, read
from longmix.console import is_gone
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.files import check_replaceable
from longmix.generation.sampling import Sampling
from longmix.generation.session import Session
from longmix.generation.text import Row
from longmix.paths import check_file
from longmix.progress import tracked
from longmix.reading import LARGEST_TEXT_BYTES
from longmix.restore import Restored, restored_for
from longmix.wording import counted


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        texts: of each row, without its prompt; rows of one prompt follow each other.
        ids: tokens of each row, prompt included.
        tokens_per_second: of all rows together, without reading the prompt.
        state_bytes: bytes of the state of all rows.
    """

    texts: list[str]
    ids: list[list[int]]
    tokens_per_second: float
    state_bytes: int


def generate(config: DictConfig) -> Generated:
    """Generate text from the prompt of `config`.

    A single row is written to the standard output as it comes, several of them at the end; how fast it went is said on
    the standard error. Once nobody reads the output any more, as behind `| head`, no more is generated. Every row is
    saved as it stands at its own end. Loaded, it goes on as if it had never stopped: beyond a stop, and not beyond the
    end of its text.

    Raises:
        LongmixError: see `longmix.errors`.
    """
    own = read(GenerateConfig, config)
    return _generated(own, lambda: restored_for(own), shown=True)


def continued(config: GenerateConfig, restored: Restored) -> Generated:
    """Generate as `generate` does, with a loaded model and without printing.

    Args:
        config: without the words that name files: prompt_file, load and save.
        restored: the model.

    Raises:
        LongmixError: see `longmix.errors`.
    """
    return _generated(config, lambda: restored, shown=False)


def _generated(config: GenerateConfig, model: Callable[[], Restored], shown: bool) -> Generated:
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p)
    if "" in config.stop:
        raise ConfigError("stop has an empty text, which every text ends with; leave it out.")
    prompts = _prompts(config)
    if config.save is not None:
        check_file("save", config.save)
        check_replaceable(Path(config.save))
    restored = model()
    console = Console(stderr=True, quiet=not shown)
    generator = torch.Generator().manual_seed(config.seed or 0)
    with restored.autocast(), allocation_errors("generating so many rows", "give fewer samples, or fewer prompts."):
        session, ids = _begun(config, restored, prompts, generator, console)
        rows = [Row(restored.tokenizer, config.stop, before, config.load is not None) for before in ids]
        began = time.perf_counter()
        _write_on(session, rows, ids, sampling, generator, config.max_tokens, shown)
        seconds, state_bytes = time.perf_counter() - began, session.state_bytes()
    produced = sum(row.count for row in rows)
    if config.load is not None and produced == 0:
        console.print("every text in the saved generation has ended; nothing was added", highlight=False)
    console.print(
        f"{counted(produced, 'token')} in {seconds:.2f} s ({produced / seconds:,.1f} tokens/s); "
        f"state {state_bytes / 2**20:.2f} MiB after {counted(session.length, 'token')}",
        highlight=False,
    )
    if config.save is not None:
        with restored.autocast(), allocation_errors("saving so many rows", "give fewer samples, or fewer prompts."):
            standing = session if len({row.count for row in rows}) == 1 else session.standing_at(ids)
        standing.save(Path(config.save), {"ids": ids, "generator": generator.get_state(), **_identity(restored)})
        console.print(f"saved to {config.save}; load={config.save} goes on", highlight=False, markup=False)
    return Generated([row.text for row in rows], ids, produced / seconds, state_bytes)


def _prompts(config: GenerateConfig) -> list[str]:
    given = config.prompt if isinstance(config.prompt, list) else [config.prompt]
    if config.load is not None:
        if config.prompt_file is not None or given != [""]:
            raise ConfigError("load goes on with the text that was saved; leave prompt and prompt_file out.")
        return []
    if config.prompt_file is None:
        if not given:
            raise ConfigError("prompt is an empty list; give a text, or a list of texts.")
        return [str(prompt) for prompt in given]
    if given != [""]:
        raise ConfigError("give prompt or prompt_file, not both.")
    try:
        with Path(config.prompt_file).open("rb") as stream:  # which may be a pipe
            content = stream.read(LARGEST_TEXT_BYTES + 1)
        if len(content) > LARGEST_TEXT_BYTES:
            raise DataError(f"prompt_file={config.prompt_file} is longer than {LARGEST_TEXT_BYTES:,} bytes.")
        return [content.decode("utf-8")]
    except OSError as error:
        raise DataError(f"prompt_file={config.prompt_file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"prompt_file={config.prompt_file} is not UTF-8 text: {error}.") from error


def _begun(
    config: GenerateConfig, restored: Restored, prompts: list[str], generator: torch.Generator, console: Console
) -> tuple[Session, list[list[int]]]:
    """A session that has read the prompts or was loaded, and the tokens of its rows."""
    if config.load is not None:
        session, about = Session.load(Path(config.load), restored.model, restored.device)
        own = _identity(restored)
        about = {"weights": own["weights"], "mixer": {}, **about}  # earlier versions did not say
        if about["mixer"] != own["mixer"]:
            before = about["mixer"] or "those of the training"
            raise ConfigError(
                f"load={config.load} was saved with other settings of the mixer, {before}; give them as "
                "mixer.NAME=VALUE."
            )
        if {key: about.get(key) for key in own} != own:
            raise ConfigError(f"load={config.load} was saved with another checkpoint; give that one.")
        with reading(Path(config.load), "saved generation of this model"):
            if config.seed is None:
                generator.set_state(about["generator"].cpu())
            ids = _saved_ids(about, session, restored.tokenizer)
    else:
        ids = [_encoded(restored.tokenizer, prompt) for prompt in prompts]
        session = Session(restored.model, len(ids))
        began = time.perf_counter()
        session.prefill([torch.tensor(row, device=restored.device) for row in ids])
        seconds, count = time.perf_counter() - began, sum(map(len, ids))
        text = f"read {counted(count, 'token')} in {seconds:.2f} s ({count / seconds:,.0f} tokens/s)"
        console.print(text, highlight=False)
    samples = config.samples
    return session.fork(samples), [list(row) for row in ids for _ in range(samples)]


def _saved_ids(about: dict[str, Any], session: Session, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of a saved generation's rows; call inside `reading`.

    Raises:
        ValueError: they are not tokens, or of other rows.
    """
    ids = about["ids"]
    known = range(max(tokenizer.vocab_size, session.model.vocab_size))
    if not isinstance(ids, list) or len(ids) != session.batch:
        raise ValueError(f"it does not hold the tokens of {counted(session.batch, 'row')}")
    for row in ids:
        if (
            not isinstance(row, list)
            or len(row) > session.length
            or not all(type(i) is int and i in known for i in row)
        ):
            raise ValueError("a row holds what is no token of the model, or more tokens than were read")
    return ids


def _identity(restored: Restored) -> dict[str, Any]:
    return {
        "checkpoint": final_name(restored.checkpoint.name),
        "weights": restored.digest(),
        "tokenizer": restored.tokenizer.fingerprint(),
        "mixer": dict(restored.changes),
    }


def _encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt, behind the separator that all documents were trained with, where there is one."""
    try:
        tokens = [int(token) for token in tokenizer.encode(prompt)]
        if tokenizer.separator_id >= 0:
            return [tokenizer.separator_id, *tokens]
        if not tokens:
            raise ConfigError("prompt is empty, and this model knows nothing to begin with; give some tokens.")
        return tokens
    except UnicodeEncodeError as error:
        raise DataError(f"the prompt is not valid Unicode: {error}.") from error


def _write_on(
    session: Session,
    rows: list[Row],
    ids: list[list[int]],
    sampling: Sampling,
    generator: torch.Generator,
    max_tokens: int,
    shown: bool,
) -> None:
    """Generate until every row has ended or has `max_tokens`; extends `rows` and `ids`."""
    alone = len(rows) == 1
    for _ in tracked(range(max_tokens), counted(len(rows), "row"), shown=shown and not alone):
        if all(row.ended for row in rows) or (shown and is_gone(sys.stdout)):
            break
        assert session.logits is not None
        tokens = sampling.draw(session.logits, generator)
        for row, own, token in zip(rows, ids, tokens.tolist(), strict=True):
            if not row.ended:
                own.append(token)
                _show(row.take(token), alone and shown)
        session.step(tokens)
    for number, row in enumerate(rows, 1):
        rest = row.finish()
        if not shown:
            continue
        if not alone:
            print(f"--- {number}")
        _show(rest if alone else row.text, True)
        print()


def _show(text: str, now: bool) -> None:
    if now:
        sys.stdout.write(text)
        sys.stdout.flush()
