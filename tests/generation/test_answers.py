"""Answers to a file of prompts: each as if it were alone, whatever the batch, and after any interruption."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from longmix.config import GenerateConfig, ModelConfig, StoredConfig, defaults, read
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError, DataError, LongmixError, StorageError
from longmix.generation import answering
from longmix.generation.answer_file import AnswerFile
from longmix.generation.answering import answer, batches
from longmix.generation.requests import prepared, requests_of
from longmix.generation.run import continued, encoded
from longmix.locks import try_lock
from longmix.model.build import build_model
from longmix.restore import Restored


@pytest.fixture
def restored(small_config, tmp_path) -> Restored:
    """A small model of float64, so that rounding decides nothing, in the place of a checkpoint's."""
    torch.manual_seed(0)
    sizes = ("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_hidden=8")
    config = small_config("mixer=flash", *sizes)
    model = build_model(ModelConfig.of(config), vocab_size=260).double().eval()  # three ids more than the tokenizer
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "info.json").write_text('{"sha256": "of these weights"}')
    stored = StoredConfig.of({**config, "data": None})
    return Restored(checkpoint, 1, {}, stored, {}, model, ByteTokenizer(), torch.device("cpu"), "float32")


def config_of(**words) -> GenerateConfig:
    return read(GenerateConfig, defaults(GenerateConfig) | {"checkpoint": "x", "max_tokens": 9} | words)


