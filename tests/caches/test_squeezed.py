"""The cache that reads clusters of keys, against the authors' code and against attention to what should be read."""

import numpy as np
import pytest
import torch

from longmix.caches.clusters import centroids_of, cluster_weights, clustered, quantile
from longmix.caches.kinds import kind_of
from longmix.caches.squeezed import Squeezed
from longmix.errors import ConfigError
from longmix.generation.session import Session
from longmix.mixers.flash import Flash
from longmix.mixers.parts.states import caches
from longmix.model.backbone import LanguageModel
from tests.caches.direct import built, case
from tests.caches.prompts import GROUP, KEY_HEADS, WIDTH, begun, rows, step

KIND = Squeezed(newest=5, clusters=0.25, quantile=0.7)
TWO_LEVELS = Squeezed(newest=5, clusters=0.5, quantile=0.6, coarse=0.15)


@pytest.mark.parametrize("number", [0, 1])
def test_weights_thresholds_and_choices_are_those_of_the_authors(number):
    given = case("inference_side/squeezed", number)
    newest, count, labels = int(given["observation"]), int(given["clusters"]), given["labels"]
    layers, heads = labels.shape[:2]
    keys, scale = given["key"][:, :, :-newest].flatten(0, 1), given["key"].shape[-1] ** -0.5
    centroids, sizes = (x.unflatten(0, (layers, heads)) for x in centroids_of(keys, labels.flatten(0, 1), count))
    torch.testing.assert_close(centroids, given["centroids"], rtol=0, atol=1e-6)  # they have float32
    weights = cluster_weights(given["query"][:, :, -newest:], given["centroids"], sizes, scale).mean(2)
    usual = weights.gather(2, labels)
    for share, wanted in given["thresholds"]:
        torch.testing.assert_close(quantile(usual, float(share)), wanted, rtol=1e-6, atol=0)
    asked = cluster_weights(given["user_query"], given["centroids"], sizes, scale).mean(2).gather(2, labels)
    torch.testing.assert_close(asked, given["user_score"], rtol=0, atol=1e-12)
    assert torch.equal(asked >= given["thresholds"][2, 1], given["keep_at_80"].bool())


def test_thresholds_of_groups_are_those_of_the_authors():
    given = case("inference_side/squeezed", 0)
    labels, scale = given["level1_of_key"], given["key"].shape[-1] ** -0.5
    sizes = torch.nn.functional.one_hot(labels).sum(2)
    weights = cluster_weights(given["query"][:, :, -10:], given["level1_centroids"], sizes, scale).mean(2)
    for share, wanted in given["level1_thresholds"]:
        torch.testing.assert_close(quantile(weights.gather(2, labels), float(share)), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_quantile_is_that_of_numpy(length, share):
    x = torch.randn(length, dtype=torch.float64)
    assert abs(float(quantile(x, share)) - np.quantile(x.numpy(), share)) < 1e-12


def test_clusters_find_directions_and_stay_put():
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2, 6, 16, dtype=torch.float64), dim=-1)
    true = torch.arange(120) % 6
    keys = directions[:, true] * torch.rand(2, 120, 1) * 5 + 0.01 * torch.randn(2, 120, 16)
    found = clustered(keys, 6, rounds=300, seed=0)
    for labels in found:  # as many pairs of true and found clusters as clusters
        assert len({(int(a), int(b)) for a, b in zip(true, labels, strict=True)}) == 6
    units = torch.nn.functional.normalize(keys, dim=-1)
    sums = torch.zeros(2, 6, 16, dtype=torch.float64).scatter_add(1, found[..., None].expand(-1, -1, 16), units)
    assert torch.equal((units @ torch.nn.functional.normalize(sums, dim=-1).mT).argmax(-1), found)
    assert torch.equal(found[:1], clustered(keys[:1], 6, rounds=300, seed=0))


def direct(cache, tensors, lengths, places, row):
    """The output of a row's token behind its prompt, reading the clusters of each head that its formulas choose."""
    kind, length = cache.kind, lengths[row]
    query, key, value = (x[row] for x in tensors)
    read = []
    for head in range(KEY_HEADS):
        slots = int(cache.kept_count[row])
        labels = cache.clusters["labels"][row, head, :slots].long()
        kept = cache.kept_key[row, head, :slots]
        place_of = [int((key[:length, head] == one).all(-1).nonzero()) for one in kept]
        count = int(labels[labels < cache.clusters["sizes"].shape[2]].max()) + 1 if length > 20 else 0
        keep = set(range(max(0, length - kind.newest), length))
        assert sorted(place_of) == list(range(length))
        if count:
            clusters = {c: [p for p, at in zip(place_of, labels, strict=True) if at == c] for c in range(count)}
            for one in query[places[row]].unflatten(0, (KEY_HEADS, GROUP))[head]:
                scores = {c: WIDTH**-0.5 * float(one @ key[at, head].mean(0)) for c, at in clusters.items() if at}
                if kind.coarse:
                    groups = {}
                    for c in scores:
                        groups.setdefault(int(cache.clusters["groups"][row, head, c]), []).append(c)
                    middle = {
                        g: torch.stack([key[clusters[c], head].mean(0) for c in cs]).mean(0) for g, cs in groups.items()
                    }
                    of_group = {g: WIDTH**-0.5 * float(one @ x) for g, x in middle.items()}
                    total = sum(sum(len(clusters[c]) for c in groups[g]) * np.exp(x) for g, x in of_group.items())
                    passed = [g for g, x in of_group.items() if np.exp(x) / total >= float(cache.group_threshold[row])]
                    scores = {c: x for c, x in scores.items() if any(c in groups[g] for g in passed)}
                total = sum(len(clusters[c]) * np.exp(x) for c, x in scores.items())
                for c, x in scores.items():
                    if np.exp(x) / total >= float(cache.threshold[row]):
                        keep |= set(clusters[c])
        read.append(sorted(keep) + list(range(length, places[row] + 1)))
    outputs = []
    for head, at in enumerate(read):
        asking = query[places[row]].unflatten(0, (KEY_HEADS, GROUP))[head]
        outputs += [(WIDTH**-0.5 * key[at, head] @ one).softmax(0) @ value[at, head] for one in asking]
    return torch.stack(outputs), sum(len([p for p in at if p < length]) for at in read)


