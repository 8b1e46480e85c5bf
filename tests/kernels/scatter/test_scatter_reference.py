"""Rung 1: the definition against numerical gradients, dense softmax, and what the estimator promises."""

import pytest
import torch
from scatter_cases import INPUTS, Case, assert_close, call, everything
from torch.nn import functional as F

EXACT = torch.float64


def reference(case: Case, inputs: dict, **options):
    return call(case, inputs, backend="reference", **options)


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", length=7, batch=1, heads=1, key_heads=1, dim=2, value_dim=2, features=2, block_size=2),
        Case("grouped", length=5, batch=1, heads=2, key_heads=1, dim=2, value_dim=1, features=2, block_size=1),
        Case(
            "state", length=6, queries=4, batch=1, heads=1, key_heads=1, dim=2, value_dim=2, features=2, block_size=2,
            past_blocks=0, documents=(4,), with_state=True,
        ),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_gradients_against_finite_differences(case):
    inputs = case.inputs(EXACT)
    wanted = {name: x for name, x in inputs.items() if x is not None and name != "log_scale"}

    def seen(*tensors):
        return tuple(reference(case, {**inputs, **dict(zip(wanted, tensors, strict=True))})[:2])

    assert torch.autograd.gradcheck(seen, list(wanted.values()))


def one_by_one(case: Case, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition once more, from one list of weights for every query."""
    query, key, value, log_q, log_k, *state = (None if inputs[n] is None else inputs[n].detach() for n in INPUTS)
    group, ids = case.heads // case.key_heads, case.document_ids()
    ids = torch.zeros(case.batch, case.length) if ids is None else ids
    output, logsumexp = (
        torch.zeros(*query.shape[:3], case.value_dim, dtype=EXACT),
        torch.zeros(query.shape[:3]).double(),
    )
    offset = case.length - query.shape[1]
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        kv, own = h // group, i + offset
        first = int((ids[b] == ids[b, own]).nonzero()[0])
        exact = first + max(0, (own - first) // case.block_size - case.past_blocks) * case.block_size
        logs = [query[b, i, h] @ key[b, j, kv] * case.dim**-0.5 for j in range(exact, own + 1)]
        logs += [(log_q[b, i, h] + log_k[b, j, kv]).logsumexp(0) for j in range(first, exact)]
        values = [value[b, j, kv] for j in (*range(exact, own + 1), *range(first, exact))]
        if state[0] is not None and first <= offset:
            memory, normalizer, scale = (x[b, kv] for x in state)
            logs += list(log_q[b, i, h] + scale + normalizer.log())
            values += list(memory / normalizer[:, None])
        logs = torch.stack(logs)
        logsumexp[b, i, h] = logs.logsumexp(0)
        output[b, i, h] = logs.softmax(0) @ torch.stack(values)
    return output, logsumexp


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", length=40, block_size=4),
        Case("documents", length=40, block_size=4, past_blocks=0, documents=(13, 2, 20), heads=4),
        Case("state", length=40, queries=25, block_size=4, documents=(22,), with_state=True),
    ],
    ids=lambda case: case.name,
)
def test_against_weights_listed_one_by_one(case):
    inputs = case.inputs(EXACT)
    result, (output, logsumexp) = reference(case, inputs), one_by_one(case, inputs)
    assert_close(result.output, output, 1e-13, "output")
    assert_close(result.logsumexp, logsumexp, 1e-13, "logsumexp")


def dense(inputs: dict, mask: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = (inputs[name].transpose(1, 2) for name in INPUTS[:3])
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask is None else mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_a_local_part_that_covers_everything_is_exact_softmax(backend):
    for length, block, past in ((100, 25, 3), (100, 100, 0), (60, 50, 1), (3, 8, 0)):
        case = Case("covered", length=length, block_size=block, past_blocks=past)
        inputs = case.inputs(EXACT)
        result = call(case, inputs, backend=backend)
        assert_close(result.output, dense(inputs), 1e-14, "output")
        assert_close(result.logsumexp, result.exact_logsumexp, 1e-14, "logsumexp")


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("past", [0, 2])
def test_no_features_is_block_local_attention(backend, past):
    case = Case("local", features=0, past_blocks=past)
    inputs = case.inputs(EXACT)
    block = torch.arange(case.length) // case.block_size
    mask = (block[:, None] - block <= past).tril()
    assert_close(call(case, inputs, backend=backend).output, dense(inputs, mask), 1e-14, "output")


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("changes", [{}, {"documents": (30, 50)}, {"spread": 10.0}], ids=str)
def test_weights_sum_to_one(backend, changes):
    """In one published causal port they sum to two."""
    case = Case("ones", **changes)
    inputs = case.inputs(EXACT)
    inputs["value"] = torch.ones_like(inputs["value"])
    assert_close(call(case, inputs, backend=backend).output, torch.ones(2, 100, 2, 12), 1e-13, "output")


def test_features_that_factor_the_scores_give_exact_softmax():
    """With one feature, exp(q . k) for one-dimensional keys that are all alike."""
    case = Case("factored", dim=1, features=1, heads=1, key_heads=1)
    inputs = case.inputs(EXACT)
    inputs["key"] = torch.full_like(inputs["key"], 0.7)
    inputs["query_features"], inputs["key_features"] = 0.7 * inputs["query"], torch.zeros(2, 100, 1, 1, dtype=EXACT)
    result = reference(case, inputs)
    assert_close(result.output, dense(inputs), 1e-13, "output")


def test_a_document_is_what_it_is_alone():
    case = Case("packed", length=90, batch=1, documents=(37, 53))
    inputs = case.inputs(EXACT)
    packed = everything(case, inputs, backend="reference")
    for start, stop in ((0, 37), (37, 90)):
        part = {name: None if x is None else x.detach()[:, start:stop].requires_grad_() for name, x in inputs.items()}
        alone = reference(Case("alone", length=stop - start, batch=1), part)
        assert_close(packed["output"][:, start:stop], alone.output, 1e-13, "output")
        assert_close(packed["logsumexp"][:, start:stop], alone.logsumexp, 1e-13, "logsumexp")


def test_scale_is_of_the_exact_scores_alone():
    case = Case("scaled")
    inputs = case.inputs(EXACT)
    given = reference(case, inputs, scale=0.5)
    inputs["query"] = inputs["query"] * 0.5 * case.dim**0.5
    assert_close(given.output, reference(case, inputs).output, 1e-13, "output")


def test_the_default_backend_is_blocked():
    case = Case("default")
    inputs = case.inputs(EXACT)
    assert torch.equal(call(case, inputs).output, call(case, inputs, backend="blocked").output)
