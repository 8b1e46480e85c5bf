"""Values as Hydra reads them: what was typed arrives, by the type of the word."""

import random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from longmix.command_line import values
from longmix.command_line.values import Takes
from longmix.composing import as_words

TEXT = Takes(str | None)
LITERAL = Takes(str, literal=True)
PATH = Takes(str | list[str], path=True)
TEXTS = Takes(list[str], literal=True)
WHOLE = Takes(int | None)
SHARE = Takes(int | float)

PIECES = [
    *"'\"\\${}[](),=:;#%&*+-./?@^_|~ <>!\n\t\r`",
    "${",
    "}",
    "\\${",
    "${a}",
    "é",
    "ü",
    "文",
    "🙂",
    "\u2028",
    "\x00",
]


def read(value: str, takes: Takes, sweep: bool = False):
    """What stands in the configuration when a word gets this value."""
    written = values.as_hydra_reads(value, takes, sweep)
    override = OverridesParser.create().parse_override(f"word={written}")
    if override.is_sweep_override():
        return [getattr(part, "text", part) for part in override.sweep_iterator()]
    return OmegaConf.to_container(OmegaConf.create({"word": override.value()}), resolve=True)["word"]


def random_texts(count: int) -> list[str]:
    """Texts of all of Unicode but NUL and lone surrogates, rich in what Hydra takes for syntax."""
    draw = random.Random(0)
    found = []
    while len(found) < count:
        pieces = [
            draw.choice(PIECES[:-1]) if draw.random() < 0.7 else chr(draw.randrange(1, 0x110000))
            for _ in range(draw.randrange(1, 12))
        ]
        text = "".join(pieces)
        if (
            not any("\ud800" <= character <= "\udfff" for character in text)
            and not values.quoted_by(text)
            and text != "???"
        ):
            found.append(text)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "c/тексты", "lang=en/", "x(1)", "a,b", "it's", "a&b", "ünï", "a=b", "1e5", "true", "2024", "007", "nan", "inf",
        "[INST] hi", "[INST] hi [/INST]", '"Hello" he said', "'a' and 'b'", "two words", " blank ", "a\\", "\\'", "~x",
        "C:\\new", "${", "$HOME", "{a}", "a: b", "#3", "choice(a,b)", "glob(*)", "", "\n", "-1", "+", "@", "0x10",
    ],
)  # fmt: skip
def test_text_stays_as_it_is(text):
    assert read(text, TEXT) == text
    assert read(text, LITERAL) == text


@pytest.mark.slow
def test_every_random_text_stays_as_it_is():
    for text in random_texts(2000):
        assert read(text, LITERAL) == text
        assert read(f"[a,{values.in_quotes(text)}]", TEXTS) == ["a", text]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        pytest.param(r'"\n"', "\n", id="JSON in double quotes"),
        pytest.param('"[a]"', "[a]", id="double quotes around a list"),
        pytest.param("'null'", "null", id="single quotes around null"),
        pytest.param("null", None, id="null"),
        pytest.param(r'"not \ JSON"', r"not \ JSON", id="double quotes around what is no JSON"),
        pytest.param("'\\${a}'", "${a}", id="as Hydra writes it"),
    ],
)
def test_quotes(given, text):
    assert read(given, TEXT) == text


@pytest.mark.parametrize(
    ("given", "items"),
    [
        ("[###]", ["###"]),
        ("[</s>]", ["</s>"]),
        ("[é]", ["é"]),
        (r'["\n"]', ["\n"]),
        (r'["\n\n", "</s>"]', ["\n\n", "</s>"]),
        ("[it's, he said]", ["it's", "he said"]),
        ("['a,b', c]", ["a,b", "c"]),
        ("[[INST]]", ["[INST]"]),
        ("[1,true,null]", ["1", "true", "null"]),
        ("[]", []),
        ("[${a}]", ["${a}"]),
        ("[:, )]", [":", ")"]),
    ],
)
def test_lists_of_texts(given, items):
    assert read(given, TEXTS) == items


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("3e6", 3_000_000),
        ("1e3", 1000),
        ("3_000_000", 3_000_000),
        ("1_0_", "1_0_"),
        ("1__0", "1__0"),
        ("1_000.", 1000),
        ("1_.5", "1_.5"),
        ("2.5e1", 25),
        ("4.0", 4),
        ("-1", -1),
        ("3.5", 3.5),
        ("16k", "16k"),
        ("[1e3,2e3]", [1000, 2000]),
        ("null", None),
        ("1e-3", 0.001),
    ],
)
def test_whole_numbers(given, value):
    result = read(given, Takes(int | list[int] | None))
    assert result == value and type(result) is type(value)


def test_number_too_large_for_a_whole_one_stays():
    assert values.as_hydra_reads("1e999", WHOLE, sweep=False) == "1e999"


@pytest.mark.parametrize(("given", "value"), [("1.0", 1.0), ("0.05", 0.05), ("1e3", 1000), ("100", 100)])
def test_share_or_whole_number(given, value):
    assert type(read(given, SHARE)) is type(value) and read(given, SHARE) == value


def test_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert read("~/books", PATH) == "/home/me/books"
    assert read("[~/a,~/b c]", PATH) == ["/home/me/a", "/home/me/b c"]
    assert read("~/books", TEXT) == "~/books"


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        pytest.param("a,b", ["a", "b"], id="plain"),
        pytest.param("тексты/a,c d", ["тексты/a", "c d"], id="quoted each"),
        pytest.param("choice(a,b)", ["a", "b"], id="function"),
        pytest.param("1e5,x", ["1e5", "x"], id="numbers stay texts"),
    ],
)
def test_sweeps_over_texts(given, parts):
    assert read(given, TEXT, sweep=True) == parts


def test_quotes_protect_from_a_sweep():
    assert read("'a,b'", TEXT, sweep=True) == "a,b"
    assert read('"a,b"', TEXT, sweep=True) == "a,b"


def test_sweep_over_whole_numbers():
    assert read("1e3,2_000", WHOLE, sweep=True) == [1000, 2000]


def test_interpolations_count_where_a_text_is_not_literal():
    assert values.as_hydra_reads("run ${seed}", TEXT, sweep=False) == "'run ${seed}'"
    assert values.as_hydra_reads("run_${seed}", LITERAL, sweep=False) == "'run_\\${seed}'"


@pytest.mark.parametrize(
    "takes", [TEXT, LITERAL, PATH, TEXTS, WHOLE], ids=["text", "literal", "path", "texts", "whole"]
)
def test_written_twice_is_written_once(takes):
    """The processes that a run starts get the words again."""
    for text in [*random_texts(300), "[a,'b c',\"\\n\"]", "1e3"]:
        once = values.as_hydra_reads(text, takes, sweep=False)
        assert values.as_hydra_reads(once, takes, sweep=False) == once


def test_reserved_words_of_hydra_are_known():
    for text in ("null", "true", "False", "INF", "nan"):
        assert not values.is_plain(text)


@pytest.mark.parametrize(("value", "found"), [('[""]', [""]), ('["",a]', ["", "a"]), ("['']", [""]), ("[]", [])])
def test_an_empty_text_in_quotes_is_an_item_of_a_list(value, found):
    assert read(value, TEXTS) == found


def test_from_python_too():
    assert as_words({"stop": ["", "a"]}) == ['stop=["",a]']
