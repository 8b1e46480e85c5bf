"""Local linear attention by its definition, and attention with the probe that makes it the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import assert_close

from longmix_kernels.attention import probe_attention
from longmix_kernels.attention.reference_lla import local_linear_attention

ORACLES = Path(__file__).parents[2] / "fixtures" / "model_side"
TOLERANCE = 1e-9  # of ill conditioned matrices


@pytest.mark.parametrize("name", ["lla", "lla_small_ridge"])
def test_equals_the_published_equations(name):
    oracle = np.load(ORACLES / f"{name}.npz")
    tensors = [torch.tensor(oracle[x]).requires_grad_() for x in "qkv"]
    options = {"ridge": float(oracle["ridge"]), "scale": float(oracle["scale"])}
    output, probe = local_linear_attention(*tensors, **options)
    grads = torch.autograd.grad(output, tensors, torch.tensor(oracle["grad_o"]))
    wanted = [torch.tensor(oracle[x]) for x in ("o", "probe", "grad_q", "grad_k", "grad_v")]
    for result, want, key in zip((output, probe, *grads), wanted, ("o", "probe", *"qkv"), strict=True):
        assert_close(result, want, TOLERANCE, key)
    # The teacher: with this probe, attention with a probe is local linear attention.
    found = probe_attention(tensors[0], probe, *tensors[1:], scale=options["scale"])
    assert_close(found, output, TOLERANCE, "with a probe")


def test_documents_and_heads_that_share_keys():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 30, heads, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    ids = (torch.arange(30) // 11).int().expand(2, -1)
    output, probe = local_linear_attention(query, key, value, document_ids=ids)
    alone, _ = local_linear_attention(query[:, 11:22], key[:, 11:22], value[:, 11:22])
    assert_close(output[:, 11:22], alone, TOLERANCE, "a document")
    heads, _ = local_linear_attention(query, *(x.repeat_interleave(2, 2) for x in (key, value)), document_ids=ids)
    assert_close(output, heads, TOLERANCE, "heads")
    last, _ = local_linear_attention(query[:, -3:], key, value, document_ids=ids)
    assert_close(last, output[:, -3:], TOLERANCE, "last rows")
    assert_close(probe_attention(query, probe, key, value, document_ids=ids), output, TOLERANCE, "with a probe")
    with pytest.raises(ValueError, match="ridge=0"):
        local_linear_attention(query, key, value, ridge=0)


def test_it_follows_a_piecewise_linear_function_better_than_softmax_attention_and_a_line():
    """The claim of arXiv 2510.01450, at the best bandwidth and ridge of each; errors relative to the variance."""
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(1, n, 1, 4, generator=generator, dtype=torch.float64) for n in (64, 24))
    keys, queries = (2 * x / x.norm(dim=-1, keepdim=True) for x in (keys, queries))
    corners = torch.randn(8, 4, generator=generator, dtype=torch.float64) / 2

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x @ corners.T).abs().sum(-1, keepdim=True)

    def error(scale: float, ridge: float) -> float:
        # Each query comes after all keys.
        rows = (
            local_linear_attention(q, keys, function(keys), ridge=ridge, scale=scale)[0] for q in queries.split(1, 1)
        )
        missed = torch.cat(list(rows), 1) - function(queries)
        return (missed.square().mean() / function(queries).var()).item()

    local = min(error(scale, 1.0) for scale in (0.3, 1.0, 2.0))
    line = error(1e-9, 1.0)
    averaged = min(error(scale, 1e12) for scale in (0.3, 1.0, 2.0, 4.0))  # no slope is left
    print(f"errors: {local:.2f} locally linear, {averaged:.2f} softmax, {line:.2f} a line")
    assert local < 0.75 * averaged < averaged < 0.75 * line
