"""The cache that chooses tokens by codes of their keys, against the authors' code and against its formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from longmix.caches import a2ats
from longmix.caches.a2ats import A2ATS
from longmix.caches.codebooks import best_tokens, code_scores, codebook_of, metric_factor, nearest_codes
from longmix.caches.kinds import kind_of
from longmix.errors import ConfigError
from longmix.mixers.parts.states import caches
from tests.caches.direct import attended, built, case
from tests.caches.prompts import GROUP, KEY_HEADS, WIDTH, begun, padded, rows, step
from tests.caches.rotations import Exact64, turned
from tests.caches.test_caches import begun as session_of
from tests.caches.test_caches import model_of, steps, tokens_of

KIND = A2ATS(sinks=2, window=4, share=0.15, codes=0.3, distance=17)
ROTARY = Exact64(100.0, WIDTH)


def of_topk(scores, codes, allowed, counts):
    """`best_tokens` by `topk` over tokens, as the authors have it; which of equal tokens it takes is its own matter."""
    spread = scores.gather(-1, codes.unsqueeze(2).expand(*codes.shape[:2], scores.shape[2], -1))
    spread = spread.masked_fill(~allowed[:, None, None], -torch.inf)
    index = spread.topk(int(counts.max()), -1).indices
    return torch.zeros_like(spread, dtype=torch.bool).scatter_(-1, index, True)


def of_authors(number):
    """A case, its rotation, and its queries [1, T, Hq, K], keys and values, rotated."""
    given = case("inference_side/a2ats", number)
    heads, width = given["codebook"].shape[0], given["codebook"].shape[2]
    names = ("query_weight", "key_weight", "value_weight")
    tensors = [(given["x"] @ given[name].T).unflatten(-1, (-1, width)) for name in names]
    rotary, place = Exact64(10_000.0, width), torch.arange(given["x"].shape[1])
    assert tensors[1].shape[2] == heads
    return given, rotary, [*(turned(x[0], place, rotary)[None] for x in tensors[:2]), tensors[2]]


@pytest.mark.parametrize("number", [0, 1])
def test_codes_choices_and_outputs_are_those_of_the_authors(number, monkeypatch):
    given, rotary, tensors = of_authors(number)
    names = {name: int(given[name]) for name in ("sinks", "window")}
    kind = A2ATS(**names, share=float(given["share"]), distance=int(given["relative"]))
    cache, prompt, length = built(kind, *tensors, rotary=rotary), int(given["prefilled"]), given["x"].shape[1]
    found = [attended(cache, *tensors, slice(0, prompt))]
    cache.ended, cache.prompt_slots = True, prompt
    count = torch.tensor([given["codebook"].shape[1]], dtype=torch.int32)
    cache.take_codebooks(given["codebook"][None], given["cholesky"][None], count, given["relative"][None])
    monkeypatch.setattr(a2ats, "best_tokens", of_topk)  # tokens of a code are equal, and the authors take those of topk
    chosen, choose = [], cache.chosen
    monkeypatch.setattr(cache, "chosen", lambda new: chosen.append(choose(new)) or chosen[-1])
    found += [attended(cache, *tensors, slice(place, place + 1)) for place in range(prompt, length)]
    assert torch.equal(cache.codes.whole()[0][0, :, :, 0].long(), given["codes"])
    for mask, wanted in zip(chosen, given["selected"].bool(), strict=True):
        assert torch.equal(mask[0], wanted[:, : mask.shape[2]])
        assert mask.sum() < 0.7 * mask.numel()
    output = torch.cat(found, 1).flatten(2) @ given["output_weight"].T
    torch.testing.assert_close(output, given["output"], rtol=0, atol=1e-6)  # they have float32


def test_of_one_code_the_earlier_tokens_are_chosen():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 2, 2, 7, generator=generator, dtype=torch.float64)
    codes = torch.randint(7, (3, 2, 40), generator=generator)
    allowed = torch.rand(3, 40, generator=generator) < 0.7
    for counts in ((5, 0, 17), (1, 60, 2), (int(allowed[0].sum()), 3, 29)):
        found = best_tokens(scores, codes, allowed, torch.tensor(counts))
        for row, head, one in np.ndindex(3, 2, 2):
            there = [place for place in range(40) if allowed[row, place]]
            ordered = sorted(there, key=lambda place: (-float(scores[row, head, one, codes[row, head, place]]), place))
            assert found[row, head, one].nonzero().flatten().tolist() == sorted(ordered[: counts[row]])


def test_the_metric_of_queries_makes_distances_of_errors():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(50, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    factor = metric_factor(query.T @ query)
    size = float((query.T @ query).square().mean().sqrt())
    key, code = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    error = float((query @ (key - code)).square().sum()) / size
    wanted = float(((key - code) @ factor).square().sum()) - 1e-6 * float((key - code).square().sum())
    assert error == pytest.approx(wanted, rel=1e-12)
    assert torch.equal(factor, factor.tril())
    found = code_scores(query[:3], (code @ factor)[None], factor, 0.5)
    torch.testing.assert_close(found[:, 0], 0.5 * query[:3] @ code, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries", [0, 1, 3])
def test_few_queries_make_a_metric(queries):
    query = torch.randn(queries, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor = metric_factor(query.T @ query)
    assert factor.isfinite().all() and (factor.diagonal() > 0).all()


def test_codebooks_are_means_of_their_points_and_none_is_empty():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, 60, 4, generator=generator, dtype=torch.float64)
    points[:, 40:] = points[:, :1] + 1e-3 * points[:, 40:]  # a heap
    codebook = codebook_of(points, 9, rounds=300, seed=0)
    codes = nearest_codes(points, codebook)
    for head in range(3):
        assert sorted(set(codes[head].tolist())) == list(range(9))
        for code in range(9):
            mean = points[head, codes[head] == code].mean(0)
            torch.testing.assert_close(codebook[head, code], mean, rtol=0, atol=1e-12)
    direct = (points[:, :, None] - codebook[:, None]).square().sum(-1).argmin(-1)
    assert torch.equal(codes, direct)
    assert torch.equal(codebook[1:2], codebook_of(points[1:2], 9, rounds=300, seed=0))


def test_a_code_without_points_goes_to_the_farthest_point(monkeypatch):
    points = torch.tensor([[[0.0], [1.0], [2.0], [100.0], [50.0]]], dtype=torch.float64)
    first = torch.tensor([[[1.0], [1.0], [1.0]]], dtype=torch.float64)
    monkeypatch.setattr("longmix.caches.codebooks.first_centroids", lambda *_: first)
    found = codebook_of(points, 3, rounds=300, seed=0)
    assert sorted(found.flatten().tolist()) == [1.0, 50.0, 100.0]


def test_more_codes_than_different_keys_come_to_an_end():
    points = torch.ones(2, 10, 3)
    found = codebook_of(points, 4, rounds=300, seed=0)
    assert torch.equal(found, torch.ones(2, 4, 3)) and (nearest_codes(points, found) == 0).all()


def rotated(tensors):
    """Queries, keys and values [B, T, H, D] with the positions of tokens in them."""
    place = torch.arange(tensors[0].shape[1])
    return [*(torch.stack([turned(one, place, ROTARY) for one in x]) for x in tensors[:2]), tensors[2]]


def with_rotation(kind, tensors, lengths):
    """A cache that has read prompts of these lengths, whose keys are rotated, in two pieces."""
    prompts, ids = padded(tensors, lengths)
    cache = built(kind, *prompts, rotary=ROTARY)
    longest = max(lengths)
    place = torch.arange(longest)
    start = longest - torch.tensor(lengths)[:, None]
    positions = torch.where(place < start, place, place - start)
    for part in (slice(0, 25), slice(25, longest)):
        some = [x[:, part] for x in prompts]
        with torch.no_grad():
            cache.attend(*some, positions[:, part], None if len(set(lengths)) == 1 else ids[:, part])
    cache.prompt_ended()
    return cache


def direct_codebooks(kind, query, key, count):
    """The code vectors [Hkv, C, K] of a prompt, from its unrotated queries and keys, without a factor.

    Of the codebook only the draws of k-means++ are taken as they are: all else is written from the formulas.
    """
    found = []
    place = torch.full((len(query),), kind.distance_of(len(query)))
    for head in range(KEY_HEADS):
        asking = turned(query, place, ROTARY)[:, head * GROUP : (head + 1) * GROUP].reshape(-1, WIDTH)
        moment = asking.T @ asking
        metric = moment / (moment**2).mean().sqrt() + 1e-6 * torch.eye(WIDTH, dtype=torch.float64)
        factor = torch.linalg.cholesky(metric)
        found.append((metric, factor, key[:, head]))
    points = torch.stack([keys @ factor for _, factor, keys in found])
    books = codebook_of(points, count, rounds=kind.rounds, seed=kind.seed)
    return [(metric, book @ torch.linalg.inv(factor)) for (metric, factor, _), book in zip(found, books, strict=True)]


def direct(kind, plain, tensors, length, place):
    """The output of a row's token behind its prompt, and how many slots its key heads read."""
    query, key, value = tensors
    total, count, outputs, slots = place + 1, kind.size(length), [], 0
    books = direct_codebooks(kind, plain[0][:length], plain[1][:length], count) if count else []
    asking = turned(plain[0][place : place + 1], torch.tensor([kind.distance_of(length)]), ROTARY)[0]
    for head in range(KEY_HEADS):
        read = set(range(kind.sinks)) | set(range(total - kind.window, total)) if count else set(range(total))
        if count:
            metric, book = books[head]
            apart = plain[1][:total, head, None] - book
            code = torch.einsum("scd,de,sce->sc", apart, metric, apart).argmin(-1)
            others = range(kind.sinks, total - kind.window)
            for one in asking[head * GROUP : (head + 1) * GROUP]:
                scores = book @ one
                best = sorted(others, key=lambda token: (-float(scores[code[token]]), token))
                read |= set(best[: int(kind.share * total)])
        read = sorted(read)
        slots += len(read)
        asked = query[place].unflatten(0, (KEY_HEADS, GROUP))[head]
        outputs += [(WIDTH**-0.5 * key[read, head] @ one).softmax(0) @ value[read, head] for one in asked]
    return torch.stack(outputs), slots


