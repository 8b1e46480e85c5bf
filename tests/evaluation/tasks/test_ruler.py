"""`task=ruler`: what the thirteen kinds of questions are made of, how they are scored, and whole evaluations."""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import image

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.data.corpora.sotu import Sotu
from longmix.data.synthetic.ruler import KINDS, NOISE, Draft, FrequentWords, Material, inserted
from longmix.data.synthetic.ruler_questions import read_hotpotqa, read_squad
from longmix.data.synthetic.ruler_words import ADJECTIVES, NOUNS
from longmix.data.tokens.bpe import BpeTokenizer
from longmix.data.tokens.preparation import prepare
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError, DataError
from longmix.evaluation.run import evaluate
from longmix.evaluation.tasks import ruler
from longmix.evaluation.tasks.ruler import NAMES, Maker, most_that_fit
from longmix.model.build import model_from_checkpoint

LENGTH = 4096
NUMBER, UUID = r"\d{7}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
ENDINGS = {
    "niah_single_1": (1, NUMBER, r"The special magic number for \w+-\w+ mentioned in the provided text is"),
    "niah_single_2": (1, NUMBER, r"The special magic number for \w+-\w+ mentioned in the provided text is"),
    "niah_single_3": (1, UUID, r"The special magic uuid for \w+-\w+ mentioned in the provided text is"),
    "niah_multikey_1": (1, NUMBER, r"The special magic number for \w+-\w+ mentioned in the provided text is"),
    "niah_multikey_2": (1, NUMBER, r"The special magic number for \w+-\w+ mentioned in the provided text is"),
    "niah_multikey_3": (1, UUID, rf"The special magic uuid for {UUID} mentioned in the provided text is"),
    "niah_multivalue": (4, NUMBER, r"The special magic numbers for \w+-\w+ mentioned in the provided text are"),
    "niah_multiquery": (4, NUMBER, r"numbers for (\w+-\w+, ){3}and \w+-\w+ mentioned in the provided text are"),
    "vt": (5, r"[A-Z]{5}", r"5 variables are assigned the value \d{5}, they are:"),
    "cwe": (10, r"[a-z]{4,12}", r"Answer: The top 10 words that appear most often in the list are:"),
    "fwe": (
        3,
        r"[a-z]{6}",
        r"Answer: According to the coded text above, the three most frequently appeared words are:",
    ),
    "qa_1": (2, r"[A-Z]\w+( \d+)?", r"Question: Who rules land \d+\? Answer:"),
    "qa_2": (1, r"River \d+", r"Question: Which river flows through town \d+\? Answer:"),
}
"""Number and form of each kind's answers, and the end of its prompt."""


