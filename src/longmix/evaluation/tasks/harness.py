"""A model of longmix as a model of the lm-evaluation-harness; importing this module needs `lm_eval`."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from longmix.evaluation.prefill import pieces_of_hidden
from longmix.evaluation.subject import Subject
from longmix.generation.draws import forked, key_of, uniforms
from longmix.generation.sampling import Sampling, check_finite
from longmix.generation.session import Session
from longmix.generation.text import Row
from longmix.model.head import IGNORE_INDEX
from longmix.progress import tracked

logger = logging.getLogger(__name__)

Scored = tuple[float, bool]
"""Log probability of a continuation in nats, and whether greedy choice gives it."""


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of requests.

    Every text is a document: the separator comes first, as in training, then the text's own tokens.

    Args:
        subject: the model and its tokenizer.
        max_length: tokens of the longest context; longer ones lose their beginning, and the log says how many did.
        seed: of what is drawn where a task asks for sampling. A text depends on it, on its context and on how often
            the same context was asked before, and not on the batch.
    """

    def __init__(self, subject: Subject, max_length: int, seed: int = 0) -> None:
        super().__init__()
        self.subject, self.max_length = subject, max_length
        self.seed = seed
        self.asked: Counter[int] = Counter()

    @property
    def eot_token_id(self) -> int:
        """The first id that ends a text."""
        return self.subject.restored.tokenizer.end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The separator, which begins every text."""
        return self.subject.restored.tokenizer.separator_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, without a separator."""
        return self.subject.restored.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Scored]:
        pairs = []
        for _, context, continuation in requests:
            begun = context if context[:1] == [self.prefix_token_id] else [self.prefix_token_id, *context]
            pairs.append((begun, continuation))
        self._say_truncated(sum(len(a) + len(b) > self.max_length + 1 for a, b in pairs), len(pairs))
        return self._scored(pairs)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, in windows of `max_length`; the last one reaches back as far as that."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._scored(pairs), strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts until a stop, an id that ends a text, or the task's number of tokens."""
        groups: dict[str, list[int]] = defaultdict(list)
        settings = [normalize_gen_kwargs(request.args[1]) for request in requests]
        for number, wanted in enumerate(settings):
            groups[repr(sorted(wanted.items()))].append(number)
        texts = [""] * len(requests)
        for group in groups.values():
            contexts = [self.tok_encode(requests[number].args[0]) for number in group]
            for number, text in zip(group, self._continued(contexts, settings[group[0]]), strict=True):
                texts[number] = text
        return texts

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """Scores of continuations after their contexts. The longest come first: rows of a batch then differ little.

        Rows are padded behind: no mixer that is evaluated lets later tokens change what comes before them.
        """
        rows = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        counts = [min(len(continuation), len(row) - 1) for (_, continuation), row in zip(pairs, rows, strict=True)]
        results: list[Scored] = [(0.0, True)] * len(rows)
        order = sorted((number for number in range(len(rows)) if counts[number] > 0), key=lambda n: -len(rows[n]))
        for batch in tracked(list(self._batches(order, rows)), "requests"):
            tokens = torch.full((len(batch), len(rows[batch[0]]) - 1), self.prefix_token_id)
            targets = torch.full_like(tokens, IGNORE_INDEX)
            for index, number in enumerate(batch):
                row, end = torch.tensor(rows[number]), len(rows[number]) - 1
                tokens[index, :end] = row[:-1]
                targets[index, end - counts[number] : end] = row[-counts[number] :]
            scored = self._sums(tokens.to(self.subject.restored.device), targets.to(self.subject.restored.device))
            for number, result in zip(batch, scored, strict=True):
                results[number] = result
        return results

    def _batches(self, order: list[int], rows: list[list[int]]) -> Iterator[list[int]]:
        """Rows that pass the model at once, beginning with the longest of them."""
        start = 0
        while start < len(order):
            end = start + self.subject.rows(len(rows[order[start]]))
            yield order[start:end]
            start = end

    def _sums(self, tokens: Tensor, targets: Tensor) -> list[Scored]:
        """Sums over each row's targets; both [B, T]."""
        total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        missed = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        read = 0
        for hidden in pieces_of_hidden(self.subject, tokens):
            wanted = targets[:, read : read + hidden.shape[1]]
            row, position = torch.nonzero(wanted != IGNORE_INDEX, as_tuple=True)
            with torch.no_grad(), self.subject.restored.autocast():
                scores = self.subject.model.logits(hidden[row, position]).log_softmax(-1)
            answers = wanted[row, position]
            total.index_add_(0, row, scores.gather(1, answers[:, None])[:, 0].double())
            missed.index_add_(0, row, (scores.argmax(-1) != answers).long())
            read += hidden.shape[1]
        return [(likely, wrong == 0) for likely, wrong in zip(total.tolist(), missed.tolist(), strict=True)]

    def _continued(self, contexts: list[list[int]], wanted: Any) -> list[str]:
        """The continuations of contexts with the same stops and limit."""
        steps = min(wanted["max_gen_toks"], self.max_length - 1)
        room = self.max_length - steps
        self._say_truncated(sum(len(context) + 1 > room for context in contexts), len(contexts))
        sampling = Sampling(
            temperature=wanted.get("temperature", 0.0) if wanted["do_sample"] else 0.0,
            top_k=wanted.get("top_k"),
            top_p=wanted.get("top_p", 1.0),
        )
        prompts = [[self.prefix_token_id, *context][-room:] for context in contexts]
        at_once = self.subject.rows(self.max_length)
        texts: list[str] = []
        for start in tracked(range(0, len(prompts), at_once), "generating"):
            texts += self._rows(prompts[start : start + at_once], sampling, wanted["until"], steps)
        return texts

    def _rows(self, prompts: list[list[int]], sampling: Sampling, until: list[str], steps: int) -> list[str]:
        restored = self.subject.restored
        session = Session(restored.model, len(prompts))
        rows = [Row(restored.tokenizer, [stop for stop in until if stop]) for _ in prompts]
        keys = [self._key(prompt) for prompt in prompts]
        with restored.autocast():
            session.prefill([torch.tensor(prompt, device=restored.device) for prompt in prompts])
            for step in range(steps):
                assert session.logits is not None
                check_finite(session.logits)
                numbers = uniforms(keys, [len(prompt) + step for prompt in prompts])
                tokens = sampling.draw(session.logits, numbers)
                for row, token in zip(rows, tokens.tolist(), strict=True):
                    if not row.ended:
                        row.take(token)
                if step + 1 == steps or all(row.ended for row in rows):
                    break
                session.step(tokens)
        for row in rows:
            row.finish()
        return [row.text for row in rows]

    def _key(self, prompt: list[int]) -> int:
        """The key of a context's random numbers; tasks may ask for several samples of one."""
        key = key_of(self.seed, prompt)
        self.asked[key] += 1
        return forked(key, self.asked[key] - 1)

    def _say_truncated(self, count: int, total: int) -> None:
        if count:
            logger.warning(
                "%d of %d contexts are longer than task.lm_eval.max_length=%d and lose their beginning",
                *(count, total, self.max_length),
            )
