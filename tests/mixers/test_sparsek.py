"""SparseK: the operator and the mixer against dense oracles, and which keys win where scores are equal."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.kept_blocks import FarBlocks
from longmix.mixers.parts.kept_keys import Pool
from longmix.mixers.parts.sparsek_operator import sparsek, threshold
from longmix.mixers.sparsek import SparseK

ORACLES = Path(__file__).parents[1] / "fixtures/model_side"


def oracle(name: str) -> dict[str, Tensor]:
    return {key: torch.tensor(x) for key, x in np.load(ORACLES / f"{name}.npz").items()}


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max().clamp(min=1)))


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_the_operator_and_its_gradient_are_the_oracles(case, shift):
    given = oracle("sparsek_operator")
    scores, count = given[f"z{case}"].requires_grad_(), int(given[f"k{case}"])
    gates = sparsek(scores + shift, count)
    tolerance = 1e-12 if shift == 0 else 1e-11  # that of 1,000 in float64
    torch.testing.assert_close(gates, given[f"p{case}"], rtol=0, atol=tolerance)
    (grad,) = torch.autograd.grad(gates, scores, given[f"grad_p{case}"])
    torch.testing.assert_close(grad, given[f"grad_z{case}"], rtol=0, atol=tolerance)
    if len(scores) > count:
        close(threshold(given[f"z{case}"], count), given[f"tau{case}"][None])


def test_scores_that_are_not_there_change_nothing():
    given = oracle("sparsek_operator")
    there = torch.arange(45) % 9 != 4
    scores = torch.full((45,), -torch.inf, dtype=torch.float64)
    scores[there] = given["z1"]
    gates = sparsek(scores.requires_grad_(), int(given["k1"]), there)
    close(gates[there], given["p1"])
    assert not gates[~there].any()
    (grad,) = torch.autograd.grad(gates[there], scores, given["grad_p1"])
    close(grad[there], given["grad_z1"])
    assert not grad[~there].any()


def gates_of_rows(mixer: SparseK, key: Tensor, score: Tensor, ids: Tensor | None) -> Tensor:
    """The gate with which each row sees each key, [B, Hkv, T, T], 0 for none, from what the mixer chooses."""
    blocks = FarBlocks.of(ids, key, mixer.block, mixer.past_blocks, None)
    chosen = blocks.choose(Pool(key, key, score), None, mixer.keep)
    length = key.shape[1]
    number = blocks.position // mixer.block
    begin = torch.arange(length) - blocks.position % mixer.block
    place = torch.where(number > mixer.past_blocks, begin // mixer.block - mixer.past_blocks, 0)
    index = place[:, None, :, None].expand(-1, chosen.rows.shape[1], -1, mixer.keep)
    rows, gates, there = (x.gather(2, index) for x in chosen)
    found = torch.zeros(*rows.shape[:3], length, dtype=gates.dtype)
    return found.scatter_add(3, rows, gates * there)


@pytest.mark.parametrize("name", ["sparsek_blocks", "sparsek_blocks_documents", "sparsek_blocks_value_gate"])
def test_blocks_are_the_dense_form(name):
    given = oracle(name)
    query, key, value, score = (given[part].requires_grad_() for part in ("q", "k", "v", "score"))
    mixer = SparseK(
        ModelShape(query.shape[2] * query.shape[3], 1, query.shape[2]),
        0,
        keep=int(given["keep"]),
        block=int(given["block"]),
        past_blocks=int(given["past_blocks"]),
        num_kv_heads=key.shape[2],
        gate="value" if name.endswith("value_gate") else "log",
    ).double()
    ids = given.get("document_ids")
    mixed, _ = mixer.attend(Rows(query, key, value, ids, key_labels=score))
    close(mixed, given["o"])
    grads = torch.autograd.grad(mixed, (query, key, value, score), given["grad_o"])
    for part, grad in zip(("q", "k", "v", "score"), grads, strict=True):
        close(grad, given[f"grad_{part}"])
    close(gates_of_rows(mixer, key, score, ids), given["p"])


def test_of_equal_scores_the_latest_keys_are_kept():
    """So that training, prefill and decoding agree there too, as with slope 0 at the beginning."""
    mixer = SparseK(ModelShape(8, 1, 1), 0, keep=3, block=2, past_blocks=0)
    key = torch.randn(1, 13, 1, 8)
    found = gates_of_rows(mixer, key, torch.zeros(1, 13, 1), None)[0, 0]
    for row in range(13):
        left = row // 2 * 2
        assert found[row].nonzero()[:, 0].tolist() == list(range(max(0, left - 3), left))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "mixer.keep=0 must be at least 1"),
        ({"block": 0}, "mixer.block=0 must be at least 1"),
        ({"past_blocks": -1}, "mixer.past_blocks=-1 must be at least 0"),
        ({"gate": "key"}, "mixer.gate=key is unknown; use log, value, both"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SparseK(ModelShape(8, 1, 1), 0, **settings)


@pytest.mark.parametrize("length", [3, 5, 6, 7, 11])
def test_as_long_as_there_are_fewer_keys_than_are_kept_all_are_seen(length):
    """Also where the blocks of a row are an odd number, in any level of the tree by which they are joined."""
    torch.manual_seed(0)
    shape = ModelShape(12, 1, 2)
    mixer = SparseK(shape, 0, block=1, keep=40, past_blocks=0).double()
    flash = Flash(shape, 0).double()
    flash.load_state_dict({name: mixer.state_dict()[name] for name in flash.state_dict()})
    torch.nn.init.normal_(mixer.score.weight)
    x = torch.randn(2, length, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x).y, flash(x).y, rtol=0, atol=1e-12)
