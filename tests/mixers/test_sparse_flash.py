"""What is particular to the labelled mixers: their choices against the definition, and that these never look ahead."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longmix.mixers import hyper as hyper_module
from longmix.mixers.flash import Flash
from longmix.mixers.hyper import Hyper
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.by_label import LabelAttention
from longmix.mixers.parts.hashing import AngularHash, pseudo_random
from longmix.mixers.parts.rotary import rotary_angles, rotate
from longmix.mixers.sparse_flash import SparseFlash
from longmix.mixers.sparse_flash_drop import SparseFlashDrop

SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)
LENGTH = 40


def inputs(seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, LENGTH, SHAPE.d_model, dtype=torch.float64, generator=generator)


def like_flash(mixer: LabelAttention) -> Flash:
    """Flash with the same weights."""
    flash = Flash(SHAPE, 0, num_kv_heads=mixer.num_kv_heads).double()
    flash.load_state_dict({name: x for name, x in mixer.state_dict().items() if name in flash.state_dict()})
    return flash


def masked(mixer: LabelAttention, x: Tensor, visible: Tensor) -> Tensor:
    """The mixer's output from its definition: rotated heads, a mask bool [B, H, T, T], one softmax."""
    query, key, value = mixer.project(x)
    cosine, sine = rotary_angles(torch.arange(LENGTH)[None], mixer.rotary)
    query, key, value = (y.transpose(1, 2) for y in (rotate(query, cosine, sine), rotate(key, cosine, sine), value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    return mixer.output(mixed.transpose(1, 2).flatten(2))


def buckets_by_definition(hashing: AngularHash, x: Tensor) -> Tensor:
    """argmax [x R, -x R], head by head and round by round: [B, T, H, rounds]."""
    per_round = hashing.directions.shape[-1] // hashing.rounds
    group = x.shape[2] // hashing.directions.shape[0]
    results = []
    for turn in range(hashing.rounds):
        heads = []
        for head in range(x.shape[2]):
            directions = hashing.directions[head // group, :, turn * per_round : (turn + 1) * per_round]
            along = x[:, :, head] @ directions
            heads.append(torch.cat([along, -along], -1).argmax(-1))
        results.append(torch.stack(heads, -1))
    return torch.stack(results, -1)


@pytest.mark.parametrize(("heads", "rounds"), [(2, 1), (4, 1), (4, 3)])
def test_a_bucket_is_the_nearest_direction(heads, rounds):
    hashing = AngularHash(2, 8, 6, rounds, seed=3).double()
    x = torch.randn(2, LENGTH, heads, 8, dtype=torch.float64)
    labels = hashing(x)
    assert labels.dtype == torch.int32 and labels.shape == (2, LENGTH, heads, rounds)
    assert torch.equal(labels.long(), buckets_by_definition(hashing, x))
    assert torch.equal(labels, hashing(7.5 * x)), "the length of a vector does not matter"


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 1}, {"shared_qk": True}, {"shared_qk": True, "see_self": False}]
)
def test_hash_attention_from_its_definition(options):
    torch.manual_seed(0)
    mixer = SparseFlash(SHAPE, 0, buckets=4, **options).double()
    x = inputs()
    query, key, _ = mixer.project(x)
    query_bucket, key_bucket = (buckets_by_definition(mixer.hash, y)[..., 0].transpose(1, 2) for y in (query, key))
    key_bucket = key_bucket.repeat_interleave(SHAPE.num_heads // mixer.num_kv_heads, 1)
    visible = query_bucket[..., :, None] == key_bucket[..., None, :]
    visible &= torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(0 if options.get("see_self", True) else -1)
    torch.testing.assert_close(mixer(x).y, masked(mixer, x, visible), rtol=0, atol=1e-12)


@pytest.mark.parametrize("score", ["learned", "random"])
def test_drop_attention_from_its_definition(score):
    torch.manual_seed(0)
    mixer = SparseFlashDrop(SHAPE, 0, keep=0.5, score=score).double()
    x = inputs()
    if score == "random":
        kept = (pseudo_random(torch.arange(LENGTH)[None], mixer.salt) < 0.5).expand(2, -1, -1)
        gate = torch.ones_like(kept, dtype=torch.float64)
    else:
        scores = x @ mixer.score.weight.T + mixer.score.bias
        kept, gate = scores > 0, scores.sigmoid()
    (query_kept, key_kept), (query_gate, key_gate) = ((y.transpose(1, 2).chunk(2, 1)) for y in (kept, gate))
    visible = query_kept[..., None] & key_kept[..., None, :] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    plain = mixer.project
    mixer.project = lambda x: (*plain(x)[:2], plain(x)[2] * key_gate.transpose(1, 2).unsqueeze(-1))
    last, mixer.output = mixer.output, torch.nn.Identity()
    mixed = masked(mixer, x, visible).unflatten(-1, (3, 16)) * query_gate.transpose(1, 2).unsqueeze(-1)
    mixer.project, mixer.output = plain, last
    torch.testing.assert_close(mixer(x).y, last(mixed.flatten(2)), rtol=0, atol=1e-12)
    assert not mixed[~query_kept.transpose(1, 2)].any() and not query_kept.all()


def test_a_window_over_everything_is_flash():
    torch.manual_seed(0)
    for mixer in (
        SparseFlash(SHAPE, 0, buckets=4, rounds=2, window=LENGTH),
        SparseFlashDrop(SHAPE, 0, keep=0.5, score="random", window=LENGTH),
        Hyper(SHAPE, 0, buckets=4, window=LENGTH, sample=0.5),
    ):
        mixer = mixer.double()
        torch.testing.assert_close(mixer(inputs()).y, like_flash(mixer)(inputs()).y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [{}, {"num_kv_heads": 1}])
def test_hyper_with_every_key_a_sample_is_flash(heads, monkeypatch):
    """Window, bucket and samples are disjoint and together are all keys: with weight 1 they make exact attention."""
    torch.manual_seed(0)
    mixer = Hyper(SHAPE, 0, buckets=4, window=5, sample=0.5, **heads).double()
    mixer.sample = 1.0
    monkeypatch.setattr(hyper_module, "pseudo_random", lambda positions, salt: torch.zeros(1, LENGTH, len(salt)))
    x = inputs().requires_grad_()
    ours, exact = mixer(x).y, like_flash(mixer)(x).y
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, exact)), rtol=0, atol=1e-12)


