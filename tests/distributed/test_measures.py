"""What mixers measure is of all rows of a step, whichever pass saw them; of slices, see `test_sliced_models`."""

import math

import pytest
import torch
from sliced import Case, measured, rows

from longmix.distributed.slices import Slices
from longmix.mixers.parts.metrics import Counts, LargestShare, Mean, MeanProduct, RootMeanSquare, accumulate, figures

MEASURING = {
    "mlstm-exp": "mlstm_tfla gate=exp num_heads=2",
    "rwkv7": "rwkv7 head_dim=12",
    "kda": "kda num_heads=2",
    "hash": "sparse_flash buckets=4 rounds=2",
    "hash-shared": "sparse_flash buckets=4 shared_qk=true",
    "drop": "sparse_flash_drop window=3",
    "hyper": "hyper buckets=4 window=3 sample=0.4",
    "routing": "routing clusters=3 window=4 local_window=5",
    "routing-separate": "routing clusters=8 window=4 shared_qk=false",
    "routing-threshold": "routing clusters=3 window=4 mode=threshold",
    "routing-prefix": "routing clusters=3 window=4 mode=prefix_topk block=6",
    "scatterbrain": "scatterbrain block=3 num_features=16",
    "sparsek": "sparsek block=3 keep=5 past_blocks=1",
    "content": "scatterbrain_content block=3 num_features=16 window=3",
}


def alone(x: torch.Tensor) -> torch.Tensor:
    return x


def found_in_passes(case: Case, size: int) -> dict[str, float]:
    """Figures of all rows, `size` of them in each forward pass."""
    model, parts = case.model(), [None if x is None else x.split(size) for x in rows(case.packed)]
    measures: dict = {}
    for index in range(len(parts[0])):
        tokens, targets, ids = (None if part is None else part[index] for part in parts)
        accumulate(measures, measured(model(tokens, targets, document_ids=ids), case))
    return figures(measures, alone)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("words", MEASURING.values(), ids=MEASURING)
def test_passes_over_some_rows_measure_what_one_over_all_does(node_of, words):
    for packed in (False, True):
        case = Case(node_of(words), packed)
        wanted = found_in_passes(case, 4)
        assert wanted and all(math.isfinite(x) for x in wanted.values())
        for size in (2, 1):
            assert found_in_passes(case, size) == pytest.approx(wanted, rel=1e-12), size


def test_figures_of_numbers():
    x, y = torch.randn(3, 5), torch.randn(7).abs()
    pairs = {
        Mean.of(x > 0).figure(): (x > 0).double().mean(),
        RootMeanSquare.of(x).figure(): x.square().mean().sqrt(),
        MeanProduct.of(x, y).figure(): x.mean() * y.mean(),
    }
    for found, wanted in pairs.items():
        assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_counts_of_labels():
    labels = torch.randint(5, (2, 30, 3), generator=torch.Generator().manual_seed(0))
    for head in range(3):
        wanted = torch.bincount(labels[..., head].flatten(), minlength=6).double()
        assert torch.equal(Counts.of(labels, 6).sums[head], wanted)
    most = torch.stack([torch.bincount(labels[..., head].flatten()).max() for head in range(3)])
    assert LargestShare.of(labels, 6).figure().item() == pytest.approx(6 * most.double().mean().item() / 60)


def test_plain_scalars_count_alike_in_every_pass():
    measures: dict = {}
    for value in (1.0, 2.0, 6.0):
        accumulate(
            measures, {"loss": torch.tensor(value, requires_grad=True), "size": RootMeanSquare.of(torch.ones(3))}
        )
    assert figures(measures, alone) == {"loss": 3.0, "size": 1.0}
    assert not any(measure.sums.requires_grad for measure in measures.values())


def test_processes_are_added_up_in_one_exchange():
    measures, calls = {"b": Mean.of(torch.tensor([1.0, 3.0])), "a": LargestShare.of(torch.zeros(1, 2, 1).long(), 2)}, []

    def with_another(flat: torch.Tensor) -> torch.Tensor:
        calls.append(flat)
        return flat + torch.tensor([5.0, 1.0, 0.0, 6.0])

    assert figures(measures, with_another) == {"b": 3.0, "a": 1.5}
    assert len(calls) == 1 and figures({}, with_another) == {}


@pytest.mark.slow
def test_only_the_last_slice_tells_of_whole_rows(pool):
    assert pool.run(3, counted_in) == [0.0, 0.0, 2.0]


def counted_in(group) -> float:
    slices = Slices(6, group=group)
    assert Mean.of(torch.ones(2)).in_last_slice(None).figure() == 1
    return Mean.of(torch.ones(2)).in_last_slice(slices).sums[1].item()