@pytest.mark.parametrize("kind", [KIND, replace(KIND, distance=None)], ids=["distance", "half-of-the-prompt"])
@pytest.mark.parametrize("lengths", [(40, 40), (40, 29, 4)], ids=str)
def test_what_is_read_is_what_the_formulas_choose(lengths, kind):
    plain = rows(len(lengths), 60)
    tensors = rotated(plain)
    cache, fewer = with_rotation(kind, tensors, lengths), 0
    for number in range(10):  # beyond the window, so that tokens behind the prompt are chosen among too
        places = [length + number for length in lengths]
        found = step(cache, tensors, places)
        for row, length in enumerate(lengths):
            of_row = [[x[row] for x in both] for both in (plain, tensors)]
            wanted, slots = direct(kind, *of_row, length, places[row])
            torch.testing.assert_close(found[row, 0], wanted, rtol=0, atol=1e-12)
            assert int(cache.slots_read[row]) == slots
            fewer += slots < 0.8 * KEY_HEADS * (places[row] + 1)
    assert fewer >= 20 and cache.read_bytes() < cache.held_bytes()


@pytest.mark.parametrize("count", [4, 20])
def test_a_piece_reads_all_and_its_tokens_get_codes(count):
    tensors = rows(2, 70)
    cache, exact = begun(KIND, tensors, (40, 40)), begun(kind_of("exact"), tensors, (40, 40))
    found = step(cache, tensors, (40, 40), count)
    torch.testing.assert_close(found, step(exact, tensors, (40, 40), count), rtol=0, atol=1e-12)
    assert cache.read_bytes() == cache.held_bytes() and cache.codes.length == 40 + count
    other = begun(KIND, tensors, (40, 40))
    for number in range(count):
        step(other, tensors, (40 + number,) * 2)
    assert torch.equal(other.codes.whole()[0], cache.codes.whole()[0])
    assert other.read_bytes() < other.held_bytes()