@pytest.mark.parametrize("kind", [KIND, TWO_LEVELS], ids=["one-level", "two-levels"])
@pytest.mark.parametrize("lengths", [(40, 40), (40, 27, 3)], ids=str)
def test_what_is_read_is_what_queries_ask_for(kind, lengths):
    tensors = rows(len(lengths), 60)
    cache = begun(kind, tensors, lengths)
    fewer = 0
    for number in range(6):
        places = [length + number for length in lengths]
        found = step(cache, tensors, places)
        for row in range(len(lengths)):
            wanted, slots = direct(cache, tensors, lengths, places, row)
            torch.testing.assert_close(found[row, 0], wanted, rtol=0, atol=1e-12)
            assert int(cache.slots_read[row]) == slots
            fewer += slots < KEY_HEADS * lengths[row]
    assert fewer > 6 and cache.read_bytes() < cache.held_bytes()


@pytest.mark.parametrize("count", [4, 20])
def test_a_piece_reads_by_the_mean_weight_of_its_queries(count):
    tensors = rows(2, 70)
    cache = begun(KIND, tensors, (40, 40))
    query = torch.stack([x[40 : 40 + count] for x in tensors[0]]).transpose(1, 2)
    weights = cluster_weights(query, cache.clusters["centroids"], cache.clusters["sizes"], WIDTH**-0.5).mean(2)
    asked = (weights >= cache.threshold[:, None, None]).unflatten(1, (KEY_HEADS, GROUP)).any(2)
    wanted = KIND.newest * KEY_HEADS + (cache.clusters["sizes"] * asked).sum((1, 2))
    step(cache, tensors, (40, 40), count)
    assert torch.equal(cache.slots_read, wanted) and (wanted < 40 * KEY_HEADS).all()


def test_forks_share_keys_and_clusters_and_ask_for_their_own():
    tensors = rows(2, 60)
    cache = begun(KIND, tensors, (40, 40))
    forked = cache.fork(3)
    assert forked.clusters["labels"] is cache.clusters["labels"] and forked.kept_key is cache.kept_key
    both = [x.repeat_interleave(3, 0) for x in tensors]
    found = step(forked, both, [40, 41, 42] * 2)
    for number in range(3):
        alone = step(cache.fork(1), tensors, [40 + number] * 2)
        torch.testing.assert_close(found[number::3], alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_layers_have_one_threshold_of_each_row():
    torch.manual_seed(0)
    model = LanguageModel(
        lambda shape, index: Flash(shape, index), vocab_size=30, d_model=32, num_layers=3, num_heads=4, mlp_hidden=16
    )
    model = model.double().eval()
    prompts = [torch.randint(30, (length,)) for length in (50, 30, 9)]
    session = Session(model, 3, KIND)
    session.prefill(prompts)
    held = caches(session.state)
    thresholds = torch.stack([cache.threshold for cache in held])
    assert (thresholds == thresholds[:1]).all() and (thresholds[0, :2] > 0).all() and thresholds[0, 2] == 0
    for row, prompt in enumerate(prompts[:2]):
        state = model(prompt[None], state=model.decoding_state(1, KIND)).state
        seen = []
        for cache in caches(state):
            cache.prompt_ended()
            seen += cache.usual["threshold"][0]
        wanted = np.quantile(torch.cat([x.flatten() for x in seen]).numpy(), KIND.quantile)
        assert abs(float(thresholds[0, row]) - wanted) < 1e-12
    assert not any(cache.usual for cache in held)


def test_bytes_are_counted():
    one = torch.zeros(1, 1, 8, 128, dtype=torch.bfloat16)
    shape, kind = built(Squeezed(), one, one, one).shape, kind_of("squeezed")
    length = 8100
    tokens, clusters = length * 8 * 2 * 128 * 2, 400 * 8 * (128 * 2 + 4)
    assert kind.bytes(shape, length) == tokens + clusters + length * 8 * 2
    assert kind.step_bytes(shape, length) == (100 + 1 + 1600) * 8 * 2 * 128 * 2 + clusters
    assert kind.bytes(shape, 120) == 120 * shape.token_bytes and kind.step_bytes(shape, 120) == 121 * shape.token_bytes
    for each in (KIND, TWO_LEVELS):
        cache = begun(each, rows(2, 60), (40, 40))
        assert cache.held_bytes() == 2 * each.bytes(cache.shape, 40)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"newest": 0}, r"cache\.newest=0 must be at least 1"),
        ({"rounds": -1}, r"cache\.rounds=-1 must be at least 0"),
        ({"clusters": 0.0}, r"cache\.clusters=0\.0 must be above 0"),
        ({"quantile": 1.1}, r"cache\.quantile=1\.1 must be from 0 to 1"),
        ({"coarse": 0.05}, r"cache\.coarse=0\.05 must be from 0 to below cache\.clusters=0\.05"),
    ],
)
def test_settings_out_of_range_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        kind_of("squeezed", settings)
