"""Routing: every mode against its definition, choices that never look ahead, rings, and the published form's leak."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longmix.config import ModelConfig, resolved
from longmix.errors import ConfigError
from longmix.mixers.parts import routing_modes as modes
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.between_steps import finish_step
from longmix.mixers.parts.metrics import Measure
from longmix.mixers.parts.rotary import rotary_angles, rotate
from longmix.mixers.routing import Routing
from longmix.mixers.sliding_window import SlidingWindow
from longmix.model.build import build_model

SHAPE = ModelShape(d_model=48, num_layers=2, num_heads=3)
LENGTH = 40

CAUSAL = {
    "window": {"window": 4},
    "window-separate": {"window": 3, "shared_qk": False},
    "window-grouped": {"window": 4, "shared_qk": False, "num_kv_heads": 1},
    "window-two-clusters": {"window": 3, "clusters": 5, "clusters_per_query": 2},
    "window-two-clusters-separate": {"window": 3, "clusters": 5, "clusters_per_query": 2, "shared_qk": False},
    "full": {"mode": "argmax_full", "window": 1},
    "full-separate": {"mode": "argmax_full", "window": 1, "shared_qk": False, "local_heads": 0},
    "prefix": {"mode": "prefix_topk", "window": 3, "block": 6},
    "prefix-separate": {"mode": "prefix_topk", "window": 4, "block": 5, "shared_qk": False, "num_kv_heads": 1},
    "prefix-every-token": {"mode": "prefix_topk", "window": 2, "block": 1},
    "threshold": {"mode": "threshold", "window": 4, "share": 0.5},
    "threshold-separate": {"mode": "threshold", "window": 3, "clusters_per_key": 3, "shared_qk": False},
    "threshold-one": {"mode": "threshold", "window": 3, "clusters_per_key": 1, "share": 0.3},
}


def make(**settings) -> Routing:
    torch.manual_seed(1)
    return Routing(SHAPE, 0, **{"clusters": 3, "local_window": 5, **settings}).double()


def inputs(seed: int = 2, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, SHAPE.d_model, dtype=torch.float64, generator=generator)


def packed_ids() -> Tensor:
    lengths = [(5, 1, 23, 11), (26, 7, 6, 1)]
    return torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor(row)) for row in lengths]).int()


def alone(x: Tensor) -> Tensor:
    return x


def scores_of(mixer: Routing, heads: Tensor) -> Tensor:
    """Cosines with each centroid, head by head: [B, T, H, clusters]."""
    groups = heads.shape[2] // mixer.kmeans.centroids.shape[0]
    columns = []
    for head in range(heads.shape[2]):
        x = heads[:, :, head]
        columns.append((x / x.norm(dim=-1, keepdim=True)) @ mixer.kmeans.centroids[head // groups].T)
    return torch.stack(columns, 2)


def seen(mixer: Routing, query_score: Tensor, key_scores: Tensor, own: int, begin: int) -> list[int]:
    """Keys that the query at `own` sees in its document from `begin` on; scores [clusters] and [T, clusters]."""
    gap = int(mixer.shared_qk)
    nearest = key_scores.argmax(-1).tolist()
    before = range(begin, own + 1 - gap)
    clusters = query_score.sort(descending=True).indices[: mixer.clusters_per_query].tolist()
    if mixer.mode == "prefix_topk":
        (cluster,) = clusters
        start = begin + (own - begin) // mixer.block * mixer.block
        best = sorted(range(begin, start), key=lambda j: -round(4096 * key_scores[j, cluster].item()))[: mixer.window]
        return best + [j for j in before if j >= start and nearest[j] == cluster][-mixer.window :]
    if mixer.mode == "threshold":
        (cluster,) = clusters
        ranks = key_scores.argsort(descending=True)[:, : mixer.clusters_per_key].tolist()
        over = key_scores[:, cluster] > mixer.threshold.value[0, cluster]
        return [j for j in before if cluster in ranks[j] and over[j]][-mixer.window :]
    members = [[j for j in before if nearest[j] == cluster] for cluster in clusters]
    if mixer.shared_qk and not members[0]:
        members[0] = [own]
    limit = 0 if mixer.mode == "argmax_full" else -mixer.window
    return list(itertools.chain.from_iterable(some[limit:] for some in members))


def defined(mixer: Routing, x: Tensor, ids: Tensor | None) -> Tensor:
    """The mixer's output from one mask over all pairs."""
    query, key, value = mixer.project(x)
    local, local_kv, group = mixer.local_heads, mixer.local_kv_heads, mixer.num_heads // mixer.num_kv_heads
    query_scores, key_scores = scores_of(mixer, query[:, :, local:]), scores_of(mixer, key[:, :, local_kv:])
    ids = torch.zeros(2, LENGTH, dtype=torch.int32) if ids is None else ids
    visible = torch.zeros(2, mixer.num_heads, LENGTH, LENGTH, dtype=torch.bool)
    begin = torch.searchsorted(ids, ids)
    for row, head, own in itertools.product(range(2), range(mixer.num_heads), range(LENGTH)):
        start = int(begin[row, own])
        if head < local:
            visible[row, head, own, max(start, own + 1 - mixer.local_window) : own + 1] = True
            continue
        some = query_scores[row, own, head - local], key_scores[row, :, (head - local) // group]
        visible[row, head, own, seen(mixer, *some, own, start)] = True
    positions = torch.arange(LENGTH) - begin
    cosine, sine = rotary_angles(positions, mixer.rotary)
    query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
    key, value = (y.repeat_interleave(group, 2) for y in (key, value))
    weights = torch.einsum("bihd,bjhd->bhij", query, key) * mixer.head_dim**-0.5
    weights = weights.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    return mixer.output(torch.einsum("bhij,bjhd->bihd", weights, value).flatten(2))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("settings", CAUSAL.values(), ids=CAUSAL)
def test_from_its_definition(settings, packed):
    mixer, x, ids = make(**settings), inputs().requires_grad_(), packed_ids() if packed else None
    mixer.commitment = 0.0
    ours, expected = mixer(x, document_ids=ids).y, defined(mixer, x, ids)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    if settings.get("block") != 1 and not packed:
        grad = torch.randn_like(ours)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, expected)), rtol=0, atol=1e-11)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("settings", CAUSAL.values(), ids=CAUSAL)