def test_forks_share_keys_codes_and_codebooks_and_choose_for_themselves():
    tensors = rows(2, 60)
    cache = begun(KIND, tensors, (40, 40))
    forked = cache.fork(3)
    assert forked.codebooks["codebook"] is cache.codebooks["codebook"]
    assert forked.codes.shared[0][0].data_ptr() == cache.codes.store.key.data_ptr()
    both = [x.repeat_interleave(3, 0) for x in tensors]
    for more in range(3):
        found = step(forked, both, [40 + more, 41 + more, 42 + more] * 2)
        for number in range(3):
            alone = cache.fork(1)
            for place in range(more + 1):
                wanted = step(alone, tensors, [40 + number + place] * 2)
            torch.testing.assert_close(found[number::3], wanted, rtol=0, atol=1e-12)


def test_a_document_that_begins_behind_the_prompt_is_read_whole():
    tensors = rows(2, 80)
    cache = begun(KIND, tensors, (40, 40))
    ids = torch.tensor([[1], [0]], dtype=torch.int32)
    exact = begun(kind_of("exact"), tensors, (40, 40))
    for number in range(9):
        part = [x[:, 40 + number : 41 + number] for x in tensors]
        positions = torch.tensor([[number], [40 + number]])
        with torch.no_grad():
            found, wanted = (each.attend(*part, positions, ids)[0] for each in (cache, exact))
        torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-12)
        assert int(cache.slots_read[0]) == KEY_HEADS * (number + 1)
        assert int(cache.slots_read[1]) < KEY_HEADS * 40
    assert not torch.allclose(found[1], wanted[1])


