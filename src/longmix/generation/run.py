"""`generate(config)`: from a checkpoint and a prompt to text, as it comes."""

import dataclasses
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
from longmix.caches.cache import CacheKind
from longmix.caches.kinds import built, star_of
from longmix.checkpoints import reading
from longmix.checkpoints.store import final_name
from longmix.config import GenerateConfig, read
from longmix.console import is_gone
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError, DataError
from longmix.files import check_replaceable
from longmix.generation.decoding import Choosing, Continuation, Writing, check_ranges, write_on
from longmix.generation.draws import forked, key_of
from longmix.generation.memory import check_rows
from longmix.generation.questions import check_cache_words, draft_of, lookahead_of, question_ids, shortened
from longmix.generation.session import Session, check_compiles
from longmix.generation.standing import Standing, standing_rows
from longmix.generation.text import Row
from longmix.paths import check_file
from longmix.progress import tracked
from longmix.reading import LARGEST_TEXT_BYTES, read_up_to
from longmix.restore import Restored, restored_for
from longmix.wording import counted


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        continuations: of each row; rows of one prompt follow each other.
        ids: tokens of each row, prompt included.
        tokens_per_second: of all rows together, without reading the prompt.
        state_bytes: bytes of the state of all rows, without spare room in caches.
    """

    continuations: list[Continuation]
    ids: list[list[int]]
    tokens_per_second: float
    state_bytes: int

    @property
    def texts(self) -> list[str]:
        """Of each row, without its prompt."""
        return [row.text for row in self.continuations]


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
    if own.logprobs is not None:
        raise ConfigError("logprobs are written to a file; give output=FILE.jsonl too, or use Python.")
    return _generated(own, lambda: restored_for(own), shown=True)


def continued(config: GenerateConfig, restored: Restored) -> Generated:
    """Generate as `generate` does, with a loaded model and without printing.

    Args:
        config: without the words that name files: prompt_file, load, save, input and output.
        restored: the model.

    Raises:
        LongmixError: see `longmix.errors`.
    """
    return _generated(config, lambda: restored, shown=False)


def _generated(config: GenerateConfig, model: Callable[[], Restored], shown: bool) -> Generated:
    check_ranges(config)
    if config.input is not None:
        raise ConfigError("input needs output=FILE.jsonl, where the answers go.")
    prompts = given_prompts(config)
    if config.save is not None:
        check_file("save", config.save)
        check_replaceable(Path(config.save))
    cache = None if config.cache is None else built(config.cache)
    check_cache_words(config, cache)
    restored = model()
    if config.compile:
        check_compiles(restored.model)
    console = Console(stderr=True, quiet=not shown)
    choosing = Choosing.of(config, restored.tokenizer, restored.model.vocab_size)
    with restored.autocast(), allocation_errors("generating so many rows", "give fewer samples, or fewer prompts."):
        session, rows = _begun(config, restored, prompts, cache, console)
        began = time.perf_counter()
        _write(session, rows, choosing, shown)
        seconds, state_bytes = time.perf_counter() - began, session.state_bytes()
    produced = sum(row.row.count for row in rows)
    if config.load is not None and produced == 0:
        console.print("every text in the saved generation has ended; nothing was added", highlight=False)
    console.print(
        f"{counted(produced, 'token')} in {seconds:.2f} s ({produced / seconds:,.1f} tokens/s); "
        f"state {state_bytes / 2**20:.2f} MiB after {counted(session.length, 'token')}, of which a token reads "
        f"{session.read_bytes() / 2**20:.2f}; {session.spare_bytes() / 2**20:.2f} spare",
        highlight=False,
    )
    ids = [row.ids for row in rows]
    if config.save is not None:
        with restored.autocast(), allocation_errors("saving so many rows", "give fewer samples, or fewer prompts."):
            standing = session if len({row.row.count for row in rows}) == 1 else session.standing_at(ids)
        about = {"ids": ids, "prompts": [row.prompt for row in rows], "keys": [row.key for row in rows]}
        standing.save(Path(config.save), {**about, **identity(restored)})
        console.print(f"saved to {config.save}; load={config.save} goes on", highlight=False, markup=False)
    made = [row.continuation(choosing.logprobs is not None) for row in rows]
    return Generated(made, ids, produced / seconds, state_bytes)


def given_prompts(config: GenerateConfig) -> list[str]:
    """The texts of prompt or prompt_file; none with load.

    Raises:
        ConfigError: words that do not go together.
        DataError: the file is no UTF-8 text.
    """
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
            content = read_up_to(stream, LARGEST_TEXT_BYTES + 1)
        if len(content) > LARGEST_TEXT_BYTES:
            raise DataError(f"prompt_file={config.prompt_file} is longer than {LARGEST_TEXT_BYTES:,} bytes.")
        return [content.decode("utf-8")]
    except OSError as error:
        raise DataError(f"prompt_file={config.prompt_file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"prompt_file={config.prompt_file} is not UTF-8 text: {error}.") from error


def _begun(
    config: GenerateConfig, restored: Restored, prompts: list[str], cache: CacheKind | None, console: Console
) -> tuple[Session, list[Writing]]:
    """A session that has read the prompts or was loaded, and its rows."""
    samples = config.samples
    check_rows(restored, samples * max(1, len(prompts)), f"samples={samples}")
    if config.load is not None:
        session, standing = _loaded(config, restored, cache)
        check_rows(restored, samples * session.batch, f"samples={samples}")
    else:
        ids = [encoded(restored.tokenizer, prompt) for prompt in prompts]
        question, draft = question_ids(config, restored), draft_of(config, restored)
        session = Session(restored.model, len(ids), cache, star_of(config.prefill))
        session.reserve(max(map(len, ids)) + (config.max_tokens if samples == 1 else 0))
        began = time.perf_counter()
        given = [torch.tensor(row, device=restored.device) for row in ids]
        ids = [[*row, *question] for row in ids]
        standing = [Standing(row, len(row), key_of(config.seed or 0, row)) for row in ids]
        read, lookahead = shortened(config, draft, given), lookahead_of(config, draft, cache, given)
        session.prefill(read, torch.tensor(question, device=restored.device) if question else None, lookahead)
        seconds, count = time.perf_counter() - began, sum(map(len, read)) + len(read) * len(question)
        text = f"read {counted(count, 'token')} in {seconds:.2f} s ({count / seconds:,.0f} tokens/s)"
        console.print(text, highlight=False)
    rows = [
        Writing(
            list(one.ids),
            one.prompt,
            forked(one.key, sample),
            Row(restored.tokenizer, config.stop, one.ids, config.load is not None),
            config.max_tokens,
        )
        for one in standing
        for sample in range(samples)
    ]
    if samples > 1:
        session = session.fork(samples)
    session.reserve(config.max_tokens)
    if config.compile:
        console.print("the first two tokens are compiled for, which takes a minute or so", highlight=False)
        session.compile()
    return session, rows


def _loaded(config: GenerateConfig, restored: Restored, cache: CacheKind | None) -> tuple[Session, list[Standing]]:
    """A saved session and its rows.

    Raises:
        CheckpointError: the file is no saved generation of this model.
        ConfigError: it is of other weights or settings, or of another cache.
    """
    assert config.load is not None
    session, about = Session.load(Path(config.load), restored.model, restored.device, cache)
    own = identity(restored)
    about = {"weights": own["weights"], "states": own["states"], "mixer": {}, **about}  # earlier versions did not say
    if about["mixer"] != own["mixer"]:
        before = about["mixer"] or "those of the training"
        raise ConfigError(
            f"load={config.load} was saved with other settings of the mixer, {before}; give them as mixer.NAME=VALUE."
        )
    if {key: about.get(key) for key in own} != own:
        raise ConfigError(
            f"load={config.load} was saved with another checkpoint, or other weights or states of it; give those."
        )
    with reading(Path(config.load), "saved generation of this model"):
        rows = standing_rows(about, session, restored.tokenizer)
    if config.seed is not None:
        rows = [dataclasses.replace(row, key=key_of(config.seed, [row.key])) for row in rows]
    return session, rows


def identity(restored: Restored) -> dict[str, Any]:
    """What generated text depends on besides its words: digests of all weights and of the tokenizer, and changes."""
    return {
        "checkpoint": final_name(restored.checkpoint.name),
        "weights": restored.digest(),
        "states": restored.states,
        "tokenizer": restored.tokenizer.fingerprint(),
        "mixer": dict(restored.changes),
    }


def encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt, behind the separator that all documents were trained with, where there is one.

    Raises:
        ConfigError: there are none.
        DataError: it is no Unicode, or the tokenizer cannot write it.
    """
    try:
        tokens = [int(token) for token in tokenizer.encode(prompt)]
        if tokenizer.separator_id >= 0:
            return [tokenizer.separator_id, *tokens]
        if not tokens:
            raise ConfigError("prompt is empty, and this model knows nothing to begin with; give some tokens.")
        return tokens
    except UnicodeEncodeError as error:
        raise DataError(f"the prompt is not valid Unicode: {error}.") from error


def _write(session: Session, rows: list[Writing], choosing: Choosing, shown: bool) -> None:
    """Generate until every row is done or nobody reads any more; a lone row is shown as it comes."""
    alone = len(rows) == 1
    steps = write_on(session, rows, choosing, _show if alone and shown else None, read_last=True)
    limit = max(row.limit for row in rows)
    for _ in tracked(steps, counted(len(rows), "row"), limit, shown=shown and not alone):
        if shown and is_gone(sys.stdout):
            break
    for number, row in enumerate(rows, 1):
        rest = row.row.finish()
        if not shown:
            continue
        if not alone:
            print(f"--- {number}")
        _show(rest if alone else row.row.text)
        print()


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