class Some:
    """The first documents of a split."""

    name, splits = "some", ("train",)

    def documents(self, split: str):
        return islice(Sotu().documents("validation"), 8)

    def fingerprint(self):
        return {"kind": "some"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Made-up questions in the formats of SQuAD and HotpotQA."""
    folder = tmp_path_factory.mktemp("questions")
    paragraphs = [
        {
            "context": f"Land {n} lies by the sea. "
            + f"Its people fish and sail all year {n}. " * 5
            + f"King {n} rules it.",
            "qas": [
                {
                    "question": f"Who rules land {n}?",
                    "answers": [{"text": f"King {n}"}, {"text": "King"}, {"text": "King"}],
                },
                {"question": "Why?", "answers": [], "is_impossible": True},
            ],
        }
        for n in range(40)
    ]
    squad = {
        "version": "2.0",
        "data": [{"title": "a", "paragraphs": paragraphs[:5]}, {"title": "b", "paragraphs": paragraphs[5:]}],
    }
    hotpot = [
        {
            "question": f"Which river flows through town {n}?",
            "answer": f"River {n}",
            "context": [
                [f"Town {n}", [f"Town {n} is old. ", f"River {n} flows through it."]],
                [f"Hill {n}", ["It is high."] * 9],
            ],
        }
        for n in range(40)
    ]
    for name, content in {"squad": squad, "hotpotqa": hotpot}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: str(folder / f"{name}.json") for name in ("squad", "hotpotqa")}


@pytest.fixture(scope="module")
def makers(tmp_path_factory, files) -> dict[str, Maker]:
    folder = tmp_path_factory.mktemp("cache")
    questions = {"qa_1": read_squad("squad", files["squad"]), "qa_2": read_hotpotqa("hotpotqa", files["hotpotqa"])}
    tokenizers = {"bytes": ByteTokenizer(), "bpe": BpeTokenizer(vocab_size=500).prepare(Some(), folder)}
    return {
        name: Maker(prepare(Some(), tokenizer, "train", folder), tokenizer, 3, questions)
        for name, tokenizer in tokenizers.items()
    }


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("kind", NAMES)
def test_questions_hold_their_answers_and_fill_the_context(makers, kind, tokenizer):
    maker = makers[tokenizer]
    count, form, ending = ENDINGS[kind]
    asked = maker.asked(kind, 0, LENGTH)
    assert asked.prompt[0] == maker.text.separator_id
    taken = len(asked.prompt) + asked.tokens
    assert (0.9 if kind not in ("qa_1", "qa_2") or tokenizer == "bytes" else 0.3) * LENGTH < taken <= LENGTH
    text = maker.tokenizer.decode(asked.prompt.tolist())
    assert len(asked.draft.answers) == len(set(asked.draft.answers)) == count
    assert re.search(f"{ending}$", text)
    for answer in asked.draft.answers:
        assert re.fullmatch(form, answer) and answer in text[: text.rindex("\n")]
    again, other = maker.asked(kind, 0, LENGTH), maker.asked(kind, 1, LENGTH)
    assert torch.equal(again.prompt, asked.prompt) and not torch.equal(other.prompt, asked.prompt)
    assert maker.asked(kind, 0, 2 * LENGTH).draft.answers == asked.draft.answers or kind == "cwe"


def text_of(maker: Maker, kind: str, length: int = LENGTH) -> tuple[str, Draft]:
    asked = maker.asked(kind, 5, length)
    return maker.tokenizer.decode(asked.prompt.tolist()), asked.draft


NEEDLES = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}


@pytest.mark.parametrize("kind", [name for name in KINDS if name.startswith("niah")])
def test_needles_say_the_values_of_what_is_asked(makers, kind):
    text, draft = text_of(makers["bytes"], kind)
    needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
    asked = re.search(r"\nWhat .* for (.*) mentioned in the provided text\?", text)[1]
    keys = re.split(r", and |, ", asked)
    assert {value for owner, value in needles if owner in keys} == set(draft.answers)
    assert {owner for owner, value in needles if value in draft.answers} == set(keys)
    haystack_of_needles = kind in ("niah_multikey_2", "niah_multikey_3")
    assert len(needles) > 20 if haystack_of_needles else len(needles) == NEEDLES.get(kind, 1)
    assert (text.count(NOISE) > 20) == (kind == "niah_single_1")


def test_a_chain_of_variables_leads_from_its_value_to_each_answer(makers):
    text, draft = text_of(makers["bytes"], "vt")
    *_, value = re.findall(r"assigned the value (\d+), they are:", text)
    context = text[text.rindex("Memorize and track") :]
    source = value
    for name in draft.answers:  # in their order
        place = context.index(f"VAR {name} = {source}\n")
        context, source = context[place:], f"VAR {name}"
    example = re.search(r"they are: ((?:[A-Z]{3} ?){5})\n", text)[1].split()
    assert re.findall(r"VAR ([A-Z]{3}) =", text) == example


@pytest.mark.parametrize(("length", "often", "seldom", "shown"), [(3000, 6, 1, (3, 1)), (9000, 30, 3, (10, 3))])
def test_common_words_come_more_often_than_all_others(makers, length, often, seldom, shown):
    text, draft = text_of(makers["bytes" if length == 3000 else "bpe"], "cwe", length)
    parts = text.split("Below is a numbered list of words.")[1:]
    for part, (many, few), common in zip(parts, (shown, (often, seldom)), (None, draft.answers), strict=True):
        counts = Counter(word for _, word in re.findall(r"(\d+)\. (\S+)", part.split("\nQuestion")[0]))
        most = [word for word, count in counts.items() if count == many]
        assert len(most) == 10 and set(counts.values()) == {many, few}
        assert common is None or set(common) == set(most)


@pytest.mark.parametrize("pieces", [53, 54, 79, 83, 106, 124, 500, 10_000])
def test_three_coded_words_follow_the_dots_in_number(pieces):
    draft = FrequentWords().draft(Material(np.random.default_rng(0), (), (), LENGTH))
    (dots, _), *others = Counter(draft.context(max(pieces, draft.least)).split()).most_common()
    assert dots == "...." and tuple(word for word, _ in others[:3]) == draft.answers
    counts = [count for _, count in others]
    assert counts[0] > counts[1] > counts[2] > counts[3]


def test_documents_of_a_question_lie_among_others(makers):
    for kind, needed in (("qa_1", 1), ("qa_2", 2)):
        text, _ = text_of(makers["bytes"], kind)
        numbers = [int(n) for n in re.findall(r"^Document (\d+):$", text, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 5 * needed
        number = re.search(r"(\d+)\? Answer:$", text)[1]
        assert f"King {number} rules" in text if kind == "qa_1" else f"Hill {number}\n" in text


class TestScores:
    ALL = Draft("", "", str, ("Ab", "cd", "ef", "gh"), 1)
    ONE = Draft("", "", str, ("Ab", "cd"), 1, every=False)

    @pytest.mark.parametrize(
        ("draft", "text", "score"),
        [
            (ALL, "ab, CD, ef and gh", 1),
            (ALL, "cd gh", 0.5),
            (ALL, "", 0),
            (ONE, "no cd", 1),
            (ONE, "AB", 1),
            (ONE, "a", 0),
        ],
    )
    def test_of_a_text(self, draft, text, score):
        assert draft.score(text) == score


class TestFitting:
    @pytest.mark.parametrize(
        ("room", "least", "most", "found"), [(99, 1, None, 9), (99, 10, None, None), (1e4, 1, 50, 50)]
    )
    def test_most_that_fit(self, room, least, most, found):
        assert most_that_fit(lambda n: 11 * n, room, least, most) == found

    def test_needles_of_one_place_keep_their_order(self):
        assert inserted(["a", "b"], ["1", "2", "3"], [0.5, 0.5, 1]) == ["a", "1", "2", "b", "3"]

    def test_keys_are_different_words(self):
        for words in (ADJECTIVES, NOUNS):
            assert len(set(words)) == len(words) > 150 and all(word.isalpha() and word.islower() for word in words)


@pytest.fixture(scope="module")
def run_folder(run_training, shared_cache) -> Path:
    return run_training("mixer=mlstm_tfla", f"data.cache_dir={shared_cache}", "seq_len=64")


@pytest.fixture
def evaluated(compose_config, run_folder, tmp_path):
    def run(*overrides: str) -> dict:
        words = f"checkpoint={run_folder}", "task=ruler", "task.ruler.samples=2", f"output={tmp_path}/out"
        return evaluate(compose_config(*words, *overrides, entry_point="evaluate"))["ruler"]

    return run


@pytest.mark.parametrize(
    ("says", "least", "most"),
    [
        (lambda asked: " and ".join(asked.draft.answers).upper(), 100, 100),
        (lambda asked: "".join(np.random.default_rng(0).choice(list("abcdefghij 0123456789"), asked.tokens)), 0, 5),
    ],
    ids=["perfect", "random"],
)
def test_a_perfect_model_scores_100_and_a_random_one_0(
    evaluated, files, monkeypatch, tmp_path, capsys, says, least, most
):
    monkeypatch.setattr(ruler, "answered", lambda subject, asked, length: [says(one) for one in asked])
    words = [f"task.ruler.{name}={path}" for name, path in files.items()]
    lengths = [3000, 5000] if least else [3000]
    report = evaluated(f"seq_len={lengths}", *words)
    assert list(report["lengths"]) == lengths and report["left_out"] == []
    for found in report["lengths"].values():
        assert set(found) == {*NAMES, "average"}
        assert all(least <= score <= most for score in found.values())
    (written,) = (tmp_path / "out").glob("ruler_*.json")
    assert json.loads(written.read_text())["lengths"]["3000"] == report["lengths"][3000]
    assert image.imread(written.with_suffix(".png")).std() > 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in NAMES) and "left out" not in printed


def test_texts_are_the_models_first_choices(evaluated, run_folder, monkeypatch):
    kept = {}
    plain = ruler.answered

    def keep(subject, asked, length):
        kept["asked"], kept["texts"] = asked, plain(subject, asked, length)
        return kept["texts"]

    monkeypatch.setattr(ruler, "answered", keep)
    evaluated("task.ruler.tasks=[niah_multivalue]", "seq_len=700")
    model = model_from_checkpoint(load_checkpoint(find_checkpoint(run_folder))).eval()
    assert len({len(one.prompt) for one in kept["asked"]}) == 2  # rows of one batch differ in length
    for one, text in zip(kept["asked"], kept["texts"], strict=True):
        tokens = one.prompt.tolist()
        with torch.no_grad():
            for _ in range(12):
                tokens.append(int(model.logits(model(torch.tensor([tokens])).hidden[:, -1]).argmax()))
        assert bytes(tokens[len(one.prompt) :]).decode(errors="replace") == text[:12]


@pytest.mark.parametrize(
    ("overrides", "kind", "words"),
    [
        (["task.ruler.tasks=[niah]"], ConfigError, "task.ruler.tasks: there is no kind niah."),
        (["task.ruler.tasks=[]"], ConfigError, "names no kind"),
        (["task.ruler.tasks=[qa_1]"], ConfigError, "qa_1 asks questions of SQuAD.*task.ruler.squad=dev.json"),
        (["task.ruler.samples=0"], ConfigError, "task.ruler.samples=0 must be from 1"),
        (["task.ruler.seed=-1"], ConfigError, "task.ruler.seed=-1"),
        (
            ["task.ruler.tasks=[vt]", "seq_len=300"],
            ConfigError,
            "300 tokens has no room for vt: question and answer take",
        ),
        (["task.ruler.tasks=[niah_single_2]", "seq_len=3000000"], DataError, "too few for a haystack"),
        (["task.ruler.tasks=[qa_2]", "task.ruler.hotpotqa=nowhere.json", "seq_len=999"], DataError, "nowhere.json"),
    ],
)
def test_refused(evaluated, overrides, kind, words):
    with pytest.raises(kind, match=words):
        evaluated(*overrides)


@pytest.mark.parametrize("content", ["[]", "{}", '{"data": [{"paragraphs": 1}]}', "no json", '{"data": []}'])
def test_files_that_are_no_questions_are_refused(tmp_path, content):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(DataError, match=r"squad=.*file\.json"):
        read_squad("squad", str(tmp_path / "file.json"))


def test_what_is_left_out_is_said_and_logs_get_scores():
    task = ruler.Ruler(["all"], [1], 1, 0)
    assert task.left_out == ["qa_1", "qa_2"] and task.kinds == list(KINDS)
    scores = dict.fromkeys([*KINDS, "average"], 50.0)
    report = {"samples": 1, "left_out": task.left_out, "lengths": {64: scores}, "filled": {64: {"cwe": 0.5}}}
    *_, short, squad, hotpotqa = task.tables(SimpleNamespace(report=report))
    assert short.startswith("cwe fills 50% of 64 tokens") and "task.ruler.squad=FILE" in squad and "qa_2" in hotpotqa
    assert task.measures(SimpleNamespace(report=report))["niah_single_1/64"] == 50