def test_hyper_estimates_the_sum_of_weights_without_bias():
    torch.manual_seed(0)
    draws = 400
    mixer = Hyper(SHAPE, 0, buckets=4, window=5, sample=0.25).double()
    seen: list[Rows] = []
    mixer.further_parts = lambda rows: seen.append(rows) or []
    mixer(inputs()[:1])
    rows = Rows(*(x.expand(draws, *x.shape[1:]) for x in (seen[0].query, seen[0].key, seen[0].value)))
    rows.query_labels, buckets = (
        x[..., :1].expand(draws, -1, -1, -1) for x in (seen[0].query_labels, seen[0].key_labels)
    )
    sampled = torch.rand(draws, LENGTH, 3, 1, generator=torch.Generator().manual_seed(1)) < mixer.sample
    totals = []
    for samples, chance in ((sampled, mixer.sample), (torch.ones_like(sampled), 1.0)):
        rows.key_labels, mixer.sample = torch.cat([buckets, (~samples).int()], -1), chance
        totals.append(Hyper.further_parts(mixer, rows)[0][1].exp())
    estimate, exact = totals[0].mean(0), totals[1][0]
    spread = totals[0].std(0) / math.sqrt(draws)
    assert ((estimate - exact).abs() <= 5 * spread + 1e-12).all() and (exact > 0.5).any()


def test_pseudo_random_numbers_are_uniform_and_independent():
    salt = torch.randint(2**31, (8,), generator=torch.Generator().manual_seed(0))
    numbers = pseudo_random(torch.arange(50_000)[None], salt)[0]
    assert numbers.min() >= 0 and numbers.max() < 1 and numbers.dtype == torch.float32
    histogram = torch.stack([torch.histc(column, 20, 0, 1) for column in numbers.T])
    assert (histogram - 2500).abs().max() < 5 * math.sqrt(2500)
    together = torch.cat([numbers, numbers.roll(1, 0)], 1).T.corrcoef() - torch.eye(16)
    assert together.abs().max() < 5 / math.sqrt(50_000)
    piece = pseudo_random(torch.tensor([[7, 40_000]]), salt)[0]
    assert torch.equal(piece, numbers[[7, 40_000]])


