"""The dynamical form: Phi reproduces the output, and sizes and decays are those of the layer."""

import math

import pytest
import torch

from longmix.analysis.dsf import dynamical_form
from longmix.analysis.effective_attention import engine_call, layer_inputs
from longmix.batch import Batch

LENGTH = 21


def inputs_of(model) -> list:
    tokens = torch.randint(20, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    return layer_inputs(model, Batch(tokens=tokens, targets=tokens, document_ids=None))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("retention", 8),
        ("gla", 8),
        ("gated_deltaproduct", 8),
        ("flash", 2 * LENGTH),
        pytest.param("rwkv7", 16, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_form_of_a_layer(small_model, name, size):
    model = small_model(name, dtype=torch.float32)
    mixer = model.mixers()[1]
    x, options = inputs_of(model)[1]
    form = dynamical_form(mixer, x, options)
    assert form.holds and form.error < 1e-10 and form.state_size == size
    assert form.state_entries == size * (48 if name == "gated_deltaproduct" else 64)
    assert next(mixer.parameters()).dtype == torch.float32, "the model itself stays as it is"
    if name == "flash":
        assert form.decay_product is None and form.half_life is None
        return
    decay = engine_call(mixer, x, **options).options["log_decay"]
    totals = [LENGTH * d for d in decay.tolist()] if decay.dim() == 1 else decay.sum(1).flatten().tolist()
    assert form.decay_product == pytest.approx(math.exp(max(totals)), rel=1e-4) and form.half_life > 0


@torch.no_grad()
def test_a_layer_that_is_not_linear_in_its_values_does_not_hold(small_model, monkeypatch):
    model = small_model("gla")
    mixer = model.mixers()[1]
    x, options = inputs_of(model)[1]
    call = type(mixer).call_engine

    def bent(self, function, *given, **others):
        def squared(*inputs, **settings):
            output, state = function(*inputs, **settings)
            return output.square(), state

        return call(self, squared, *given, **others)

    monkeypatch.setattr(type(mixer), "call_engine", bent)
    assert not dynamical_form(mixer, x, options).holds


@torch.no_grad()
def test_layers_that_share_projections_have_a_form_too(small_model):
    shared = "model.share.names=[value,output]", "model.share.atoms=1", "model.share.coefficients=mlp"
    model = small_model("gla", *shared, dtype=torch.float32)
    assert dynamical_form(model.mixers()[1], *inputs_of(model)[1]).holds
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}, "the model itself stays as it is"