def test_decoding_without_gradients_equals_one_pass(settings, packed):
    """Rings are written in place then, over and over: 40 tokens go through rings of a few places."""
    mixer, x, ids = make(**settings).eval(), inputs(), packed_ids() if packed else None
    with torch.no_grad():
        whole = mixer(x, document_ids=ids).y
        for split in ((1,) * LENGTH, (17, 1, 1, 9, 1, 11)):
            state, pieces, start = mixer.init_state(2), [], 0
            for length in split:
                some = slice(start, start + length)
                output = mixer(x[:, some], state=state, document_ids=None if ids is None else ids[:, some])
                state, start = output.state, start + length
                pieces.append(output.y)
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("settings", CAUSAL.values(), ids=CAUSAL)
def test_equal_tokens_are_chosen_alike_in_rows_of_any_length(settings):
    """In the first layer equal tokens have equal scores, so that a rank alone says nothing."""
    mixer, length = make(**settings).eval(), 90
    kinds = torch.randint(3, (2, length), generator=torch.Generator().manual_seed(5))
    x = inputs()[torch.arange(2)[:, None], kinds]
    with torch.no_grad():
        whole = mixer(x).y
        for cut in (19, 40, 64, 77):
            torch.testing.assert_close(mixer(x[:, :cut]).y, whole[:, :cut], rtol=0, atol=1e-12)
        state = mixer(x[:, :70], state=mixer.init_state(2)).state
        for place in range(70, length):
            output = mixer(x[:, place : place + 1], state=state)
            state = output.state
            torch.testing.assert_close(output.y, whole[:, place : place + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", [mode for mode in modes.CAUSAL if mode != "argmax_full"])
def test_decoding_in_half_precision(mode):
    mixer, x = make(mode=mode, window=4, block=6).float().eval(), inputs().float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole = mixer(x).y
        output = mixer(x[:, :30], state=mixer.init_state(2))
        pieces = [output.y]
        for token in x[:, 30:].split(1, 1):
            output = mixer(token, state=output.state)
            pieces.append(output.y)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(pieces, 1).float(), whole.float(), rtol=0, atol=0.05)


def test_a_ring_neither_grows_nor_moves():
    mixer = make(window=4).eval()
    with torch.no_grad():
        state = mixer(inputs(), state=mixer.init_state(2)).state
        place, size = state.rings.key.data_ptr(), mixer.state_bytes(LENGTH)
        for _ in range(3):
            state = mixer(inputs()[:, :1], state=state).state
            assert state.rings.key.data_ptr() == place and state.recent.key.shape[1] == 4
    assert size == mixer.state_bytes(10**6)


def test_with_gradients_a_state_can_be_used_again():
    mixer, x = make(window=4), inputs()
    state = mixer(x[:, :20], state=mixer.init_state(2)).state
    first, second = (mixer(x[:, 20:21], state=state).y for _ in range(2))
    assert torch.equal(first, second)
    first.sum().backward()


@pytest.mark.parametrize("settings", CAUSAL.values(), ids=CAUSAL)
def test_gradients_through_a_state_are_those_of_one_pass(settings):
    """Keys that a ring has overwritten get none, though they were written."""
    mixer, x = make(**settings), inputs().requires_grad_()
    first = mixer(x[:, :30], state=mixer.init_state(2))
    second = mixer(x[:, 30:31], state=first.state)
    last = mixer(x[:, 31:], state=second.state).y
    whole, grad = mixer(x).y, torch.randn(2, LENGTH - 30, SHAPE.d_model, dtype=torch.float64)
    pieces = torch.cat((second.y, last), 1)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, grad)[0] for y in (pieces, whole[:, 30:])), rtol=0, atol=1e-12
    )