def test_directions_are_saved_and_never_drawn_again():
    torch.manual_seed(0)
    first = SparseFlash(SHAPE, 1, buckets=8)
    torch.manual_seed(99)
    second = SparseFlash(SHAPE, 1, buckets=8)
    assert torch.equal(first.hash.directions, second.hash.directions)
    assert "hash.directions" in first.state_dict()
    others = SparseFlash(SHAPE, 2, buckets=8), SparseFlash(SHAPE, 1, buckets=8, hash_seed=1)
    assert all(not torch.equal(first.hash.directions, other.hash.directions) for other in others)
    x = inputs().float()
    assert torch.equal(first(x).y, first(x).y) and torch.equal(first.train()(x).y, first.eval()(x).y)
    for seed in ("salt",):
        assert seed in SparseFlashDrop(SHAPE, 0, keep=0.5, score="random").state_dict()
        assert seed in Hyper(SHAPE, 0, buckets=4, window=4, sample=0.5).state_dict()


class RankedHash(SparseFlash):
    """Buckets by rank among all tokens, as HyperAttention's: later tokens choose for earlier ones."""

    def select(self, x, query, key, positions):
        chosen = super().select(x, query, key, positions)
        for labels, heads in ((chosen.query_labels, query), (chosen.key_labels, key)):
            rank = (heads * self.hash.directions[..., 0]).sum(-1).argsort(1).argsort(1)
            labels.copy_((rank * self.num_labels // rank.shape[1]).int().unsqueeze(-1))
        return chosen


def leak(mixer: LabelAttention) -> tuple[float, bool]:
    """Largest change of an output before a changed token, and whether any choice before it changed."""
    seen, worst, moved = [], 0.0, False
    select = mixer.select
    mixer.select = lambda *arguments: seen.append(select(*arguments)) or seen[-1]
    x = inputs()
    before = mixer(x).y
    for cut in (5, 20, LENGTH - 1):
        changed = x.clone()
        changed[:, cut:] = inputs(seed=cut)[:, cut:] * 30
        after = mixer(changed).y
        worst = max(worst, (after - before)[:, :cut].abs().max().item())
        first, last = seen[0], seen[-1]
        for name in ("query_labels", "key_labels"):
            moved |= not torch.equal(getattr(first, name)[:, :cut], getattr(last, name)[:, :cut])
    return worst, moved


@pytest.mark.parametrize(
    "make",
    [
        lambda: SparseFlash(SHAPE, 0, buckets=4),
        lambda: SparseFlash(SHAPE, 0, buckets=4, shared_qk=True, rounds=2),
        lambda: SparseFlashDrop(SHAPE, 0, keep=0.5),
        lambda: SparseFlashDrop(SHAPE, 0, keep=0.5, score="random"),
        lambda: Hyper(SHAPE, 0, buckets=4, window=4, sample=0.3),
    ],
    ids=["hash", "hash-shared", "drop-learned", "drop-random", "hyper"],
)
def test_no_later_token_has_a_say_in_what_an_earlier_one_sees(make):
    torch.manual_seed(0)
    worst, moved = leak(make().double())
    assert worst < 1e-12 and not moved


def test_a_choice_by_rank_is_caught():
    torch.manual_seed(0)
    worst, moved = leak(RankedHash(SHAPE, 0, buckets=4).double())
    assert worst > 1e-3 and moved


@pytest.mark.slow
def test_the_kept_share_begins_as_wanted_and_is_held_there():
    torch.manual_seed(0)
    shape = ModelShape(d_model=128, num_layers=2, num_heads=4)
    mixer = SparseFlashDrop(shape, 0, keep=0.3)
    x = F.rms_norm(torch.randn(4, 500, 128), (128,))
    output = mixer(x)
    dropped = [output.metrics[name].figure() for name in ("dropped_keys", "dropped_queries")]
    assert all(abs(share - 0.7) < 0.05 for share in dropped)
    assert output.losses["balance"] < 0.01
    with torch.no_grad():
        mixer.score.bias += 1.0
    optimizer = torch.optim.SGD(mixer.score.parameters(), lr=5.0)
    for _ in range(60):
        optimizer.zero_grad()
        mixer(x[:, :200]).losses["balance"].backward()
        optimizer.step()
    assert abs(mixer(x).metrics["dropped_keys"].figure() - 0.7) < 0.05
    assert not mixer.eval()(x).losses and not mixer(x).metrics


def test_occupancy_says_how_even_the_labels_are():
    torch.manual_seed(0)
    mixer = SparseFlash(ModelShape(128, 2, 2), 0, buckets=8)
    even = mixer(torch.randn(1, 4000, 128)).metrics
    assert 1.0 <= even["largest_label"].figure() < 1.3 and even["empty_rows"].figure() < 0.02
    one = mixer(torch.randn(1, 1, 128).expand(1, 500, 128)).metrics
    assert one["largest_label"].figure() == 8.0