def test_a_truncated_cache_goes_on_as_before():
    tensors = rows(2, 60)
    cache = begun(KIND, tensors, (40, 40))
    wanted = [step(cache, tensors, (40 + number,) * 2) for number in range(5)]
    cache.truncate(41)
    torch.testing.assert_close(step(cache, tensors, (41, 41)), wanted[1], rtol=0, atol=0)
    assert cache.codes.length == cache.length == 42


POSITIONS = {
    "none": {"position": "none"},
    "context": {"position": "context"},
    "partial": {"rotary_fraction": 0.5},
    "yarn": {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_length": 16},
}


@pytest.mark.parametrize("name", POSITIONS)
def test_all_kinds_of_positions_choose(name):
    model = model_of(**POSITIONS[name])
    kind = A2ATS(sinks=2, window=4, share=0.1, codes=12, distance=8)
    session, exact = (session_of(model, each, *tokens_of(40, 31)) for each in (kind, kind_of("exact")))
    more = torch.stack(tokens_of(6, 6))
    assert torch.equal(session.logits, exact.logits)
    found, wanted = steps(session, more), steps(exact, more)
    assert found.isfinite().all() and (found - wanted).abs().max() > 1e-4
    assert all(cache.read_bytes() < cache.held_bytes() for cache in caches(session.state))
    everything = session_of(model, A2ATS(share=1.0, window=1, sinks=0, codes=12), *tokens_of(40, 31))
    torch.testing.assert_close(steps(everything, more), wanted, rtol=0, atol=1e-10)


def test_keys_that_are_codes_of_their_own_are_chosen_by_their_scores():
    plain = rows(1, 60)
    kind = A2ATS(sinks=0, window=1, share=0.2, codes=0.999, distance=5)
    cache = with_rotation(kind, rotated(plain), (40,))
    tensors = rotated(plain)
    with torch.no_grad():
        cache.chosen, choose = (lambda new: masks.append(choose(new)) or masks[-1]), cache.chosen
        masks = []
        step(cache, tensors, [40])
    asking = turned(plain[0][0, 40:41], torch.tensor([5]), ROTARY)[0]
    same = 0
    for head in range(KEY_HEADS):
        wanted = {40}
        for one in asking[head * GROUP : (head + 1) * GROUP]:
            wanted |= set((plain[1][0, :40, head] @ one).topk(int(0.2 * 41)).indices.tolist())
        same += len(wanted & set(masks[0][0, head].nonzero().flatten().tolist())) / len(wanted)
    assert same / KEY_HEADS > 0.9  # 39 codes of 40 keys


def test_bytes_are_counted():
    one = torch.zeros(1, 1, 8, 128, dtype=torch.bfloat16)
    query = torch.zeros(1, 1, 16, 128, dtype=torch.bfloat16)
    shape, kind = built(A2ATS(), query, one, one).shape, kind_of("a2ats")
    length = 16_000
    codebook, factor = 8 * 1000 * 128 * 2, 8 * 128 * 128 * 4
    assert kind.bytes(shape, length) == length * 8 * (2 * 128 * 2 + 2) + codebook + factor
    read = 8 + 64 + 2 * 480
    assert kind.step_bytes(shape, length) == read * 8 * 2 * 128 * 2 + codebook + factor + 16_001 * 8 * 2
    assert kind.bytes(shape, 20) == 20 * shape.token_bytes and kind.step_bytes(shape, 20) == 21 * shape.token_bytes
    cache = begun(KIND, rows(2, 60), (40, 40))
    assert cache.held_bytes() == 2 * KIND.bytes(cache.shape, 40)
    step(cache, rows(2, 60), (40, 40))
    assert cache.read_bytes() <= 2 * KIND.step_bytes(cache.shape, 40)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sinks": -1}, r"cache\.sinks=-1 must be at least 0"),
        ({"window": 0}, r"cache\.window=0 must be at least 1"),
        ({"distance": -5}, r"cache\.distance=-5 must be at least 0, or null"),
        ({"rounds": -1}, r"cache\.rounds=-1 must be at least 0"),
        ({"share": 1.5}, r"cache\.share=1\.5 must be from 0 to 1"),
        ({"codes": 1}, r"cache\.codes=1 must be a whole number of codes, at least 2, or a share"),
        ({"codes": 2.5}, r"cache\.codes=2\.5 must be a whole number"),
    ],
)
def test_settings_out_of_range_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        kind_of("a2ats", settings)


@pytest.mark.parametrize("damage", ["codes", "codebook", "sizes", "nothing-for-codes"])
def test_damaged_files_are_refused(damage):
    cache = begun(KIND, rows(2, 60), (40, 40))
    saved = cache.trimmed()
    if damage == "codes":
        saved["codes_key_0"] = torch.full_like(saved["codes_key_0"], 99)
    elif damage == "codebook":
        saved["codebooks_codebook"] = saved["codebooks_codebook"][..., :5]
    elif damage == "sizes":
        saved["codebooks_sizes"] = saved["codebooks_sizes"] + 50
    else:
        saved = {name: x for name, x in saved.items() if not name.startswith("codebooks_")}
    other = built(KIND, *rows(2, 1))
    with pytest.raises(ValueError, match=r"cache\.0"):
        other.restore(saved, "cache.0")
    other = built(KIND, *rows(2, 1))
    other.restore(cache.trimmed(), "cache.0")
    wanted, found = (step(each, rows(2, 60), (40, 40)) for each in (cache, other))
    assert torch.equal(found, wanted)
