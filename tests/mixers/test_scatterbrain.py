"""Scatterbrain: its definition, what the features promise, a state that does not grow, and the estimator's metrics."""

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longmix.data.loaders import document_starts
from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.parts import scatterbrain_cache, scatterbrain_summaries
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.features import FEATURES, FeatureMap, enough_features, orthogonal_projections, predicted_error
from longmix.mixers.parts.layout import layouts
from longmix.mixers.parts.rotary import rotary_angles, rotate
from longmix.mixers.scatterbrain import Scatterbrain
from longmix.mixers.scatterbrain_content import ScatterbrainContent

SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)
LENGTH = 40
DRAWS = 10_000


def make(layer: int = 0, **settings) -> Scatterbrain:
    torch.manual_seed(1)
    kind = ScatterbrainContent if "buckets" in settings else Scatterbrain
    mixer = kind(SHAPE, layer, **{"block": 4, "num_features": 8, **settings}).double()
    with torch.no_grad():
        for parameter in (mixer.far_bias, mixer.sink_key, mixer.sink_value):
            if parameter is not None:
                parameter.normal_()
        for center in (mixer.query_center, mixer.key_center) if kind is ScatterbrainContent else ():
            if center is not None:
                center.value.normal_()
    return mixer


def inputs(length: int = LENGTH, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, SHAPE.d_model, dtype=torch.float64, generator=generator)


def packed_ids() -> Tensor:
    lengths = [(5, 1, 23, 11), (26, 7, 6, 1)]
    return torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor(row)) for row in lengths]).int()


