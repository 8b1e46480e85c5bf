"""StreetMath: questions whose exact answers follow from their words, and the authors' scoring."""

import json
import re
from pathlib import Path

import pytest

from longmix.data.synthetic.street_math import KINDS, LABELS, label_of, number_in, prompt_of, question

ROOT = next(folder for folder in Path(__file__).parents if (folder / "fixtures").is_dir())
SCORED = json.loads((ROOT / "fixtures/model_side/streetmath_scoring.json").read_text())


@pytest.mark.parametrize("case", SCORED, ids=lambda case: f"{case['text']} of {case['exact']}")
def test_scoring_is_the_authors(case):
    assert number_in(case["text"]) == case["number"]
    assert label_of(case["number"], case["exact"]) == case["label"]


def test_a_final_answer_comes_before_earlier_numbers():
    assert number_in("3 times 4 is 12. Final answer: about $-1,250.5 or so") == -1250.5
    assert [label_of(number, 10.0) for number in (10, 12, 16, 16.1, None)] == list(LABELS)


def worked_out(kind: str, text: str) -> float:
    """The answer that the words of a question give."""
    numbers = [float(found) for found in re.findall(r"\d+(?:\.\d+)?", text)]
    match kind:
        case "basket":
            return sum(count * price for count, price in zip(numbers[::2], numbers[1::2], strict=True))
        case "discount":
            return numbers[0] * (1 - numbers[1] / 100)
        case "tip":
            return numbers[1] * (1 + numbers[2] / 100) / numbers[0]
        case "tax":
            return numbers[0] * (1 + numbers[1] / 100)
        case "each":
            return numbers[1] / numbers[0]
        case _:
            return numbers[0] / numbers[1] * numbers[2]


@pytest.mark.parametrize("kind", KINDS)
def test_exact_answers_follow_from_the_words(kind):
    asked = [question(kind, 0, number) for number in range(40)]
    for one in asked:
        assert worked_out(kind, one.text) == pytest.approx(one.exact, rel=1e-9) and one.exact > 0
    assert len({one.text for one in asked}) == 40 and asked[3] == question(kind, 0, 3) != question(kind, 1, 3)


def test_a_prompt_shows_answers_of_other_questions():
    asked = question("each", 0, 5)
    prompt = prompt_of(asked, 2, seed=0)
    assert prompt.endswith(f"Question: {asked.text}\nFinal answer:") and prompt.count("Final answer: ") == 2
    for number, said in enumerate(re.findall(r"Final answer: (.*)\n", prompt)):
        exact = question("each", 1, number).exact
        assert float(said) == pytest.approx(exact, rel=0.06) and asked.text != question("each", 1, number).text
