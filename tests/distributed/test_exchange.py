"""What slices exchange: rows before them, means, and what they do to a state, in every regime of a recurrence."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import SIZES
from sliced import largest_error, together

from longmix.distributed.exchange import mean_over, rows_before
from longmix.distributed.slices import Slices
from longmix.mixers.parts.recurrent_slices import DecayRecurrence, DeltaRecurrence, NormalizedRecurrence, widened
from longmix_kernels.delta import delta_rule
from longmix_kernels.linear import LinearState, linear_attention

LENGTH = 5


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exchanged(group: dist.ProcessGroup, limit: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The rows, and the gradient of their sum weighted by place and rank."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    whole = drawn(2, size * LENGTH, 3).to(dtype)
    x = whole[:, rank * LENGTH : (rank + 1) * LENGTH].requires_grad_()
    rows = rows_before(x, limit, group)
    weights = (rank + 1) * torch.arange(rank * LENGTH - rows.shape[1], rank * LENGTH)[:, None]
    (rows * weights.to(dtype)).sum().backward()
    return rows.detach(), x.grad


@pytest.mark.parametrize("limit", [1, LENGTH, LENGTH + 2, 2 * LENGTH, 1000, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_rows_before_a_slice(pool, limit, dtype):
    for size in SIZES:
        whole = drawn(2, size * LENGTH, 3).to(dtype)
        gradient = torch.zeros(size * LENGTH)
        results = pool.run(size, exchanged, limit, dtype)
        for rank, (rows, _) in enumerate(results):
            stop = rank * LENGTH
            start = 0 if limit is None else max(0, stop - limit)
            assert torch.equal(rows, whole[:, start:stop])
            gradient[start:stop] += (rank + 1) * torch.arange(start, stop)
        found = torch.cat([grad for _, grad in results], 1)
        torch.testing.assert_close(found, gradient[:, None].expand(2, -1, 3).to(dtype), rtol=0, atol=0)


def averaged(group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
    rank = dist.get_rank(group)
    x = drawn(4, 3)[rank].requires_grad_()
    mean = mean_over(x, group)
    ((rank + 1) * mean.square().sum()).backward()
    return mean.detach(), x.grad


def test_means_over_slices(pool):
    for size in SIZES:
        x = drawn(4, 3)[:size].requires_grad_()
        mean = x.mean(0)
        (sum(range(1, size + 1)) * mean.square().sum()).backward()
        for rank, (found, grad) in enumerate(pool.run(size, averaged)):
            torch.testing.assert_close((found, grad), (mean.detach(), x.grad[rank]), rtol=1e-14, atol=0)


ROWS, HEADS, KEY, VALUE, SEQ_LEN = 2, 2, 4, 3, 28
IDS = torch.tensor([[0] * 3 + [1] * 20 + [2] * 5, [0] * 14 + [1] + [2] * 13], dtype=torch.int32)

REGIMES = {  # the log decay and the log input gate: their means and how far they scatter
    "gentle": (-0.1, 0.05, 0.0, 1.0),
    "forgets-all": (-800.0, 100.0, 0.0, 1.0),
    "forgets-nothing": (0.0, 0.0, 0.0, 1.0),
    "loud": (-1.0, 0.5, 900.0, 5.0),
    "silent": (-1.0, 0.5, -900.0, 50.0),
    "quieter-every-token": (-30.0, 20.0, 0.0, 30.0),
}


def tensors(regime: str) -> dict[str, torch.Tensor]:
    """Leaves of whole rows."""
    decay, decay_scatter, gate, gate_scatter = REGIMES[regime]
    heads = {"query": KEY, "key": KEY, "value": VALUE, "write": KEY, "read": KEY}
    noise = drawn(len(heads) + 2, ROWS, SEQ_LEN, HEADS, max(KEY, VALUE))
    given = {name: x[..., :width].clone() for (name, width), x in zip(heads.items(), noise, strict=False)}
    given["log_decay"] = (decay + decay_scatter * noise[-1, ..., 0]).clamp(max=0)
    given["log_input"] = gate + gate_scatter * noise[-2, ..., 0]
    return {name: x.requires_grad_() for name, x in given.items()}


def engine(kind: str, x: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    """An engine as mixers call it, the recurrence that goes with it, and its state before a document."""
    zeros = torch.zeros(ROWS, HEADS, KEY, VALUE, dtype=torch.float64)
    heads = x["query"], x["key"]
    if kind == "delta":
        options = {"log_decay": x["log_decay"], "low_rank_read": x["read"], "low_rank_write": 0.1 * x["write"]}
        return (
            lambda initial, ids, before: delta_rule(
                *heads,
                widened(x["value"], initial),
                initial_state=initial,
                carried_state=before,
                document_ids=ids,
                **options,
            ),
            DeltaRecurrence(),
            zeros,
        )
    normalize = kind == "normalized"
    gates = {"log_decay": x["log_decay"], "log_input": x["log_input"] if normalize else None}
    fresh = LinearState(zeros, zeros[..., 0], zeros[..., 0, 0]) if normalize else LinearState(zeros)

    def run(initial, ids, before):
        options = {"initial_state": initial, "carried_state": before, "document_ids": ids, "scale": 0.5}
        return linear_attention(*heads, x["value"], **gates, normalize=normalize, **options)

    if normalize:
        return run, NormalizedRecurrence(x["key"], x["value"], x["log_decay"], x["log_input"]), fresh
    return run, DecayRecurrence(x["query"], x["log_decay"], 0.5), fresh


def results(output: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output.sin().sum().backward()
    return {"output": output.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def recurrence_in_slices(group: dist.ProcessGroup, kind: str, regime: str, packed: bool) -> dict[str, torch.Tensor]:
    slices, leaves = Slices(SEQ_LEN, IDS if packed else None, group), tensors(regime)
    run, recurrence, fresh = engine(kind, {name: slices.own(x) for name, x in leaves.items()})
    return results(recurrence.over_slice(run, fresh, slices, slices.ids)[0], leaves)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", ["decay", "delta", "normalized"])
def test_recurrences_in_slices(pool, kind, regime):
    for packed in (False, True):
        leaves = tensors(regime)
        run, _, fresh = engine(kind, leaves)
        wanted = results(run(fresh, IDS if packed else None, None)[0], leaves)
        for size in SIZES:
            found = together(pool.run(size, recurrence_in_slices, kind, regime, packed))
            assert all(x.isfinite().all() for x in found.values())
            error, name = largest_error(found, wanted)
            assert error <= 1e-12, f"{name} in {size} slices{', packed' if packed else ''}"
