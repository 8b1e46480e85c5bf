"""Combiner against the authors' code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longmix.errors import ConfigError
from longmix.mixers import combiner_log
from longmix.mixers.combiner import Combiner
from longmix.mixers.combiner_log import CombinerLog
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.scatterbrain_summaries import Blocks

ORACLES = Path(__file__).parents[1] / "fixtures/model_side"


@pytest.mark.parametrize("name", ["fixed", "fixed_b", "fixed_documents", "logn"])
def test_outputs_and_gradients_are_the_authors(name):
    given = {key: torch.tensor(x) for key, x in np.load(ORACLES / f"combiner_{name}.npz").items()}
    tensors = [given[part].requires_grad_() for part in ("q", "k", "v")]
    shape = ModelShape(tensors[0].shape[2] * tensors[0].shape[3], 1, tensors[0].shape[2])
    fixed = name.startswith("fixed")
    mixer = Combiner(shape, 0, block=int(given["segment"])) if fixed else CombinerLog(shape, 0)
    mixed, _ = mixer.double().attend(mixer.rows(*tensors, given.get("document_ids")))
    for found, wanted in zip(
        (mixed, *torch.autograd.grad(mixed, tensors, given["grad_o"])),
        (given[part] for part in ("o", "grad_q", "grad_k", "grad_v")),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize(("queries", "keys"), [(21, 21), (16, 16), (1, 1), (5, 21)])
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_one_key_of_each_level_is_what_the_engine_sees(queries, keys, documents, sinks, monkeypatch):
    """A CPU takes no engine for the log form; other devices do."""
    torch.manual_seed(keys)
    mixer = CombinerLog(ModelShape(32, 1, 4), 0, num_kv_heads=2, sink_logits=sinks).double()
    ids = torch.randint(2, (2, keys), dtype=torch.int32).cumsum(1, dtype=torch.int32) if documents else None
    tensors = [torch.randn(2, keys, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    gradient = torch.randn(2, queries, 4, 8, dtype=torch.float64)
    found = []
    for kind in ("cpu", "cuda"):
        monkeypatch.setattr(combiner_log, "device_kind", lambda device, kind=kind: kind)
        rows = mixer.rows(*tensors, ids)
        rows.query, rows.sinks = rows.query[:, keys - queries :], mixer.sink_logit
        mixed, _ = mixer.attend(rows)
        found.append([mixed, *torch.autograd.grad(mixed, tensors, gradient)])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12 * (1 + float(other.detach().abs().max())))


@pytest.mark.parametrize("size", [1, 3, 4, 16, 50])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_blocks_that_lie_side_by_side_are_pooled_as_others(size, pool):
    torch.manual_seed(size)
    tensors = [torch.randn(2, 21, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    kinds = [Blocks.of(ids, 2, 21, size, torch.device("cpu")) for ids in (None, torch.zeros(2, 21, dtype=torch.int32))]
    assert kinds[0].size == size and kinds[1].size is None and kinds[0].count == kinds[1].count
    factor = torch.randn(2, 21, 2, 1, dtype=torch.float64)
    found = []
    for blocks in kinds:
        key, value = blocks.summaries(*tensors, 0.3, pool)
        seen = blocks.times(factor, value)
        total = key.sin().sum() + seen.cos().sum() + blocks.spread(key).exp().sum()
        gradients = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
        found.append([key, value, seen, *gradients])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12 * (1 + float(other.detach().abs().max())))


def test_an_unknown_pool_is_refused():
    with pytest.raises(ConfigError, match=r"mixer\.pool=sum is unknown; use mean or max"):
        Combiner(ModelShape(8, 1, 1), 0, pool="sum")


def test_pairs_of_the_log_form_are_counted_without_a_loop_over_positions():
    mixer = CombinerLog(ModelShape(12, 1, 2), 0)
    for length in range(70):
        assert mixer.visible_pairs(length) == length + sum(position.bit_count() for position in range(length))
    assert mixer.visible_pairs(2**50) == 2**50 + 50 * 2**49
