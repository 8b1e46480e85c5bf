"""RULER's question answering: the documents of somebody else's questions, hidden among others of the same collection.

longmix ships no such collection. It reads files in the format of SQuAD (questions without an answer, as version 2 has
them, are left out) and of HotpotQA.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longmix.data.synthetic.ruler import Draft
from longmix.errors import DataError
from longmix.paths import user_path
from longmix.reading import read_bytes

ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class Question:
    """A question with its answers.

    Attributes:
        text: the question.
        answers: any of them is right.
        needed: numbers of the documents that hold the answer.
        near: numbers of documents that mislead first, such as those of the same article.
    """

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions:
    """A collection of questions and documents."""

    documents: Sequence[str]
    questions: Sequence[Question]

    def draft(self, random: np.random.Generator) -> Draft:
        """One question, whose documents lie among others in a random order."""
        one = self.questions[int(random.integers(len(self.questions)))]
        near = [one.near[n] for n in random.permutation(len(one.near)).tolist()]
        taken = {*one.needed, *near}
        far = [n for n in random.permutation(len(self.documents)).tolist() if n not in taken]
        misleading = [*near, *far]
        seed = int(random.integers(2**32))

        def context(pieces: int) -> str:
            chosen = [*one.needed, *misleading[:pieces]]
            order = np.random.default_rng(seed).permutation(len(chosen)).tolist()
            parts = (f"Document {n}:\n{self.documents[chosen[place]]}" for n, place in enumerate(order, 1))
            return "\n\n".join(parts)

        return Draft(
            f"{ASK}\n\nThe following are given documents.\n\n",
            f"\n\n{ASK}\n\nQuestion: {one.text} Answer:",
            context,
            one.answers,
            tokens=32,
            every=False,
            least=0,
            most=len(misleading),
        )


def read_squad(key: str, path: str) -> Questions:
    """The answerable questions of a file in the format of SQuAD; its documents are the paragraphs.

    Raises:
        DataError: it cannot be read, or has no such question.
    """
    return _read(key, path, "SQuAD", _squad)


def read_hotpotqa(key: str, path: str) -> Questions:
    """The questions of a file in the format of HotpotQA; its documents are titles with their sentences.

    Raises:
        DataError: it cannot be read, or has no question.
    """
    return _read(key, path, "HotpotQA", _hotpotqa)


def _read(key: str, path: str, form: str, understand: Callable[[Any], Questions]) -> Questions:
    file: Path = user_path(key, path)
    try:
        found = understand(json.loads(read_bytes(file)))
    except OSError as error:
        raise DataError(f"{key}: cannot read {path} ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{key}={path} is not in the format of {form}: {type(error).__name__}: {error}.") from error
    if not found.questions:
        raise DataError(f"{key}={path} has no question with an answer.")
    return found


def _squad(content: Mapping[str, Any]) -> Questions:
    documents: dict[str, int] = {}
    questions: list[Question] = []
    for article in content["data"]:
        numbers = [documents.setdefault(part["context"], len(documents)) for part in article["paragraphs"]]
        for number, part in zip(numbers, article["paragraphs"], strict=True):
            others = tuple(dict.fromkeys(other for other in numbers if other != number))
            for asked in part["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"] if answer["text"]))
                if answers and not asked.get("is_impossible", False):
                    questions.append(Question(asked["question"], answers, (number,), others))
    return Questions(list(documents), questions)


def _hotpotqa(content: Sequence[Mapping[str, Any]]) -> Questions:
    documents: dict[str, int] = {}
    questions: list[Question] = []
    for asked in content:
        texts = [f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]]
        numbers = tuple(documents.setdefault(text, len(documents)) for text in texts)
        if asked["answer"]:
            questions.append(Question(asked["question"], (asked["answer"],), numbers))
    return Questions(list(documents), questions)
