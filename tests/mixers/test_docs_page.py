"""The mixers of docs/add_a_mixer.md keep the contract as they are printed there."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_calls
import test_contract
import test_flop_counts
import torch
import yaml
from mixer_table import SHAPE

from longmix.config import ModelConfig, check, resolved
from longmix.generation.session import Session
from longmix.mixers.parts.base import Mixer
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model

PAGE = (Path(__file__).parents[2] / "docs/add_a_mixer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
SETTINGS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)]


@pytest.fixture(params=BLOCKS, ids=["SSD", "Hawk"])
def page(request, monkeypatch) -> ModuleType:
    """A block of code as a module of another package."""
    module = ModuleType("somebody")
    monkeypatch.setitem(sys.modules, "somebody", module)
    exec(request.param, vars(module))  # the page's own code
    return module


def kind_of(page: ModuleType) -> type[Mixer]:
    return next(kind for name, kind in vars(page).items() if name in ("SSD", "Hawk"))


@pytest.fixture
def mixer(page) -> Mixer:
    torch.manual_seed(1)
    return kind_of(page)(SHAPE, 0).double()


CONTRACT = {
    "packed-documents": test_contract.test_a_packed_document_equals_the_document_alone,
    "other-documents": test_contract.test_a_document_changes_nothing_in_another,
    "causality": test_contract.test_later_tokens_never_change_earlier_outputs,
    "audit": test_contract.test_the_audit_finds_no_leak,
    "gradients": test_contract.test_every_parameter_gets_a_gradient,
    "no-state": test_contract.test_without_a_state_none_is_returned,
    "state-bytes": test_contract.test_state_bytes_are_what_the_state_holds,
    "ids-left-out": test_contract.test_ids_left_out_continue_the_last_document,
    "shapes": test_calls.test_tokens_of_another_shape_are_refused,
    "document-0": test_calls.test_rows_without_ids_are_document_0,
    "autocast": test_calls.test_autocast_leaves_states_and_gates_exact,
}


@pytest.mark.parametrize("check", CONTRACT.values(), ids=CONTRACT)
def test_the_page_keeps_the_contract(mixer, check):
    check(mixer)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_the_page_goes_on_from_states(mixer, packed):
    for split in test_contract.SPLITS.values():
        test_contract.test_prefill_and_steps_equal_one_pass(mixer, split, packed)
    for values in test_calls.NUMBERED.values():
        test_calls.test_ids_may_begin_anywhere(mixer, values, (3, 1, 1, 15, 9))


def test_the_page_counts_its_products(mixer):
    x = torch.randn(2, 64, SHAPE.d_model, dtype=torch.float64)
    with torch.no_grad():
        assert test_flop_counts.counted(mixer, x) == pytest.approx(2 * mixer.flops(64), rel=1e-3)


def test_the_page_trains_in_bfloat16(page, compose_config):
    node = resolved(
        compose_config("model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.mlp_hidden=16")
    )
    model = build_model(ModelConfig.of({**node, "mixer": {"_target_": f"somebody.{kind_of(page).__name__}"}}), 11)
    tokens = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens).token_losses.mean().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_the_page_is_saved_and_loaded(page, tmp_path):
    model = LanguageModel(kind_of(page), 20, d_model=16, num_layers=2, num_heads=2, mlp_hidden=8).double().eval()
    session = Session(model, 2)
    session.prefill([torch.arange(7), torch.arange(5)])
    session.save(tmp_path / "saved", {})
    loaded, _ = Session.load(tmp_path / "saved", model, torch.device("cpu"))
    for each in (session, loaded):
        each.step(torch.tensor([3, 4]))
    assert torch.equal(loaded.logits, session.logits)


@pytest.mark.parametrize("page", BLOCKS[:1], indirect=True, ids=["SSD"])
def test_the_file_of_settings_names_all_of_them(page):
    assert len(SETTINGS) == 1 and len(BLOCKS) == 2
    check({**SETTINGS[0], "_target_": "somebody.SSD"}, "mixer", {"shape", "layer_index"})
    assert SETTINGS[0] == {"_target_": "longmix.mixers.ssd.SSD", "num_heads": None, "key_factor": 0.5}
