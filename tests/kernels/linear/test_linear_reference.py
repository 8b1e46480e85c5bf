"""Rung 1: the definition against itself in another form, numerical gradients, and oracles that are not ours."""

import pytest
import torch
from linear_cases import CASES, INPUTS, REGIMES, Case, assert_close, call, gradients, meaning

from longmix_kernels.linear import linear_attention
from longmix_kernels.linear.inputs import Inputs
from longmix_kernels.linear.reference import parallel

SMALL = [case for case in CASES if case.length <= 300 and (case.chunk_size is None or case.with_carried)]


def in_parallel(case: Case, inputs: dict) -> torch.Tensor:
    tensors = (inputs[name] for name in INPUTS)
    return parallel(Inputs(*tensors, case.document_ids(), case.normalize, case.dim**-0.5, None))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_recurrent_and_parallel_agree(case):
    inputs = case.inputs(torch.float64)
    wanted = {name: x for name, x in inputs.items() if x is not None}
    output = call(linear_attention, case, inputs, backend="reference")[0]
    other = in_parallel(case, inputs)
    assert_close(other, output, 1e-12, "output")
    grad = torch.randn_like(output)
    grads = [torch.autograd.grad(x, list(wanted.values()), grad) for x in (other, output)]
    for name, a, b in zip(wanted, *grads, strict=True):
        assert_close(a, b, 1e-11, name)


@pytest.mark.parametrize(
    "case",
    [
        Case("exp", length=5, batch=1, heads=1, dim=2, value_dim=3, documents=(2,)),
        Case("sig", length=5, batch=1, heads=1, dim=2, value_dim=3, normalize=False),
        Case("exp-strong", length=4, batch=1, heads=1, dim=2, value_dim=1, regime="strong-input"),
    ],
    ids=lambda case: case.name,
)
def test_gradients_against_finite_differences(case):
    inputs = case.inputs(torch.float64)
    wanted = {name: x for name, x in inputs.items() if x is not None}
    raw = call(linear_attention, case, inputs, backend="reference")
    constant = raw[-1].detach().amax().clamp(min=0.0) if case.normalize else 0.0

    def seen(*tensors):
        output, *final = call(
            linear_attention, case, {**inputs, **dict(zip(wanted, tensors, strict=True))}, backend="reference"
        )
        if not case.normalize:
            return output, *final
        # What the state means, its log scale taken from the values and not through autograd, does not depend on it.
        factor = (final[2].detach() - constant).exp()
        return output, final[0] * factor[..., None, None], final[1] * factor[..., None]

    assert torch.autograd.gradcheck(seen, list(wanted.values()), atol=1e-6)


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "zero"])
@pytest.mark.parametrize("regime", REGIMES)
def test_against_the_authors_chunkwise_kernel(regime, with_state):
    """mlstm-kernels' own torch form, head-first; its eps of 0 is what the paper writes. Output, state, gradients."""
    oracle = pytest.importorskip("mlstm_kernels.torch", reason="an optional oracle").get_mlstm_kernel(
        "chunkwise--native_autograd"
    )
    case = Case("oracle", length=128, regime=regime, with_state=with_state)
    inputs = case.inputs(torch.float64)
    forget = (inputs["log_decay"].detach().exp()).logit().requires_grad_()
    inputs["log_decay"] = torch.nn.functional.logsigmoid(forget)
    results = call(linear_attention, case, inputs, backend="reference")

    query, key, value, gate = (inputs[name].transpose(1, 2) for name in ("query", "key", "value", "log_input"))
    state = (inputs["memory"], inputs["normalizer"], inputs["log_scale"])
    state = (*state[:2], state[2][..., None]) if with_state else (None, None, None)
    output, final = oracle(
        query, key, value, gate, forget.transpose(1, 2),
        c_initial=state[0], n_initial=state[1], m_initial=state[2],
        return_last_states=True, eps=0.0, chunk_size=32, autocast_kernel_dtype=torch.float64,
    )  # fmt: skip
    theirs = [output.transpose(1, 2), final[0], final[1], final[2].squeeze(-1)]
    assert_close(results[0], theirs[0], 1e-10, "output")
    for a, b in zip(meaning(results[1:]), meaning(theirs[1:]), strict=True):
        assert_close(a, b, 1e-10, "state")
    inputs["log_decay"] = forget
    for name, (a, b) in {
        name: (a, b)
        for (name, a), b in zip(gradients(results, inputs).items(), gradients(theirs, inputs).values(), strict=True)
    }.items():
        assert_close(a, b, 1e-9, name)


def test_against_the_authors_parallel_sigmoid_form():
    oracle = pytest.importorskip("mlstm_kernels.torch", reason="an optional oracle").get_mlstm_kernel(
        "parallel--native_siging_autograd"
    )
    case = Case("oracle", length=100, normalize=False, with_state=False)
    inputs = case.inputs(torch.float64)
    forget, gate = (inputs[name].detach().exp().logit().requires_grad_() for name in ("log_decay", "log_input"))
    theirs = oracle(
        *(inputs[name].transpose(1, 2) for name in INPUTS[:3]),
        gate.transpose(1, 2), forget.transpose(1, 2), normalize=False,
    )  # fmt: skip
    assert_close(call(linear_attention, case, inputs, backend="reference")[0], theirs.transpose(1, 2), 1e-11, "output")


def test_a_reset_is_complete_where_a_closed_gate_would_leak():
    """At a boundary from input gate +15 to -15, a decay of exp(-25) leaves 150 times the new document's own output."""
    case = Case("reset", length=40, batch=1, documents=(20,), with_state=False)
    inputs = case.inputs(torch.float64)
    gate = torch.where(torch.arange(40) < 20, 15.0, -15.0).double().view(1, 40, 1).expand(1, 40, 2)
    inputs["log_input"] = gate.contiguous()
    packed = call(linear_attention, case, inputs, backend="reference")[0][:, 20:]
    alone = {name: x if x is None else x[:, 20:] for name, x in inputs.items()}
    separate = call(linear_attention, Case("alone", length=20, batch=1), alone, backend="reference")[0]
    assert_close(packed, separate, 1e-13, "second document")
    closed = inputs["log_decay"].detach().clone()
    closed[:, 20] = -25.0
    leaky = call(
        linear_attention, Case("leak", length=40, batch=1), {**inputs, "log_decay": closed}, backend="reference"
    )
    assert (leaky[0][:, 20:] - separate).abs().max() > 10 * separate.abs().max()


def test_a_constant_decay_is_one_number_a_head():
    case = Case("retention", normalize=False, gated=False, with_state=False)
    inputs = case.inputs(torch.float64)
    query, key, value = (inputs[name] for name in INPUTS[:3])
    decay = torch.tensor([0.9, 0.5], dtype=torch.float64).log()
    output, state = linear_attention(query, key, value, log_decay=decay, backend="reference")
    position = torch.arange(100)
    distance = (position[:, None] - position).double()
    weights = (decay.view(-1, 1, 1) * distance).exp().tril()
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * case.dim**-0.5 * weights
    assert_close(output, torch.einsum("bhij,bjhd->bihd", scores, value), 1e-12, "output")
    assert state.normalizer is None and state.log_scale is None
