"""`answer(config)`: continuations of many prompts to a file, in batches of rows of similar length."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from longmix.allocation import allocation_errors
from longmix.caches.cache import CacheKind
from longmix.caches.kinds import built, star_of
from longmix.caches.star import Star
from longmix.config import GenerateConfig
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError, StorageError
from longmix.files import check_replaceable
from longmix.generation.answer_file import AnswerFile
from longmix.generation.decoding import TokenScore, Writing, check_ranges, write_on
from longmix.generation.draws import forked, key_of
from longmix.generation.memory import check_rows
from longmix.generation.questions import check_cache_words
from longmix.generation.requests import Prepared, prepared, requests_of
from longmix.generation.session import Session, check_compiles
from longmix.generation.text import Row, content_of
from longmix.locks import try_lock
from longmix.paths import check_file
from longmix.progress import steps_bar
from longmix.restore import Restored, restored_for
from longmix.wording import counted


@dataclass(frozen=True)
class Answered:
    """What was done.

    Attributes:
        prompts: that were answered now.
        before: prompts whose answers stood in the file.
        tokens: generated now.
        seconds: for reading prompts and generating.
    """

    prompts: int
    before: int
    tokens: int
    seconds: float


def answer(config: GenerateConfig, restored: Restored | None = None) -> Answered:
    """Continue each prompt of `input`, or of `prompt` or `prompt_file`, and write the answers to `output`.

    What a batch has answered is in the file before the next one begins, so that an interrupted call can be made again.
    An answer does not depend on the batch that it was made in, but for rounding.

    Args:
        config: with `output`.
        restored: the model; None loads the one that `config` names, and says on the standard error what was done.

    Raises:
        LongmixError: see `longmix.errors`.
    """
    assert config.output is not None
    check_ranges(config)
    if config.load is not None or config.save is not None:
        raise ConfigError("output is for answers to prompts; leave load and save out, or output.")
    if config.question is not None or config.draft is not None or config.shorten is not None:
        raise ConfigError(
            "question, draft and shorten are for prompts without output; write questions into the prompts."
        )
    check_file("output", config.output)
    path = Path(config.output)
    check_replaceable(path)
    requests = requests_of(config)
    cache = None if config.cache is None else built(config.cache)
    check_cache_words(config, cache)
    console = Console(stderr=True, quiet=restored is not None)
    restored = restored_for(config) if restored is None else restored
    if config.compile:
        check_compiles(restored.model)
    lock = try_lock(path.with_name(f".{path.name}.lock"))
    if lock is None:
        raise StorageError(f"output={path} is being written by another process; wait for it, or give another file.")
    try:
        star = star_of(config.prefill)
        done = _answered(config, prepared(requests, restored, cache, star), restored, (cache, star), path)
    finally:
        lock.release(remove=True)
    rate = done.tokens / done.seconds if done.seconds else 0.0
    stood = f"; {counted(done.before, 'prompt')} had been answered before" if done.before else ""
    console.print(
        f"{counted(done.prompts, 'prompt')} answered with {counted(done.tokens, 'token')} in {done.seconds:.2f} s "
        f"({rate:,.1f} tokens/s){stood}; {path} holds the answers",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return done


def _answered(
    config: GenerateConfig,
    requests: list[Prepared],
    restored: Restored,
    reading: tuple[CacheKind | None, Star | None],
    path: Path,
) -> Answered:
    wanted = {one.request.index: (one.digest, one.samples) for one in requests}
    file = AnswerFile(path, wanted)
    left = [one for one in requests if one.request.index not in file.done]
    began, tokens = time.perf_counter(), 0
    cure = "give a smaller batch_tokens, or fewer samples."
    with steps_bar("prompts", len(left)) as advance:
        for batch in batches(left, config.batch_tokens):
            with restored.autocast(), allocation_errors("generating so many rows", cure):
                answers = _continued(batch, restored, *reading)
            file.add(answers)
            tokens += sum(one["tokens"] for one in answers)
            for _ in batch:
                advance()
    seconds = time.perf_counter() - began
    file.sort()
    return Answered(len(left), len(file.done), tokens, seconds)


def batches(requests: Sequence[Prepared], most_tokens: int) -> Iterator[list[Prepared]]:
    """Requests that are continued side by side: with the same words for choosing tokens, and of similar length.

    The longest come first, so that a lack of memory shows at once.

    Args:
        requests: to divide.
        most_tokens: of all rows of a batch, each as long as the longest can become; a longer request is alone.
    """
    groups: dict[tuple[str, int], list[Prepared]] = {}
    for one in requests:
        groups.setdefault((repr(one.choosing), one.samples), []).append(one)
    for (_, samples), group in groups.items():
        batch: list[Prepared] = []
        longest = 0
        for one in sorted(group, key=lambda one: (-one.longest, one.request.index)):
            if batch and (len(batch) + 1) * samples * longest > most_tokens:
                yield batch
                batch = []
            batch.append(one)
            longest = batch[0].longest
        yield batch


@torch.no_grad()
def _continued(
    batch: list[Prepared], restored: Restored, cache: CacheKind | None, star: Star | None
) -> list[dict[str, Any]]:
    """The answers to a batch, those of a prompt after each other."""
    samples, choosing = batch[0].samples, batch[0].choosing
    check_rows(restored, samples * len(batch), f"samples={samples}")
    session = Session(restored.model, len(batch), cache, star)
    longest, most = max(len(one.ids) for one in batch), max(one.request.config.max_tokens for one in batch)
    session.reserve(longest + (most if samples == 1 else 0))
    session.prefill([torch.tensor(one.ids, device=restored.device) for one in batch])
    if samples > 1:
        session = session.fork(samples)
        session.reserve(most)
    if batch[0].request.config.compile:
        session.compile()
    rows = [_row(one, sample, restored.tokenizer) for one in batch for sample in range(samples)]
    for _ in write_on(session, rows, choosing):
        pass
    for row in rows:
        row.row.finish()
    pairs = [(one, sample) for one in batch for sample in range(samples)]
    return [_answer(*pair, row, restored.tokenizer) for pair, row in zip(pairs, rows, strict=True)]


def _row(one: Prepared, sample: int, tokenizer: Tokenizer) -> Writing:
    config = one.request.config
    key = forked(key_of(config.seed or 0, one.ids), sample)
    return Writing(list(one.ids), len(one.ids), key, Row(tokenizer, config.stop, one.ids), config.max_tokens)


def _answer(one: Prepared, sample: int, row: Writing, tokenizer: Tokenizer) -> dict[str, Any]:
    """A line of the output."""
    made = row.continuation(one.choosing.logprobs is not None)
    found: dict[str, Any] = {"index": one.request.index, "sample": sample}
    if one.request.identifier is not None:
        found["id"] = one.request.identifier
    found |= {"text": made.text, "finish_reason": made.finish_reason}
    found |= {"prompt_tokens": len(one.ids), "tokens": len(made.tokens), "request": one.digest}
    if made.logprobs is not None:
        found["logprobs"] = [_score(score, tokenizer) for score in made.logprobs]
    return found


def _score(score: TokenScore, tokenizer: Tokenizer) -> dict[str, Any]:
    top = [_likely(token, logprob, tokenizer) for token, logprob in score.top]
    return {**_likely(score.token, score.logprob, tokenizer), "top": top}


def _likely(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"token": token, "text": content_of(tokenizer, token).decode(errors="replace"), "logprob": logprob}
