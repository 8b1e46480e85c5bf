"""Combiner against the authors' code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longmix.errors import ConfigError
from longmix.mixers.combiner import Combiner
from longmix.mixers.combiner_log import CombinerLog
from longmix.mixers.parts.base import ModelShape

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


def test_an_unknown_pool_is_refused():
    with pytest.raises(ConfigError, match=r"mixer\.pool=sum is unknown; use mean or max"):
        Combiner(ModelShape(8, 1, 1), 0, pool="sum")


def test_pairs_of_the_log_form_are_counted_without_a_loop_over_positions():
    mixer = CombinerLog(ModelShape(12, 1, 2), 0)
    for length in range(70):
        assert mixer.visible_pairs(length) == length + sum(position.bit_count() for position in range(length))
    assert mixer.visible_pairs(2**50) == 2**50 + 50 * 2**49
