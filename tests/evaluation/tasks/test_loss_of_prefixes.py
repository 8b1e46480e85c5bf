"""Losses of prefixes that are run alone: those of one pass for a causal model, and honest for one that looks ahead."""

import pytest
import torch

from longmix.batch import IGNORE_INDEX, Batch
from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.statistics import LossStatistics
from longmix.evaluation.tasks.loss import prefix_ends, prefixes_alone, rows_whole
from longmix.mixers.routing import Routing
from longmix.model.backbone import LanguageModel

LENGTH, VOCABULARY = 24, 11


def batches() -> list[Batch]:
    """One with and one without boundaries between documents; some targets are none."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (4, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[:, [3, 9]] = IGNORE_INDEX
    ids = (torch.arange(LENGTH) >= 10).int().expand(2, -1)
    first = Batch(tokens=tokens[:2, :-1], targets=targets[:2], document_ids=None)
    return [first, Batch(tokens=tokens[2:, :-1], targets=targets[2:], document_ids=ids)]


def model(mode: str) -> LanguageModel:
    torch.manual_seed(0)
    settings = {"mode": mode, "clusters": 3, "window": 6, "local_heads": 0}
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "mlp_hidden": 16}
    return LanguageModel(lambda shape, index: Routing(shape, index, **settings), VOCABULARY, **sizes).double()


def statistics_of(network: LanguageModel, some: list[Batch]) -> LossStatistics:
    return evaluate_loss(network, some, LossStatistics(torch.ones(VOCABULARY, dtype=torch.int64), LENGTH))


@pytest.mark.parametrize("prefixes", [1, 5, LENGTH, 100])
@pytest.mark.filterwarnings("ignore:mixer.mode")
def test_a_causal_model_loses_the_same_and_one_that_looks_ahead_does_not(prefixes):
    ends = prefix_ends(LENGTH, prefixes)
    for mode in ("argmax_window", "sequence_topk"):
        network = model(mode)
        alone = statistics_of(network, list(prefixes_alone(batches(), ends)))
        whole = statistics_of(network, list(rows_whole(batches(), ends)))
        assert torch.equal(alone.count_by_position, whole.count_by_position) and alone.bytes == whole.bytes > 0
        difference = (alone.loss_by_position - whole.loss_by_position).abs()
        # The whole row is its own last prefix, at whose last token nothing is ahead; documents end there too.
        if mode == "argmax_window" or prefixes == 1:
            assert difference.max() < 1e-12
        else:
            assert difference.max() > 1e-3
        if prefixes >= LENGTH:
            plain = statistics_of(network, batches())
            torch.testing.assert_close(whole.loss_by_position, plain.loss_by_position, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:mixer.mode")
def test_each_loss_is_that_of_the_tokens_before_it():
    """From logits of rows that were cut by hand."""
    network, ends = model("sequence_topk").eval(), prefix_ends(LENGTH, 4)
    found = statistics_of(network, list(prefixes_alone(batches()[:1], ends)))
    tokens, targets = batches()[0]["tokens"], batches()[0]["targets"]
    for end in ends:
        scores = network.logits(network(tokens[:, :end]).hidden[:, -1]).log_softmax(-1)
        loss = -scores.gather(1, targets[:, end - 1, None]).sum()
        assert found.loss_by_position[end - 1].item() == pytest.approx(loss.item(), abs=1e-12)


@pytest.mark.parametrize(
    ("length", "prefixes", "ends"),
    [(24, 1, [24]), (24, 4, [6, 12, 18, 24]), (3, 5, [1, 2, 3]), (10, 3, [4, 7, 10]), (7, 7, [1, 2, 3, 4, 5, 6, 7])],
)
def test_ends_are_spread_evenly(length, prefixes, ends):
    assert prefix_ends(length, prefixes) == ends
