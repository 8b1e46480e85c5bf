"""Rows in slices that go on from carried state: two windows one after the other, as one process trains on them."""

from typing import Any

import pytest
import torch
from sliced import DOCUMENTS, LENGTH, VOCABULARY, Case, gradients, largest_error

from longmix.training.carried import CarriedState, Rows, run_on

WINDOWS = 3
CASES = {
    "decay": "simple_gla convolution=3",
    "decay-per-channel": "gla num_heads=2",
    "normalizer": "mlstm_tfla gate=exp input_bias=1 num_heads=2",
    "delta": "gated_deltanet num_heads=2 convolution=14",  # which reaches across a whole slice
    "rwkv7": "rwkv7 head_dim=12",
    "window-longer-than-a-slice": "sliding_window window=27",
    "window-longer-than-the-row": "sliding_window window=60 rotary_fraction=0.5",
    "window-forget": "sliding_window window=7 bias=forget",
    "window-context-bias": "sliding_window window=7 position=context bias=fourier bias_rank=2",
    "whole-rows-routing": "routing clusters=3 window=4 local_window=5",
    "whole-rows-scatterbrain": "scatterbrain block=3 num_features=16",
}


def batches() -> list[dict[str, Any]]:
    """Windows whose first documents go on from the one before, but for one row in turn."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in DOCUMENTS]).int()
    found = []
    for window in range(WINDOWS):
        count = len(DOCUMENTS)
        drawn = [torch.randperm(VOCABULARY, generator=generator)[:LENGTH] for _ in range(2 * count)]
        tokens, targets = torch.stack(drawn).split(count)
        goes_on = (torch.arange(count) != window) if window else torch.zeros(count, dtype=torch.bool)
        found.append({"tokens": tokens, "targets": targets, "document_ids": ids.roll(window, 0), "continues": goes_on})
    return found


def trained(group: Any, case: Case) -> tuple[list[dict[str, torch.Tensor]], Rows]:
    """Token losses and gradients of each window, and the state after the last; this process's share of the former."""
    model = case.model().train()
    (before,) = CarriedState(model, len(DOCUMENTS)).before(batches()[:1])
    found = []
    for batch in batches():
        output, before = run_on(model, batch, before, group)
        model.zero_grad()
        slices = 1 if group is None else group.size()
        loss = (output.token_losses / batch["tokens"].numel()).sum() + sum(output.losses.values()) / slices
        loss.backward()
        found.append({"losses": output.token_losses.detach(), **gradients(model)})
    return found, before


@pytest.mark.sampled(2)
@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_slices_go_on_from_what_the_last_one_ended_with(pool, node_of, words):
    check(pool, node_of(words))


def test_a_hybrid_whose_full_attention_begins_anew(pool, node_of):
    node = node_of("simple_gla")
    parts = {name: node_of(name)["mixer"] for name in ("flash", "simple_gla")}
    node["mixer"] = {"pattern": ["flash", "simple_gla"], **parts}
    node["model"]["num_layers"] = 2
    check(pool, node)


def check(pool, node):
    case = Case(node, packed=True)
    wanted, state = trained(None, case)
    for size in (2, 4):
        shares = pool.run(size, trained, case)
        for window, one in enumerate(wanted):
            summed = {name: sum(share[0][window][name] for share in shares) for name in one}
            error, name = largest_error(summed, one)
            assert error <= 1e-11, f"{name} of window {window} in {size} slices"
        for _, found in shares:
            leaves, others = (torch.utils._pytree.tree_leaves(each) for each in (found, state))
            for leaf, other in zip(leaves, others, strict=True):
                torch.testing.assert_close(leaf, other, rtol=1e-10, atol=1e-11)
