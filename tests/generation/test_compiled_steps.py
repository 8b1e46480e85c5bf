"""Compiled steps of a session: what they give, how many graphs they take, and what is refused."""

import dataclasses
import functools
import json

import pytest
import torch
from small_mixers import small_mixer
from torch._dynamo.utils import counters

from longmix.config import GenerateConfig, ModelConfig, read, resolved
from longmix.errors import ConfigError
from longmix.generation import session as sessions
from longmix.generation.answering import answer
from longmix.generation.run import generate
from longmix.generation.session import Session
from longmix.model.build import build_model

FAST = ("flash", "gla")
NAMES = (*FAST, "rwkv7", "mamba2", "sliding_window", "routing", "nsa", "sparse_flash", "sparse_flash_drop")
SMALL = ("model.num_layers=1", "model.d_model=32", "model.num_heads=2", "model.mlp_hidden=16")
STEPS = 8
PROMPT = 41


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Graphs are counted and run as they are, without machine code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=16):
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()


@pytest.fixture
def model_of(compose_config):
    def model(name):
        node = resolved(compose_config(f"mixer={name}", *SMALL))
        node["mixer"] = small_mixer(node["mixer"], 16)
        return build_model(ModelConfig.of(node), 47).eval().double()

    return model


def graphs_of_steps(plain, compiled, rows):
    """Graphs after each step of both, whose scores are equal."""
    found = []
    for tokens in torch.randint(47, (STEPS, rows)):
        plain.step(tokens)
        compiled.step(tokens)
        torch.testing.assert_close(compiled.logits, plain.logits, rtol=1e-10, atol=1e-10)
        found.append(counters["stats"]["unique_graphs"])
    return found


def begun(model, rows):
    session = Session(model, rows)
    session.prefill(list(torch.randint(47, (rows, PROMPT), generator=torch.Generator().manual_seed(0))))
    session.reserve(2 * STEPS)
    return session


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES])
def test_equal_plain_steps_in_few_graphs(name, model_of, monkeypatch):
    model = model_of(name)
    plain, compiled = begun(model, 2), begun(model, 2)
    monkeypatch.setattr(sessions, "check_compiles", lambda model: None)
    compiled.compile()
    graphs = graphs_of_steps(plain, compiled, 2)
    anew = any(mixer.recompiles for mixer in model.mixers())
    half = STEPS // 2
    assert (graphs[-1] - graphs[half - 1] == half) == anew, graphs  # one for each length
    assert graphs[0] > 0 and (anew or graphs[-1] <= 4), graphs


def test_forks_take_compiled_steps(model_of):
    plain = begun(model_of("flash"), 1)
    compiled = plain.fork(1)
    compiled.compile()
    graphs_of_steps(plain.fork(3), compiled.fork(3), 3)


def test_refused(model_of, monkeypatch):
    session = begun(model_of("sparse_flash"), 1)
    with pytest.raises(ConfigError, match="compile=true does not help SparseFlash"):
        session.compile()
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ConfigError, match="needs a C"):
        begun(model_of("flash"), 1).compile()


@pytest.mark.slow
def test_machine_code_writes_the_same_text(compose_config, run_training, shared_cache, tmp_path, monkeypatch):
    monkeypatch.undo()
    folder = run_training(f"data.cache_dir={shared_cache}")
    found = []
    for compiled in (False, True):
        words = (f"checkpoint={folder}", "prompt=[We,The President]", "temperature=0", "max_tokens=12")
        config = compose_config(*words, f"compile={compiled}", entry_point="generate")
        found.append(generate(config).texts)
        path = tmp_path / f"{compiled}.jsonl"
        answer(dataclasses.replace(read(GenerateConfig, config), output=str(path)))
        found.append([json.loads(line)["text"] for line in path.read_text().splitlines()])
    assert len(found[0]) == 2 and all(texts == found[0] for texts in found)
