"""Rung 1: the definition against numerical gradients, its own special cases, and oracles that are not ours."""

import pytest
import torch
from delta_cases import INPUTS, Case, assert_close, call, gradients
from torch.nn import functional as F

from longmix_kernels.delta import delta_rule


def reference(case: Case, inputs: dict, **options) -> list[torch.Tensor]:
    return call(delta_rule, case, inputs, backend="reference", **options)


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", length=5, batch=1, heads=1, dim=2, value_dim=3),
        Case("documents", length=5, batch=1, heads=2, dim=2, value_dim=1, documents=(2,)),
        Case("scalar", length=4, batch=1, heads=1, dim=3, value_dim=2, scalar_decay=True, low_rank=False),
    ],
    ids=lambda case: case.name,
)
def test_gradients_against_finite_differences(case):
    inputs = case.inputs(torch.float64)
    wanted = {name: x for name, x in inputs.items() if x is not None}

    def seen(*tensors):
        return tuple(reference(case, {**inputs, **dict(zip(wanted, tensors, strict=True))}))

    assert torch.autograd.gradcheck(seen, list(wanted.values()))


def test_against_flash_linear_attention_with_gradients():
    oracle = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive", reason="an optional oracle")
    case = Case("oracle", length=40)
    inputs = case.inputs(torch.float32)
    ours = reference(case, inputs)
    query, key, value, decay, read, write = (inputs[name].transpose(1, 2) for name in INPUTS[:6])
    output, state = oracle.dplr_recurrence(
        query * case.dim**0.5, key, value, read, write, decay,
        initial_state=inputs["initial_state"], output_final_state=True,
    )  # fmt: skip
    theirs = [output.transpose(1, 2), state]
    for name, a, b in zip(("output", "state"), ours, theirs, strict=True):
        assert_close(a, b, 1e-5, name)
    mine, their = gradients(ours, inputs), gradients(theirs, inputs)
    for name in mine:
        assert_close(mine[name], their[name], 1e-4, name)


def family(seed: int = 0) -> dict[str, torch.Tensor]:
    """What the delta family is given: unit keys, a write strength beta and a decay."""
    generator = torch.Generator().manual_seed(seed)
    shape = 2, 40, 3, 16
    query, key, value, decay = (torch.randn(shape, generator=generator) for _ in range(4))
    beta = torch.rand(shape[:3], generator=generator)
    return {"q": query, "k": F.normalize(key, dim=-1), "v": value, "beta": beta, "decay": F.logsigmoid(decay)}


def test_special_cases_against_flash_linear_attention():
    pytest.importorskip("fla", reason="an optional oracle")
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.kda.naive import naive_recurrent_kda

    x = family()
    beta, scale = x["beta"].unsqueeze(-1), 0.25

    def ours(log_decay, read=None):
        write = None if read is None else x["k"]
        key = x["k"] if read is None else beta * x["k"]
        options = {"low_rank_read": read, "low_rank_write": write, "scale": scale, "backend": "reference"}
        return delta_rule(x["q"], key, x["v"], log_decay=log_decay, **options)[0]

    head_decay = x["decay"][..., 0]
    gated = ours(head_decay, -beta * head_decay.exp().unsqueeze(-1) * x["k"])
    oracle = naive_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], x["beta"], head_decay, scale=scale)
    assert_close(gated, oracle[0] if isinstance(oracle, tuple) else oracle, 1e-5, "gated delta rule")

    kimi = ours(x["decay"], -beta * x["decay"].exp() * x["k"])
    oracle = naive_recurrent_kda(x["q"], x["k"], x["v"], x["decay"], x["beta"], scale=scale)
    assert_close(kimi, oracle[0] if isinstance(oracle, tuple) else oracle, 1e-5, "kimi delta attention")

    oracle = naive_recurrent_gla(x["q"], x["k"], x["v"], x["decay"])
    assert_close(ours(x["decay"]), oracle[0] if isinstance(oracle, tuple) else oracle, 1e-5, "gated linear attention")


def test_a_document_begins_from_the_initial_state():
    case = Case("packed", length=30, batch=1, documents=(12,))
    inputs = case.inputs(torch.float64)
    packed = reference(case, inputs)
    second = {name: x if name in INPUTS[6:] else x[:, 12:] for name, x in inputs.items()}
    alone = reference(Case("alone", length=18, batch=1), second)
    assert_close(packed[0][:, 12:], alone[0], 1e-14, "second document")
    assert_close(packed[1], alone[1], 1e-14, "state")


def test_writing_what_was_read_replaces_it():
    """With beta = 1 and no decay the state returns, for the key just written, exactly the new value."""
    torch.manual_seed(0)
    key, value = F.normalize(torch.randn(1, 20, 1, 8, dtype=torch.float64), dim=-1), torch.randn(1, 20, 1, 4).double()
    decay = torch.zeros(1, 20, 1, dtype=torch.float64)
    options = {"log_decay": decay, "low_rank_read": -key, "low_rank_write": key, "scale": 1.0, "backend": "reference"}
    assert_close(delta_rule(key, key, value, **options)[0], value, 1e-13, "output")