def defined(mixer: Scatterbrain, x: Tensor, ids: Tensor | None) -> Tensor:
    """The mixer's output from one matrix of weights over all pairs."""
    ids = torch.zeros(x.shape[:2], dtype=torch.int32) if ids is None else ids
    group, row = mixer.num_heads // mixer.num_kv_heads, torch.arange(x.shape[1])
    positions = row - torch.searchsorted(ids, ids)
    query, key, value = mixer.project(x)
    cosine, sine = rotary_angles(positions, mixer.rotary)
    query, key = (rotate(heads, cosine, sine) for heads in (query, key))
    unit = [heads / heads.norm(dim=-1, keepdim=True) for heads in (query, key)]
    repeated = [heads.repeat_interleave(group, 2) for heads in (key, value, unit[1])]
    scores = torch.einsum("bihd,bjhd->bhij", query, repeated[0]) * mixer.head_dim**-0.5
    if mixer.one_softmax:
        scores = mixer.radius * torch.einsum("bihd,bjhd->bhij", unit[0], repeated[2])

    same = (ids[:, :, None] == ids[:, None, :]) & (row[:, None] >= row)
    distance = (positions // mixer.block)[:, :, None] - (positions // mixer.block)[:, None, :]
    near, far = same & (distance <= mixer.past_blocks), same & (distance > mixer.past_blocks)
    weights = scores.exp() * near[:, None]
    if mixer.features is not None:
        log_q, log_k = (mixer.features(mixer.radius**0.5 * heads) for heads in unit)
        products = torch.einsum("biha,bjha->bhij", log_q.exp(), log_k.exp().repeat_interleave(group, 2))
        bias = torch.zeros(mixer.num_heads) if mixer.far_bias is None else mixer.far_bias
        weights = weights + products * bias.exp()[:, None, None] * far[:, None]
    if isinstance(mixer, ScatterbrainContent):
        weights = weights + scores.exp() * selected(mixer, x, far)
    total, mixed = weights.sum(-1).mT, torch.einsum("bhij,bjhd->bihd", weights, repeated[1])
    if mixer.summaries:
        heads = unit if mixer.one_softmax else (query, key)
        more_total, more_mixed = of_summaries(mixer, *heads, value, ids, positions)
        total, mixed = total + more_total, mixed + more_mixed
    if mixer.sink_key is not None:
        sink_key, sink_value = (s.repeat_interleave(group, 1) for s in (mixer.sink_key, mixer.sink_value))
        scale = mixer.radius if mixer.one_softmax else mixer.head_dim**-0.5
        sinks = (scale * torch.einsum("bihd,shd->bihs", unit[0] if mixer.one_softmax else query, sink_key)).exp()
        total, mixed = total + sinks.sum(-1), mixed + torch.einsum("bihs,shd->bihd", sinks, sink_value)
    return mixer.output((mixed / total.unsqueeze(-1)).flatten(2))


def selected(mixer: ScatterbrainContent, x: Tensor, far: Tensor) -> Tensor:
    """The latest far keys of each query's bucket, bool [B, H, T, T]."""
    labels = []
    for heads, center in zip(mixer.project(x)[:2], (mixer.query_center, mixer.key_center), strict=True):
        directions = mixer.hash.directions.repeat_interleave(heads.shape[2] // mixer.num_kv_heads, 0)
        along = torch.einsum("bthd,hdn->bthn", heads - (0 if center is None else center.value), directions)
        labels.append(torch.cat((along, -along), -1).argmax(-1).mT)
    query, key = labels[0], labels[1].repeat_interleave(mixer.num_heads // mixer.num_kv_heads, 1)
    alike = far[:, None] & (query[..., None] == key[..., None, :])
    return alike & (alike.flip(-1).cumsum(-1).flip(-1) <= mixer.window)


def of_summaries(mixer: Scatterbrain, query: Tensor, key: Tensor, value: Tensor, ids: Tensor, positions: Tensor):
    """What one key for each earlier block adds to the sums of weights and of weighted values, query by query."""
    total, mixed = [], []
    scale, group = mixer.radius if mixer.one_softmax else mixer.head_dim**-0.5, mixer.num_heads // mixer.num_kv_heads
    for row, own, head in itertools.product(*(range(n) for n in query.shape[:3])):
        begin, kv = own - int(positions[row, own]), head // group
        last = int(positions[row, own]) // mixer.block - mixer.past_blocks
        weight, value_sum = torch.zeros((), dtype=query.dtype), torch.zeros(mixer.head_dim, dtype=query.dtype)
        for block in range(last):
            some = slice(begin + block * mixer.block, begin + (block + 1) * mixer.block)
            keys = key[row, some, kv]
            mean_query = query[row, some, kv * group : (kv + 1) * group].mean((0, 1))
            share = (scale * keys @ mean_query).softmax(0)
            own_weight = (scale * query[row, own, head] @ keys.mean(0)).exp()
            weight, value_sum = weight + own_weight, value_sum + own_weight * (share @ value[row, some, kv])
        total.append(weight)
        mixed.append(value_sum)
    shape = query.shape[:3]
    return torch.stack(total).view(shape), torch.stack(mixed).view(*shape, mixer.head_dim)


SETTINGS = {
    "default": {},
    "grouped": {"num_kv_heads": 1},
    "own-block": {"past_blocks": 0, "block": 3},
    "three-blocks": {"past_blocks": 2, "radius": 0.3},
    "one-softmax": {"one_softmax": True},
    "one-softmax-radius-sinks": {"one_softmax": True, "radius": 0.5, "sinks": 2},
    "sinks": {"sinks": 3, "num_kv_heads": 1},
    "no-features": {"num_features": 0},
    "summaries": {"num_features": 0, "summaries": True},
    "summaries-sinks": {"num_features": 0, "summaries": True, "past_blocks": 0, "sinks": 1, "num_kv_heads": 1},
    "summaries-one-softmax": {"num_features": 0, "summaries": True, "one_softmax": True},
    "no-norm": {"qk_norm": False},
    **{kind: {"features": kind} for kind in FEATURES[1:]},
    "content": {"buckets": 4, "window": 3},
    "content-grouped": {"buckets": 2, "window": 9, "num_kv_heads": 1, "past_blocks": 0, "center_decay": None},
    "content-one-softmax-sinks": {"buckets": 4, "window": 2, "one_softmax": True, "sinks": 1},
    "content-no-features": {"buckets": 2, "window": 5, "num_features": 0, "block": 1},
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_from_its_definition(settings, packed):
    mixer, x, ids = make(**settings), inputs().requires_grad_(), packed_ids() if packed else None
    ours, expected = mixer(x, document_ids=ids).y, defined(mixer, x, ids)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    wanted = [x, *mixer.parameters()]
    grad = torch.randn_like(ours)
    for mine, theirs in zip(*(torch.autograd.grad(y, wanted, grad) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_a_local_part_that_covers_everything_is_flash():
    mixer, flash = make(block=LENGTH // 2), Flash(SHAPE, 0).double()
    flash.load_state_dict(mixer.state_dict(), strict=False)
    torch.testing.assert_close(mixer(inputs()).y, flash(inputs()).y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_lengths_of_queries_and_keys_change_nothing_on_the_far_side(size):
    mixer = make(past_blocks=0, one_softmax=True, qk_norm=False)
    before = mixer(inputs()).y
    with torch.no_grad():
        mixer.query.weight *= size
        mixer.key.weight /= size
    torch.testing.assert_close(mixer(inputs()).y, before, rtol=0, atol=1e-12)


def test_summaries_bear_any_scores():
    mixer = make(num_features=0, summaries=True, qk_norm=False)
    with torch.no_grad():
        mixer.query.weight *= 1e4
    x = inputs().requires_grad_()
    output = mixer(x).y
    assert output.isfinite().all() and torch.autograd.grad(output.sum(), x)[0].isfinite().all()


def test_more_features_come_closer_to_softmax():
    """At one softmax, averaged over layers, which draw features of their own."""
    errors = []
    for features in (8, 64, 512):
        found = []
        for layer in range(4):
            mixer = make(layer, block=4, past_blocks=0, one_softmax=True, num_features=features)
            whole = make(layer, block=LENGTH, one_softmax=True)
            found.append((mixer(inputs()).y - whole(inputs()).y).square().mean().sqrt())
        errors.append(torch.stack(found).mean().item())
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]


def many_draws(dim: int, num_features: int, radius: float) -> tuple[FeatureMap, Tensor, Tensor]:
    """As many draws as heads, one query and one key [1, 1, draws, dim] for all of them."""
    features = FeatureMap("favor", DRAWS, dim, num_features, seed=3).double()
    generator = torch.Generator().manual_seed(4)
    pair = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    pair = math.sqrt(radius) * F.normalize(pair, dim=-1)
    return features, *(x.expand(1, 1, DRAWS, dim) for x in pair)


@pytest.mark.parametrize(("dim", "num_features", "radius"), [(6, 4, 0.5), (6, 30, 1.0), (5, 10, 1.0)])
def test_random_features_are_unbiased(dim, num_features, radius):
    features, query, key = many_draws(dim, num_features, radius)
    estimates = (features(query) + features(key)).exp().sum(-1).flatten()
    exact = (query * key).sum(-1).exp()[0, 0, 0]
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / DRAWS**0.5
    assert estimates.std() / DRAWS**0.5 < 0.04 * exact


@pytest.mark.parametrize(("num_features", "radius"), [(8, 0.5), (32, 1.0)])
def test_the_predicted_error_is_that_of_independent_projections(num_features, radius):
    features, query, _ = many_draws(8, num_features, radius)
    key = query.flip(-1) * torch.tensor([1, -1] * 4)
    assert (query * key).sum(-1).abs().max() < 1e-12
    generator = torch.Generator().manual_seed(5)
    orthogonal = (features(query) + features(key)).exp().sum(-1).std().item()
    features.projections = torch.randn(features.projections.shape, generator=generator, dtype=torch.float64)
    independent = (features(query) + features(key)).exp().sum(-1).std().item()
    predicted = predicted_error(radius, num_features)
    assert independent == pytest.approx(predicted, rel=0.15)
    assert 0.3 * predicted < orthogonal < predicted


def test_projections_are_orthogonal_and_normal():
    drawn = orthogonal_projections(4000, 3, 5, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 3, 5)
    first = F.normalize(drawn[..., :3], dim=1)
    torch.testing.assert_close(first.mT @ first, torch.eye(3).expand(4000, 3, 3), rtol=0, atol=1e-5)
    for column in range(5):
        some = drawn[..., column]
        assert some.mean(0).abs().max() < 0.08
        torch.testing.assert_close(some.T @ some / 4000, torch.eye(3), rtol=0, atol=0.1)
        assert (some**4).mean().item() == pytest.approx(3.0, rel=0.15)


def formulas(kind: str, along: Tensor, y: Tensor) -> Tensor:
    if kind == "taylor":
        return 1 + along + along**2 / 2
    if kind == "elu":
        return F.elu(along) + 1
    both = torch.cat((along, -along), -1)
    return (both - y.square().sum(-1, keepdim=True) / 2).exp()


@pytest.mark.parametrize("kind", FEATURES)
def test_features_are_what_they_are_called(kind):
    features = FeatureMap(kind, 2, 6, 8, seed=0).double()
    y = torch.randn(2, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    heads = features.projections.repeat_interleave(2, 0)
    expected = formulas(kind, torch.einsum("bthd,hdn->bthn", y, heads), y) / 8**0.5
    torch.testing.assert_close(features(y).exp(), expected)
    (grad,) = torch.autograd.grad(features(3 * y).sum(), y)
    assert grad.isfinite().all() and features(y).shape == (2, 5, 4, 8)
    assert isinstance(features.projections, torch.nn.Parameter) == (kind != "favor")
    assert features.float()(y.detach().bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(y.float()), FeatureMap(kind, 2, 6, 8, seed=0)(y.float()))


def test_draws_are_saved_and_never_made_again():
    mixer, other = make(), make(feature_seed=7)
    x = inputs()
    before = mixer(x).y
    assert torch.equal(mixer.eval()(x).y, before) and torch.equal(mixer.train()(x).y, before)
    assert "features.projections" in mixer.state_dict()
    assert not torch.equal(other.features.projections, mixer.features.projections)
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x).y, before)
    torch.manual_seed(99)
    assert torch.equal(Scatterbrain(SHAPE, 0).features.projections, Scatterbrain(SHAPE, 0).features.projections)
    layers = [Scatterbrain(SHAPE, layer).features.projections for layer in range(2)]
    assert not torch.equal(*layers) and not torch.equal(layers[0][0], layers[0][1])


def test_too_few_features_for_the_radius_warn():
    assert [enough_features(radius) for radius in (0.5, 1.0, 2.0)] == [3, 8, 55]
    with pytest.warns(
        UserWarning, match=r"mixer.num_features=54 is below exp\(2 \* mixer.radius\) = 55: .* off by 99%"
    ):
        make(num_features=54, radius=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(num_features=56, radius=2.0)
        make(num_features=8, radius=1.0)
        make(num_features=8, radius=2.0, features="taylor")
        make(num_features=0, radius=2.0)


def test_metrics_of_the_estimator():
    mixer = make(num_features=8)
    metrics = mixer(inputs()).metrics
    assert set(metrics) == {"exact_mass", "exact_radius", "predicted_error"}
    assert 0 < metrics["exact_mass"].figure() < 1
    assert metrics["exact_radius"].figure().item() == pytest.approx(mixer.head_dim**0.5, rel=0.01)
    assert metrics["predicted_error"].item() == pytest.approx(predicted_error(1.0, 8))
    assert mixer.eval()(inputs()).metrics == {}
    covered = make(block=LENGTH, one_softmax=True, features="elu")
    assert covered(inputs()).metrics.keys() == {"exact_mass", "exact_radius"}
    assert covered(inputs()).metrics["exact_mass"].figure().item() == pytest.approx(1.0)
    assert covered(inputs()).metrics["exact_radius"].figure().item() == pytest.approx(1.0)


def test_the_state_does_not_grow():
    mixer = make(sinks=1).eval()
    with torch.no_grad():
        state = mixer(inputs(), state=mixer.init_state(2)).state
        shapes = [state.recent.key.shape, state.recent.features.shape, state.far.memory.shape]
        for _ in range(20):
            state = mixer(inputs(1), state=state).state
            assert [state.recent.key.shape, state.recent.features.shape, state.far.memory.shape] == shapes
    assert shapes[0] == (2, 7, 3, 16)
    assert mixer.state_bytes(7) == mixer.state_bytes(10**6) == mixer.state_bytes(6) + 3 * (2 * 16 + 8) * 8


CARRIED = ("default", "summaries", "content", "content-grouped")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("settings", [SETTINGS[name] for name in CARRIED], ids=CARRIED)
def test_gradients_go_through_a_state(settings, packed):
    """Keys that have left for the far side get the gradient that they would have got in one pass."""
    mixer, x, ids = make(**{"sinks": 1, **settings}), inputs().requires_grad_(), packed_ids() if packed else None
    whole = mixer(x, document_ids=ids).y
    state, pieces = mixer.init_state(2), []
    for some in (slice(0, 13), slice(13, 14), slice(14, 31), slice(31, 40)):
        output = mixer(x[:, some], state=state, document_ids=None if ids is None else ids[:, some])
        state = output.state
        pieces.append(output.y)
    grad = torch.randn_like(whole)
    found, expected = (torch.autograd.grad(y, x, grad)[0] for y in (torch.cat(pieces, 1), whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("block", "past"), [(1, 0), (1, 2), (4, 1), (7, 0), (5, 3), (64, 1)])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_visible_pairs(block, past, length):
    number = torch.arange(length) // block
    pairs = (number[:, None] - number <= past).tril().sum().item()
    assert make(block=block, past_blocks=past, num_features=0).visible_pairs(length) == pairs
    pairs += (number - past).clamp(min=0).sum().item()
    assert make(block=block, past_blocks=past, num_features=0, summaries=True).visible_pairs(length) == pairs


def test_flops_grow_linearly_with_the_length():
    mixer = make()
    plain = make(num_features=0)
    far = 40 - 2 * 4
    features = 2 * 40 * 6 * 16 * 4
    assert mixer.flops(40) - plain.flops(40) == features + 2 * far * 6 * 8 * 17
    assert make(sinks=2).flops(40) - mixer.flops(40) == 4 * 40 * 2 * 48
    assert mixer.flops(80_000) == pytest.approx(2 * mixer.flops(40_000), rel=1e-3)


def test_autocast_keeps_logarithms_in_float32():
    mixer, x = make().float(), inputs().float()
    exact = mixer(x).y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = mixer(x).y
        state = mixer(x[:, :30], state=mixer.init_state(2)).state
        stepped = mixer(x[:, 30:31], state=state).y
    assert half.dtype == torch.bfloat16 and state.far.memory.dtype == torch.float32
    assert (half - exact).norm() < 0.05 * exact.norm()
    assert (stepped[:, 0] - exact[:, 30]).norm() < 0.05 * exact[:, 30].norm()


def test_selected_keys_matter_beyond_the_exact_blocks_alone_and_stay_in_rings():
    mixer, x = make(buckets=4, window=3, center_decay=None).eval(), inputs()
    plain = make()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    first = (mixer.past_blocks + 1) * mixer.block
    with torch.no_grad():
        moved = (mixer(x).y - plain(x).y).abs().amax(-1) > 1e-9
        state = mixer(x, state=mixer.init_state(2)).state
        place, size = state.rings.key.data_ptr(), state.rings.key.shape
        for token in x.split(1, 1):
            state = mixer(token, state=state).state
    assert not moved[:, :first].any() and moved[:, first:].double().mean() > 0.5
    assert state.rings.key.data_ptr() == place and state.rings.key.shape == size == (2, 3, 4 * 3 + 1, 16)
    assert (state.rings.count.sum(-1) == 2 * LENGTH - mixer.block).all(), "every key but the latest block's"
    assert mixer.state_bytes(80) == mixer.state_bytes(10**6)


def test_selected_pairs_and_their_settings():
    mixer, plain = make(buckets=2, window=3), make()
    far = [max(0, (row // 4 - 1) * 4) for row in range(LENGTH)]
    assert mixer.visible_pairs(LENGTH) - plain.visible_pairs(LENGTH) == sum(min(3, n // 2) for n in far)
    assert mixer.flops(LENGTH) - plain.flops(LENGTH) == 4 * 48 * sum(min(3, n // 2) for n in far) + 2 * 40 * 6 * 16
    with pytest.raises(ConfigError, match=r"mixer\.window=0 must be at least 1; mixer=scatterbrain selects no keys"):
        make(buckets=2, window=0)
    with pytest.raises(ConfigError, match=r"mixer\.buckets=3 must be even"):
        make(buckets=3, window=2)


@pytest.mark.parametrize("case", ["default", "summaries", "content"])
def test_where_values_cannot_be_read_the_same_is_computed(case, monkeypatch):
    mixer, x, ids = make(**SETTINGS[case]), inputs(), packed_ids()
    starts = torch.from_numpy(document_starts(ids.numpy()))
    needs = mixer.layout_needs()
    layout = layouts({needs}, x[..., 0], ids, starts)[needs]

    def run() -> list[Tensor]:
        state, pieces = mixer.init_state(2), [mixer(x, document_ids=ids, layout=layout).y]
        for piece in (slice(0, 9), slice(9, 10), slice(10, 31), slice(31, 40)):
            output = mixer(x[:, piece], state=state, document_ids=ids[:, piece])
            state = output.state
            pieces.append(output.y)
        return pieces

    expected = run()
    for module in (scatterbrain_cache, scatterbrain_summaries):
        monkeypatch.setattr(module, "is_readable", lambda x: False)
    for found, right in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