def choices(mixer: Routing, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and what `select` answered."""
    answers, select = [], mixer.select
    mixer.select = lambda *arguments: answers.append(select(*arguments)) or answers[-1]
    try:
        return mixer(x).y, [answers[0].query_labels, answers[0].key_labels]
    finally:
        mixer.select = select


@pytest.mark.parametrize("settings", CAUSAL.values(), ids=CAUSAL)
def test_no_later_token_has_a_say_in_what_an_earlier_one_sees(settings):
    mixer, x = make(**settings), inputs()
    before, chosen = choices(mixer, x)
    for cut in (5, 20, LENGTH - 1):
        changed = x.clone()
        changed[:, cut:] = 30 * inputs(seed=cut)[:, cut:]
        after, chosen_after = choices(mixer, changed)
        torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=0, atol=1e-12)
        for a, b in zip(chosen, chosen_after, strict=True):
            assert torch.equal(a[:, :cut], b[:, :cut])


def test_the_published_form_leaks_and_says_so():
    with pytest.warns(UserWarning, match="mixer.mode=sequence_topk lets later tokens decide"):
        mixer = make(mode="sequence_topk", window=8)
    assert mixer.leaky and not make(window=4).leaky
    x = inputs()
    changed = x.clone()
    changed[:, -1] = 30 * inputs(seed=7)[:, -1]
    moved = (mixer(changed).y - mixer(x).y)[:, :-1].abs().amax(-1) > 1e-6
    assert 0.01 < moved.double().mean() < 1
    with pytest.raises(ConfigError, match=r"mixer\.mode=sequence_topk .* cannot go on token by token"):
        mixer.init_state(1)


@pytest.mark.filterwarnings("ignore:mixer.mode")
def test_the_published_form_keeps_contents_of_documents_apart():
    """Documents compete for places, so values and not selections are compared."""
    mixer, x, ids = make(mode="sequence_topk", window=8, local_heads=0), inputs(), packed_ids()
    plain = mixer.project

    def values_of(document):
        other = (ids == document)[..., None, None]
        mixer.project = lambda x: (*plain(x)[:2], torch.where(other, plain(x)[2] + 1e3, plain(x)[2]))
        return mixer(x, document_ids=ids).y

    before = values_of(-1)
    for document in range(4):
        others = ids != document
        torch.testing.assert_close(values_of(document)[others], before[others], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_the_published_form_equals_another_implementation(shared):
    oracle = pytest.importorskip("routing_transformer.routing_transformer", reason="an optional oracle")
    clusters, window, heads, dim = 4, 10, 3, 8
    theirs = oracle.KmeansAttention(clusters, window, heads, dim, causal=True, shared_qk=shared).double().eval()
    generator = torch.Generator().manual_seed(0)
    size = 2, LENGTH, heads, dim
    query, key, value = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(3))
    if shared:
        key = query
    else:
        # It has a learned key beside each cluster's; one that no query likes, with value 0, is as good as none.
        query[..., -1], key[..., -1] = 1.0, 0.0
        with torch.no_grad():
            theirs.mem_key.zero_()[..., -1] = -1e6
            theirs.mem_value.zero_()
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    with torch.no_grad():
        theirs(*(x.transpose(1, 2) for x in leaves))  # the first call draws its centroids
    expected = theirs(*(x.transpose(1, 2) for x in (leaves[0], leaves[0] if shared else leaves[1], leaves[2])))[0]

    means = theirs.kmeans.means
    scores = [torch.einsum("bthd,hcd->bthc", F.normalize(x.detach(), dim=-1), means) for x in (query, key)]
    rows = Rows(leaves[0], F.normalize(leaves[0], dim=-1) if shared else leaves[1], leaves[2], None, *scores)
    ours = modes.sequence_topk(rows, window, shared)[0]
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=0, atol=1e-14)
    assert not ours.abs().amax(-1).all(), "tokens in no cluster are among them"
    grad = torch.randn_like(ours)
    sides = [leaves[0], leaves[2]] if shared else leaves
    for a, b in zip(
        *(torch.autograd.grad(y, sides, g) for y, g in ((ours, grad), (expected, grad.transpose(1, 2)))), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_another_order_of_the_clusters_changes_nothing():
    for settings in ({"window": 4}, {"mode": "prefix_topk", "window": 3, "block": 6}):
        mixer, x = make(**settings), inputs()
        before = mixer(x).y
        mixer.kmeans.centroids.copy_(mixer.kmeans.centroids.roll(1, dims=1))
        torch.testing.assert_close(mixer(x).y, before, rtol=0, atol=1e-12)


def test_one_window_over_everything_is_the_plain_window():
    """With one centroid for all and no other in reach, routed heads are causal attention."""
    mixer, x = make(window=LENGTH, shared_qk=False, local_window=LENGTH, clusters=2), inputs()
    mixer.kmeans.centroids.copy_(mixer.kmeans.centroids[:, :1])
    plain = SlidingWindow(SHAPE, 0, window=LENGTH).double()
    plain.load_state_dict({name: w for name, w in mixer.state_dict().items() if name in plain.state_dict()})
    torch.testing.assert_close(mixer(x).y, plain(x).y, rtol=0, atol=1e-12)


def test_what_training_reports():
    mixer, x = make(window=4, clusters=4), inputs()
    output = mixer(x)
    assert set(output.metrics) == {
        *("largest_cluster", "entropy", "occupied", "quantisation_error", "dead_clusters", "empty_rows"),
    }
    query = mixer.project(x)[0][:, :, 1:]
    best = scores_of(mixer, query).amax(-1)
    error = (2 - 2 * best).mean()
    torch.testing.assert_close(output.metrics["quantisation_error"], error)
    torch.testing.assert_close(output.losses["commitment"], 1e-4 * error)
    share = F.one_hot(scores_of(mixer, query).argmax(-1), 4).double().mean((0, 1))
    figures = {name: x.figure() for name, x in output.metrics.items() if isinstance(x, Measure)}
    assert figures["largest_cluster"] == pytest.approx(4 * share.amax(-1).mean().item(), rel=1e-6)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(-1).mean() / torch.tensor(4.0).log()
    assert figures["entropy"] == pytest.approx(entropy.item(), rel=1e-6)
    assert figures["occupied"] == (share > 0).double().mean() and figures["empty_rows"] == 0
    separate = make(window=4, clusters=4, shared_qk=False)(x)
    assert 0 < separate.metrics["empty_rows"].figure() < 1
    output = mixer.eval()(x)
    assert not output.metrics and not output.losses


def test_commitment_draws_queries_and_keys_to_their_centroids():
    mixer, x = make(window=4, shared_qk=False, commitment=1.0), inputs()
    before = mixer(x)
    before.losses["commitment"].backward()
    assert mixer.value.weight.grad is None and mixer.key.weight.grad.any()
    assert not mixer.kmeans.centroids.requires_grad
    with torch.no_grad():
        for weight in (mixer.query.weight, mixer.key.weight):
            weight -= 0.1 * weight.grad
    assert mixer(x).losses["commitment"] < before.losses["commitment"]
    assert "commitment" not in make(window=4, commitment=0.0)(x).losses


@pytest.mark.parametrize("heads", [{}, {"num_kv_heads": 1}], ids=["separate", "grouped"])
def test_queries_and_keys_count_half_each(heads):
    mixer, x = make(window=4, shared_qk=False, local_heads=0, **heads), inputs()
    query, key, _ = mixer.project(x)
    sums = torch.zeros_like(mixer.kmeans.sums)
    for side in (query, key):
        group = side.shape[2] // mixer.num_kv_heads
        nearest = scores_of(mixer, side).argmax(-1)
        for head, cluster in itertools.product(range(side.shape[2]), range(3)):
            mine = side[:, :, head][nearest[:, :, head] == cluster]
            sums[head // group, cluster] += F.normalize(mine, dim=-1).sum(0) / group
    mixer(x)
    finish_step(mixer, True, alone)
    share = 1 - mixer.kmeans.decay
    torch.testing.assert_close(mixer.kmeans.sums, share * sums / (2 * 2 * LENGTH), rtol=0, atol=1e-12)


def test_training_evens_the_clusters_out_and_random_centroids_stay():
    """Queries lean one way, so that at first nearly all fall into one cluster."""
    shape, leaning = ModelShape(64, 2, 2), 2 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    results = {}
    for centroids in ("learned", "random"):
        torch.manual_seed(0)
        mixer = Routing(shape, 0, clusters=8, window=16, local_heads=0, centroids=centroids)
        before = mixer.kmeans.centroids.clone()
        for _ in range(30):
            metrics = mixer(torch.randn(1, 800, 64) + leaning).metrics
            finish_step(mixer, True, alone)
        results[centroids] = metrics
        assert torch.equal(mixer.kmeans.centroids, before) == (centroids == "random")
    learned, random = results["learned"], results["random"]
    assert learned["entropy"].figure() > 0.85 > random["entropy"].figure() and learned["dead_clusters"] == 0
    assert learned["quantisation_error"] < random["quantisation_error"]


def test_random_state_of_the_program_does_not_choose_centroids():
    first = make(window=4)
    torch.manual_seed(99)
    second = Routing(SHAPE, 0, clusters=3, window=4).double()
    assert torch.equal(first.kmeans.centroids, second.kmeans.centroids)
    others = Routing(SHAPE, 1, clusters=3, window=4), Routing(SHAPE, 0, clusters=3, window=4, centroid_seed=1)
    for other in others:
        assert not torch.equal(first.kmeans.centroids, other.double().kmeans.centroids)


@pytest.mark.parametrize(("length", "tolerance"), [(64, 0.25), (1024, 0.12)])
@pytest.mark.parametrize(
    "settings",
    [
        {"window": 8},
        {"window": 8, "clusters_per_query": 2},
        {"mode": "argmax_full", "window": 1},
        {"mode": "threshold", "window": 8, "clusters_per_key": 8},
        {"mode": "prefix_topk", "window": 8, "block": 16},
    ],
    ids=str,
)
def test_pairs_are_counted_as_if_clusters_were_even(settings, length, tolerance):
    shape = ModelShape(64, 2, 2)
    mixer = Routing(shape, 0, clusters=8, local_heads=0, shared_qk=False, **settings)
    labels = torch.randint(0, 8, (1, length, 2), generator=torch.Generator().manual_seed(0))
    score = torch.rand(1, length, 2, 8, generator=torch.Generator().manual_seed(1))
    one = torch.ones(1, length, 2, 32)
    rows = Rows(one, one, one, None, labels.unsqueeze(-1).int(), labels.unsqueeze(-1).int())
    pairs = 0
    if mixer.clusters_per_query == 2:
        rows.query_labels = torch.cat((rows.query_labels, (rows.query_labels + 1) % 8), -1)
    if mixer.mode == "prefix_topk":
        rows.key_labels = score.scatter_add(-1, labels.unsqueeze(-1), one[..., :1])
        ends = range(16, length, 16)
        pairs = 2 * sum(min(8, end) * min(16, length - end) for end in ends)
    if mixer.mode == "threshold":
        best = score.topk(8, dim=-1).indices
        rows.key_labels = torch.where(score.gather(-1, best) > 1 - mixer.share, best, 8).int()
    for order in mixer._route(rows)[1]:
        hi = torch.arange(1, length + 1).expand_as(order.lo) if order.hi is None else order.hi
        pairs += int((hi - order.lo).clamp(min=0).sum())
    assert mixer.visible_pairs(length) == pytest.approx(pairs / 2, rel=tolerance)
    assert mixer.flops(length) > 4 * 64 * mixer.visible_pairs(length)


REFUSED = {
    "mode": ({"mode": "topk"}, "mixer.mode=topk is unknown; use one of argmax_window, "),
    "clusters": ({"clusters": 1}, "mixer.clusters=1 must be at least 2"),
    "window": ({"window": 0}, "mixer.window=0 must be at least 1"),
    "local-window": ({"local_window": 0}, "mixer.local_window=0"),
    "block": ({"block": 0}, "mixer.block=0"),
    "all-local": ({"local_heads": 3}, "mixer.local_heads=3 must be from 0 to below the 3 heads"),
    "split-group": (
        {"num_heads": 4, "num_kv_heads": 2, "local_heads": 1, "shared_qk": False},
        "mixer.local_heads=1 .* a multiple of 2",
    ),
    "shared-grouped": ({"num_kv_heads": 1}, "mixer.num_kv_heads=1 must be the .* 3; or set mixer.shared_qk=false"),
    "per-query": ({"clusters_per_query": 4}, "mixer.clusters_per_query=4 exceeds mixer.clusters=3"),
    "per-query-mode": (
        {"mode": "threshold", "clusters_per_query": 2},
        "mixer.clusters_per_query=2 is for argmax_window and argmax_full; use 1 with mixer.mode=threshold",
    ),
    "per-key": ({"mode": "threshold", "clusters_per_key": 4}, "mixer.clusters_per_key=4 exceeds"),
    "share": ({"mode": "threshold", "share": 1.0}, "mixer.share=1.0 must be between 0 and 1"),
    "centroids": ({"centroids": "fixed"}, "mixer.centroids=fixed is unknown; use learned or random"),
    "decay": ({"centroid_decay": 1.0}, "mixer.centroid_decay=1.0"),
    "commitment": ({"commitment": -1.0}, "mixer.commitment=-1.0 must not be negative"),
}


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED)
def test_impossible_settings_are_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=words):
        Routing(SHAPE, 0, **{"clusters": 3, "window": 4, **settings})


@pytest.mark.parametrize(
    ("name", "layers", "local", "routed"), [("wikitext103", 14, 8, 8), ("enwik8", 12, 4, 4), ("pg19", 22, 6, 2)]
)
def test_presets_have_the_layers_and_heads_of_the_paper(compose_config, name, layers, local, routed):
    config = resolved(compose_config(f"experiment=routing_{name}", "trainer.accelerator=cpu"))
    with torch.device("meta"):
        model = build_model(ModelConfig.of(config), vocab_size=1000)
    mixers = model.mixers()
    routing = [mixer for mixer in mixers if isinstance(mixer, Routing)]
    assert len(mixers) == layers and len(routing) == (1 if name == "pg19" else layers)
    assert isinstance(mixers[-1], Routing)
    assert all((mixer.local_heads, mixer.num_heads - mixer.local_heads) == (local, routed) for mixer in routing)
    assert all(mixer.clusters * mixer.window == config["seq_len"] for mixer in routing)


class Ranked(TorchDispatchMode):
    """Notes among how many rows the best are looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::topk":
            self.rows.append(args[0].shape[1])
        return function(*args, **(kwargs or {}))


def test_a_list_of_a_prefix_is_made_of_the_one_before_and_its_block():
    mixer = Routing(SHAPE, 0, mode="prefix_topk", window=8, block=16, clusters=3)
    with Ranked() as ranked, torch.no_grad():
        mixer(torch.randn(2, 256, 48))
    assert ranked.rows == [256, *[8 + 16] * 16]