RECORDS = [
    {"prompt": "We, the people", "id": "first"},
    {"prompt": "x", "seed": 7, "id": {"any": ["value", None]}},
    {"prompt": "", "max_tokens": 3},
    {"prompt": "Of the Union", "samples": 3, "temperature": 0.7, "top_k": 40},
    {"prompt": "We, the people", "seed": 1},
    {"prompt": "é€𝄞", "temperature": 0},
    {"prompt": "the state of the Union " * 4, "frequency_penalty": 2.0, "logit_bias": {"101": 2.0, "t": -1.5}},
    {"prompt": "Fellow", "max_tokens": 20, "repetition_penalty": 1.5, "logprobs": 2, "stop": "e"},
    {"prompt": "Citizens", "presence_penalty": 1.0, "min_p": 0.001, "top_p": 0.9, "stop": ["a", "~"]},
]


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a file of prompts."""
    lines = [json.dumps(record, ensure_ascii=number % 2 == 0) for number, record in enumerate(RECORDS)]
    (tmp_path / "in.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    return tmp_path


def answered(place: Path, restored: Restored, **words) -> list[dict]:
    answer(config_of(input=str(place / "in.jsonl"), output=str(place / "out.jsonl"), **words), restored)
    return [json.loads(line) for line in (place / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("batch_tokens", [1, 100, pytest.param(10**6, marks=pytest.mark.slow)])
def test_an_answer_is_what_the_prompt_gives_alone(place, restored, batch_tokens):
    lines = answered(place, restored, batch_tokens=batch_tokens, seed=4)
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8]
    for index, record in enumerate(RECORDS):
        own = {key: [value] if key == "stop" and isinstance(value, str) else value for key, value in record.items()}
        own.pop("id", None)
        alone = continued(config_of(**{"seed": 4, **own}), restored)
        mine = [line for line in lines if line["index"] == index]
        assert [line["text"] for line in mine] == alone.texts
        assert [line["sample"] for line in mine] == list(range(record.get("samples", 1)))
        assert [line["finish_reason"] for line in mine] == [row.finish_reason for row in alone.continuations]
        assert [line["tokens"] for line in mine] == [len(row.tokens) for row in alone.continuations]
        assert all(line.get("id") == record.get("id") for line in mine)
        assert mine[0]["prompt_tokens"] == 1 + len(record["prompt"].encode())
    assert lines[0]["text"] != lines[6]["text"]


def test_rows_of_lists_and_samples_are_those_of_each_alone(restored):
    both = continued(config_of(prompt=["Fellow citizens", "x", "x"], samples=2, seed=3), restored).texts
    assert both[:2] == continued(config_of(prompt="Fellow citizens", samples=2, seed=3), restored).texts
    assert both[0] == continued(config_of(prompt="Fellow citizens", seed=3), restored).texts[0]
    assert both[2:4] == both[4:6] and len(set(both)) == 4
    assert both != continued(config_of(prompt=["Fellow citizens", "x", "x"], samples=2, seed=4), restored).texts


def test_after_any_interruption_the_rest_is_added(place, restored, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "sort", lambda self: None)
        answered(place, restored, batch_tokens=100)
        came = (place / "out.jsonl").read_bytes()
    wanted = answered(place, restored)
    assert [line["index"] for line in wanted] == sorted(line["index"] for line in wanted)
    whole = (place / "out.jsonl").read_bytes()
    assert came != whole and sorted(came.split(b"\n")) == sorted(whole.split(b"\n"))
    config = config_of(input=str(place / "in.jsonl"), output=str(place / "out.jsonl"), batch_tokens=100)
    for cut in [*range(0, len(came), len(came) // 5), len(came) - 1, len(came)]:
        (place / "out.jsonl").write_bytes(came[:cut])
        done = answer(config, restored)
        assert (place / "out.jsonl").read_bytes() == whole, cut
        full = {json.loads(line)["index"] for line in came[:cut].split(b"\n")[:-1]}
        assert done.prompts + done.before == len(RECORDS) and len(full) - 1 <= done.before <= len(full), cut
    assert done.prompts == 0
    assert sorted(path.name for path in place.iterdir()) == ["checkpoint", "in.jsonl", "out.jsonl"]


def test_what_was_answered_stays_where_prompts_are_added(place, restored):
    before = answered(place, restored)
    with (place / "in.jsonl").open("a") as stream:
        stream.write('\n{"prompt": "more"}\n')
    after = answered(place, restored, batch_tokens=7)
    assert after[:-1] == before and after[-1]["index"] == len(RECORDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"notes without an end", "is no file of answers: line 1 holds something else"),
        (b'{"prompt": "x"}\n', "is no file of answers: line 1"),
        (b'{"index": 0, "sample": 0}\n', "is no file of answers: line 1"),
        (b'{"index": "0", "sample": 0, "request": ""}\n', "is no file of answers: line 1"),
        (b'{"index": 0, "sample": 0, "request": "0123"}\n', "line 1, to another prompt or of other words or weights"),
        (b'{"index": 99, "sample": 0, "request": ""}\n', "line 1, to another prompt"),
        (b"\xff\xfe\n", "is no file of answers: line 1"),
    ],
)
def test_another_file_is_not_written_to(place, restored, content, message):
    (place / "out.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        answered(place, restored)
    assert (place / "out.jsonl").read_bytes() == content and "\n" not in str(caught.value)


def test_answers_of_other_words_or_weights_are_not_mixed(place, restored):
    answered(place, restored)
    before = (place / "out.jsonl").read_bytes()
    for words in ({"temperature": 0.5}, {"seed": 1}, {"stop": ["q"]}, {"logit_bias": {"e": 1.0}}, {"max_tokens": 8}):
        with pytest.raises(ConfigError, match="of other words or weights"):
            answered(place, restored, **words)
    for other in (
        dataclasses.replace(restored, states="other"),
        dataclasses.replace(restored, weights="ema"),
        dataclasses.replace(restored, changes={"rotary_base": 5e5}),
        dataclasses.replace(restored, precision="bf16"),
    ):
        with pytest.raises(ConfigError, match="of other words or weights"):
            answered(place, other)
    (restored.checkpoint / "info.json").write_text('{"sha256": "of others"}')
    with pytest.raises(ConfigError, match="of other words or weights"):
        answered(place, restored)
    assert (place / "out.jsonl").read_bytes() == before


def test_log_probabilities_are_those_of_the_model_before_words_change_them(restored):
    words = {"temperature": 0.6, "top_k": 5, "repetition_penalty": 2.0, "logit_bias": {"e": 3.0}, "logprobs": 4}
    made = continued(config_of(prompt=["We", "the people"], samples=2, **words), restored)
    for row, ids in zip(made.continuations, made.ids, strict=True):
        prompt = len(ids) - len(row.tokens)
        assert ids[prompt:] == row.tokens and len(row.logprobs) == len(row.tokens) == 9
        hidden = restored.model(torch.tensor(ids)[None]).hidden[0]
        wanted = restored.model.logits(hidden).log_softmax(-1).detach()
        for step, score in enumerate(row.logprobs):
            after = wanted[prompt + step - 1]
            assert score.token == ids[prompt + step]
            assert score.logprob == pytest.approx(after[score.token].item(), abs=1e-10, rel=0)
            best = after.sort(descending=True)
            assert [token for token, _ in score.top] == best.indices[:4].tolist()
            assert [value for _, value in score.top] == pytest.approx(best.values[:4].tolist(), abs=1e-10, rel=0)
    none = continued(config_of(prompt="We", logprobs=0), restored).continuations[0]
    assert all(score.top == [] for score in none.logprobs) and len(none.logprobs) == 9
    assert continued(config_of(prompt="We"), restored).continuations[0].logprobs is None
    with pytest.raises(ConfigError, match="logprobs=261 is more than the 260 ids"):
        continued(config_of(logprobs=261), restored)


def test_log_probabilities_stand_in_the_file(place, restored):
    (place / "in.jsonl").write_text('{"prompt": "We"}')
    (line,) = answered(place, restored, logprobs=3)
    assert len(line["logprobs"]) == line["tokens"] == 9
    assert "".join(one["text"] for one in line["logprobs"]).isascii() == line["text"].isascii()
    for one in line["logprobs"]:
        assert set(one) == {"token", "text", "logprob", "top"} and one["logprob"] <= 0
        assert len(one["top"]) == 3 and one["top"][0]["logprob"] == max(top["logprob"] for top in one["top"])


def test_penalties_and_biases_act_on_what_is_generated(restored):
    greedy = {"prompt": "aaaa", "temperature": 0, "max_tokens": 25}
    plain = continued(config_of(**greedy), restored).ids[0][5:]
    assert len(set(plain)) < 25
    for word in ("presence_penalty", "frequency_penalty"):
        assert len(set(continued(config_of(**greedy, **{word: 1000.0}), restored).ids[0][5:])) == 25
    never = continued(config_of(**greedy, repetition_penalty=1e6, logit_bias={"b": 100.0, 256: -1e6}), restored)
    assert never.ids[0][5] == ord("b") and not {256, ord("a")} & set(never.ids[0][5:])
    always = continued(config_of(**greedy, logit_bias={"z": 1e6}), restored)
    assert always.texts == ["z" * 25] and always.continuations[0].finish_reason == "length"
    ended = continued(config_of(**greedy, logit_bias={256: 1e6}), restored).continuations[0]
    assert (ended.text, ended.finish_reason, ended.tokens) == ("", "end", [256])
    padded = continued(config_of(**greedy, logit_bias={259: 1e6}), restored)  # an id that the tokenizer lacks
    assert padded.texts == [""] and padded.ids[0][5:] == [259] * 25


def test_batches_are_within_the_budget_and_hold_each_prompt_once(place, restored):
    records = [{"prompt": "x" * (number * 7 % 50), "max_tokens": 5 + number % 3} for number in range(60)]
    records += [{"prompt": "x", "samples": 4, "temperature": 0.5}] * 3
    (place / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    every = prepared(requests_of(config_of(input=str(place / "in.jsonl"))), restored)
    for most in (1, 60, 200, 10**6):
        found = list(batches(every, most))
        assert sorted(one.request.index for batch in found for one in batch) == list(range(63))
        for batch in found:
            assert len({repr(one.choosing) for one in batch}) == len({one.samples for one in batch}) == 1
            longest = max(one.longest for one in batch)
            assert len(batch) == 1 or len(batch) * batch[0].samples * longest <= most
    assert len(found) == 2 and sum(len(batch) > 1 for batch in batches(every, 200)) > 5


def test_prompts_of_the_command_line_are_answered_too(place, restored):
    out = place / "out.jsonl"
    answer(config_of(prompt=["We", "Of"], samples=2, output=str(out), temperature=0.5), restored)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = continued(config_of(prompt=["We", "Of"], samples=2, temperature=0.5), restored)
    assert [line["text"] for line in lines] == wanted.texts


@pytest.mark.parametrize(
    ("content", "words", "kind", "message"),
    [
        ('{"prompt": 3}', {}, DataError, r'record 0 \(counted from 0\) is not of the form {"prompt": "a text"}'),
        ('{"text": "x"}', {}, DataError, "record 0 .* is not of the form"),
        ('{"prompt": "x"}\n["x"]', {}, DataError, "record 1 .* is not of the form"),
        ('{"prompt": "x"', {}, DataError, r"cannot be read as JSON: .*line 1"),
        ("", {}, DataError, "holds no prompt"),
        ('{"prompt": "x", "max_token": 3}', {}, ConfigError, "unknown key max_token. Did you mean max_tokens"),
        ('{"prompt": "x", "note": 3}', {}, ConfigError, "What is to be carried along may stand in id"),
        ('{"prompt": "x", "max_tokens": 0}', {}, ConfigError, "record 0 .*max_tokens=0 must be at least 1"),
        ('{"prompt": "x", "top_p": 2}', {}, ConfigError, "record 0 .*top_p=2 must be above 0"),
        ('{"prompt": "x", "seed": "a"}', {}, ConfigError, "record 0 .*seed='a' is not a whole number"),
        ('{"prompt": "x", "stop": [""]}', {}, ConfigError, "record 0 .*stop has an empty text"),
        ('{"prompt": "x", "samples": 1000000000000}', {}, ConfigError, "1,000,000,000,000 rows at once take more"),
        ('{"prompt": "x", "logit_bias": {"abc": 1}}', {}, ConfigError, "prompt 0 .*'abc' is 3 tokens"),
        ('{"prompt": "\\ud800"}', {}, DataError, "prompt 0 .*not valid Unicode"),
        ('{"prompt": "x"}', {"prompt": "y"}, ConfigError, "give prompt, prompt_file or input, not several"),
        ('{"prompt": "x"}', {"load": "y"}, ConfigError, "leave load and save out"),
        ('{"prompt": "x"}', {"save": "y"}, ConfigError, "leave load and save out"),
        ('{"prompt": "x"}', {"output": "absent/y"}, StorageError, "there is no folder absent"),
        ('{"prompt": "x"}', {"output": "x/"}, ConfigError, "output=x/ is the name of a folder"),
        ('{"prompt": "x"}', {"input": "absent"}, DataError, "input=absent cannot be read: No such file"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(place, restored, content, words, kind, message):
    (place / "in.jsonl").write_text(content)
    given = {"input": str(place / "in.jsonl"), "output": str(place / "out.jsonl")} | words
    with pytest.raises(kind, match=message) as caught:
        answer(config_of(**given), restored)
    assert "\n" not in str(caught.value) and not (place / "out.jsonl").exists()


def test_it_is_refused_before_the_model_is_loaded(place, monkeypatch):
    monkeypatch.setattr(answering, "restored_for", lambda config: pytest.fail("the model was loaded"))
    (place / "in.jsonl").write_text('{"prompt": "x", "top_k": 0}')
    with pytest.raises(ConfigError, match="top_k=0"):
        answer(config_of(input=str(place / "in.jsonl"), output=str(place / "out.jsonl")))


def test_two_processes_do_not_write_one_file(place, restored):
    with try_lock(place / ".out.jsonl.lock"), pytest.raises(StorageError, match="being written by another process"):
        answered(place, restored)
    assert answered(place, restored)


def test_answers_of_a_batch_that_failed_are_not_there_and_the_others_are(place, restored, monkeypatch):
    kept = answering._continued
    calls = []

    def failing(batch, *others):
        calls.append(batch)
        if len(calls) > 2:
            raise LongmixError("stopped")
        return kept(batch, *others)

    with monkeypatch.context() as patched:
        patched.setattr(answering, "_continued", failing)
        with pytest.raises(LongmixError, match="stopped"):
            answered(place, restored, batch_tokens=1)
    assert len({json.loads(line)["index"] for line in (place / "out.jsonl").read_bytes().splitlines()}) == 2
    assert len(answered(place, restored)) == 11


def test_a_prompt_without_tokens_begins_with_the_separator(restored):
    assert encoded(restored.tokenizer, "") == [256]
