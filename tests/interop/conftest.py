"""Saved small models, and the command line of the Hugging Face folders."""

import sys

import pytest
import torch
from hf_folders import SMALL

from longmix.checkpoints import CheckpointStore
from longmix.config import ModelConfig, resolved
from longmix.data.tokens.tokenizers import ByteTokenizer
from longmix.model.build import build_model


@pytest.fixture
def saved(compose_config, tmp_path):
    """`saved("mixer=flash", ...)` is the folder of a checkpoint with noise on every weight, and its model."""

    def make(*overrides: str, tokenizer=None, change=lambda model: None):
        torch.manual_seed(0)
        tokenizer = tokenizer or ByteTokenizer()
        config = resolved(compose_config(*SMALL, *overrides))
        model = build_model(ModelConfig.of(config), tokenizer.vocab_size).eval()
        change(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        state = {"step": 7, "model": model.state_dict(), "config": config, "tokenizer": tokenizer.state()}
        CheckpointStore(tmp_path / "run" / "checkpoints").save(state, {})
        return tmp_path / "run", model

    return make


@pytest.fixture
def command(monkeypatch, capsys):
    """`command("import", ...)` runs the command line; the exit code and the lines of the error."""

    def run(*words) -> tuple[int, list[str]]:
        from longmix.interop.huggingface.__main__ import main

        monkeypatch.setattr(sys, "argv", ["huggingface", *map(str, words)])
        code = main()
        printed = capsys.readouterr()
        return code, (printed.err if code else printed.out).splitlines()

    return run
