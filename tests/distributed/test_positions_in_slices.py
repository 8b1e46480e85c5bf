"""Positions that go on from window to window, in rows that are cut into slices."""

import torch
from sliced import DOCUMENTS, Case, largest_error, rows

from longmix.evaluation.loss import run_whole
from longmix.training.strategies import run_slice


def losses(group, case, moved):
    tokens, targets, ids = rows(packed=True)
    before = (ids == 0).int() * torch.arange(len(DOCUMENTS), dtype=torch.int32)[:, None] * 37 * moved
    batch = {"tokens": tokens, "targets": targets, "document_ids": ids, "positions_before": before}
    model = case.model()
    with torch.no_grad():
        output = run_whole(model, batch) if group is None else run_slice(model, batch, group)
    return {"losses": output.token_losses}


def test_slices_have_the_positions_of_the_rows(pool, node_of):
    """Features of rotated heads, as the mixer has, differ with positions, not with distances alone."""
    case = Case(node_of("scatterbrain block=3 num_features=16"), packed=True)
    wanted = losses(None, case, 1)
    found = pool.run(2, losses, case, 1)
    assert largest_error({"losses": sum(each["losses"] for each in found)}, wanted)[0] < 1e-9
    assert largest_error(losses(None, case, 0), wanted)[0] > 1e-4
