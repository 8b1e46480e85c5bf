"""The harness's requests are answered as plain torch would, and tasks in local files run without a network."""

import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.config import EvaluateConfig
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.errors import ConfigError, DataError
from longmix.evaluation import prefill
from longmix.evaluation.run import evaluate
from longmix.evaluation.subject import Subject
from longmix.model.build import model_from_checkpoint
from longmix.restore import restored_for

SEPARATOR = 256
TRAINED = 48

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


@pytest.fixture(scope="module")
def run_folder(run_training, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in {"train": 4, "validation": 1}.items():
        (folder / split).mkdir()
        for number in range(count):
            (folder / split / f"{number}.txt").write_text("roses are red. violets are blue. " * (number + len(split)))
    return run_training(
        "data=text",
        f"data.corpus.path={folder}/train",
        f"data.corpus.validation={folder}/validation",
        f"data.cache_dir={folder}/cache",
        "mixer=mlstm_tfla+flash",
        "model.num_layers=2",
        f"seq_len={TRAINED}",
        "max_steps=60",
        "batch_size=8",
    )


@pytest.fixture
def harness_model(run_folder, tmp_path):
    def make(max_length: int = TRAINED, batch_size: int | None = None):
        from longmix.evaluation.tasks.harness import HarnessModel

        config = EvaluateConfig(checkpoint=str(run_folder), task={}, batch_size=batch_size, device="cpu")
        subject = Subject(restored_for(config), None, config, tmp_path / "results")
        return HarnessModel(subject, max_length)

    return make


@pytest.fixture(scope="module")
def model(run_folder):
    return model_from_checkpoint(load_checkpoint(find_checkpoint(run_folder))).eval()


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def scores(model, tokens: list[int]) -> torch.Tensor:
    """Log probabilities of the token after each of `tokens`, float64 [T, V]."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens])).hidden)[0].double().log_softmax(-1)


def likelihood(model, tokens: list[int], count: int) -> tuple[float, bool]:
    """Of the last `count` of `tokens`, and whether they are the likeliest ones."""
    after = scores(model, tokens[:-1])[-count:]
    wanted = torch.tensor(tokens[-count:])
    return after.gather(1, wanted[:, None]).sum().item(), bool((after.argmax(-1) == wanted).all())


@needs_harness
class TestRequests:
    PAIRS = (
        ("roses are", " red"),
        ("", "violets"),
        ("roses are red. ", "violets are blue"),  # a blank at the end of a context belongs to what follows
        ("x" * 100, "yz"),
        ("roses are red. violets are", " blue"),
        ("a", "b" * 60),
    )

    @pytest.mark.parametrize("batch_size", [1, 4, None])
    @pytest.mark.parametrize("at_once", [20, 16384])
    def test_loglikelihood_equals_plain_torch(self, harness_model, model, monkeypatch, caplog, batch_size, at_once):
        monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", at_once)
        with caplog.at_level(logging.WARNING):
            found = harness_model(batch_size=batch_size).loglikelihood(requests(*self.PAIRS), disable_tqdm=True)
        assert "2 of 6 contexts are longer than task.lm_eval.max_length=48 and lose their beginning" in caplog.text
        for (context, continuation), (log_probability, greedy) in zip(self.PAIRS, found, strict=True):
            tokens = [SEPARATOR, *context.encode(), *continuation.encode()][-(TRAINED + 1) :]
            count = min(len(continuation) + context.endswith(" "), TRAINED)
            expected = likelihood(model, tokens, count)
            assert log_probability == pytest.approx(expected[0], rel=1e-5) and greedy == expected[1]
        assert len({greedy for _, greedy in found}) == 2  # both kinds were among them

    def test_nothing_to_score(self, harness_model):
        assert harness_model().loglikelihood([], disable_tqdm=True) == []

    @pytest.mark.parametrize("length", [1, 47, 48, 49, 130])
    def test_rolling_predicts_every_token_once(self, harness_model, model, length):
        text = ("roses are red. violets are blue. " * 5)[:length]
        (found, short) = harness_model(batch_size=2).loglikelihood_rolling(requests((text,), ("red",)))
        tokens, expected = [SEPARATOR, *text.encode()], 0.0
        for start in range(1, len(tokens), TRAINED):
            piece = tokens[start : start + TRAINED]
            begun = tokens[max(0, start + len(piece) - TRAINED - 1) : start]  # as much context as has room
            expected += likelihood(model, begun + piece, len(piece))[0]
        assert found == pytest.approx(expected, rel=1e-5)
        assert short == pytest.approx(likelihood(model, [SEPARATOR, *b"red"], 3)[0], rel=1e-5)

    def test_generation_is_greedy_and_ends_at_a_stop(self, harness_model, model):
        def greedy(text: str, steps: int, room: int) -> str:
            tokens = [SEPARATOR, *text.encode()][-room:]
            made = []
            for _ in range(steps):
                made.append(int(scores(model, tokens + made)[-1].argmax()))
            return bytes(token for token in made if token != SEPARATOR).decode(errors="replace")

        contexts = ["roses are", "vio", "roses are red. violets are blue. roses are red. viol"]
        plain = {"until": [], "max_gen_toks": 12}
        expected = [greedy(context, 12, TRAINED - 12) for context in contexts]
        for until in ([], ["not there"]):  # what might begin a stop is kept when nothing follows
            asked = requests(*((context, {**plain, "until": until}) for context in contexts))
            assert harness_model().generate_until(asked) == expected
        stop = expected[0][4:6]
        stopped, other = harness_model().generate_until(
            requests((contexts[0], {**plain, "until": [stop]}), (contexts[1], {**plain, "max_gen_toks": 3}))
        )
        assert stopped == expected[0][: expected[0].index(stop)] and other == greedy(contexts[1], 3, TRAINED)

    def test_generation_ends_at_every_end_of_a_text(self, harness_model, monkeypatch):
        asked = requests(("roses are", {"until": [], "max_gen_toks": 12}))
        (text,) = harness_model().generate_until(asked)
        monkeypatch.setattr(ByteTokenizer, "end_ids", (7, ord(text[4])))
        assert harness_model().generate_until(asked) == [text[: text.index(text[4])]]
        assert (harness_model().eot_token_id, harness_model().prefix_token_id) == (7, SEPARATOR)

    def test_sampling_is_seeded(self, harness_model):
        wanted = {"until": ["\n"], "do_sample": True, "temperature": 3.0, "max_gen_toks": 20}
        first, second = (harness_model().generate_until(requests(("roses", dict(wanted)))) for _ in range(2))
        assert first == second
        assert first != harness_model().generate_until(requests(("roses", {"until": ["\n"], "max_gen_toks": 20})))
        asked = requests(*((context, dict(wanted)) for context in ("roses", "violets", "roses")))
        three = harness_model().generate_until(asked)
        assert three[0] == first[0] and three[2] != three[0]  # beside others as alone; asked again, another sample


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A multiple-choice, a generation and a perplexity task with data in local files."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    choices = [{"question": "roses are", "choices": ["red", "qqq"], "answer": 0}]
    choices += [{"question": "violets are", "choices": ["zzzz", "blue"], "answer": 1}]
    choices += [{"question": "roses are", "choices": ["red", "qqq"], "answer": 1}]  # to be missed
    texts = [{"text": "roses are red."}, {"text": "violets are blue."}]
    for name, lines in {"choices": choices, "texts": texts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = "test_split: test\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
    (folder / "flowers.yaml").write_text(
        "task: flowers\noutput_type: multiple_choice\n"
        + common.format(file=folder / "choices.jsonl")
        + 'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
    )
    (folder / "flowers_written.yaml").write_text(
        "task: flowers_written\noutput_type: generate_until\n"
        + common.format(file=folder / "choices.jsonl")
        + 'doc_to_text: "{{question}}"\ndoc_to_target: " {{choices[answer]}}"\n'
        + 'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 8\n'
        + "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "flowers_read.yaml").write_text(
        "task: flowers_read\noutput_type: loglikelihood_rolling\n"
        + common.format(file=folder / "texts.jsonl")
        + 'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte\n'
    )
    (folder / "gone.yaml").write_text(
        "task: gone\noutput_type: multiple_choice\n"
        + common.format(file=folder / "gone.jsonl")
        + "doc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    )
    return folder


@pytest.fixture
def evaluated(compose_config, run_folder, tasks, tmp_path, monkeypatch):
    def run(*overrides: str) -> dict:
        words = f"checkpoint={run_folder}", "task=lm_eval", f"output={tmp_path}/results"
        words += (f"task.lm_eval.include_path={tasks}",)
        return evaluate(compose_config(*words, *overrides, entry_point="evaluate"))["lm_eval"]

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return run


@needs_harness
class TestTasks:
    def test_local_ones(self, evaluated, model, tmp_path, capsys):
        report = evaluated("task.lm_eval.tasks=[flowers,flowers_written,flowers_read]")
        results = report["results"]
        likelier = [
            likelihood(model, [SEPARATOR, *f"{question} {right}".encode()], len(right) + 1)[0]
            > likelihood(model, [SEPARATOR, *f"{question} {wrong}".encode()], len(wrong) + 1)[0]
            for question, right, wrong in [("roses are", "red", "qqq"), ("violets are", "blue", "zzzz")]
        ]
        hits = [*likelier, not likelier[0]]
        assert results["flowers"]["acc"] == pytest.approx(sum(hits) / 3)
        assert 0 < results["flowers"]["acc_stderr"] < 1
        total = sum(
            likelihood(model, [SEPARATOR, *text.encode()], len(text))[0]
            for text in ("roses are red.", "violets are blue.")
        )
        bits = -total / torch.log(torch.tensor(2.0)).item() / len("roses are red.violets are blue.")
        assert results["flowers_read"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert 0 <= results["flowers_written"]["exact_match"] <= 1
        assert report["examples"] == {"flowers": 3, "flowers_written": 3, "flowers_read": 2}
        assert (report["max_length"], report["step"]) == (TRAINED, 60)
        (saved,) = (tmp_path / "results").glob("lm_eval_flowers_flowers_written_flowers_read_step60_*.json")
        assert json.loads(saved.read_text()).items() >= report.items() and not saved.with_suffix(".png").exists()
        printed = capsys.readouterr().out
        assert f"{results['flowers']['acc']:.4f}" in printed and "wrote" in printed

    def test_a_single_one_and_a_limit(self, evaluated):
        report = evaluated("task.lm_eval.tasks=flowers", "task.lm_eval.limit=1")
        assert report["examples"] == {"flowers": 1}

    def test_data_that_are_not_there(self, evaluated):
        with pytest.raises(DataError, match=r"tasks=\['gone'\] cannot get their data"):
            evaluated("task.lm_eval.tasks=gone")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        pytest.param([], "no value was given for: task.lm_eval.tasks", id="none given"),
        pytest.param(["task.lm_eval.tasks=[]"], "task.lm_eval.tasks is empty", id="empty"),
        pytest.param(["task.lm_eval.tasks=x", "task.lm_eval.limit=0"], "limit=0 must be at least 1", id="limit"),
        pytest.param(["task.lm_eval.tasks=x", "task.lm_eval.num_fewshot=-1"], "num_fewshot=-1", id="shots"),
        pytest.param(["task.lm_eval.tasks=x", "task.lm_eval.max_length=1"], "max_length=1", id="length"),
        pytest.param(
            ["task.lm_eval.tasks=x", "task.lm_eval.include_path=nowhere"], "nowhere is not a folder", id="folder"
        ),
    ],
)
def test_refused(evaluated, overrides, words):
    with pytest.raises(ConfigError, match=words):
        evaluated(*overrides)


def test_without_the_harness_it_says_what_to_install(evaluated, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'longmix\[lm-eval\]'"):
        evaluated("task.lm_eval.tasks=flowers")


def test_a_model_of_a_synthetic_task_is_refused(run_training, compose_config):
    words = f"checkpoint={run_training('data=parity', 'seq_len=16')}", "task=lm_eval", "task.lm_eval.tasks=flowers"
    with pytest.raises(ConfigError, match="needs a model of text"):
        evaluate(compose_config(*words, entry_point="evaluate"))
