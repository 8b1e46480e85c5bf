"""The cache in codes of two widths, against the authors' code and against attention to what its codes stand for."""

import pytest
import torch

from longmix.caches.coded_store import CodedStore
from longmix.caches.kinds import kind_of
from longmix.caches.saliency import divided, probe_places, saliency
from longmix.caches.zipcache import ZipCache, encode_lists
from longmix.errors import ConfigError
from longmix_kernels.attention.segments import unpacked
from tests.caches.direct import built, case
from tests.caches.prompts import begun, rows, step


def their_codes(packed, bits, heads):
    """Codes [B, H, n, D] of the authors' bytes, whose low bits hold the first part of the channels of all heads."""
    packed = packed.reshape(1, packed.shape[-2], -1)
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(parts, -1).unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("number", [0, 1])
def test_codes_are_those_of_the_authors(number):
    given = case("inference_side/zipcache", number)
    heads = given["key"].shape[1]
    stores, lists = [CodedStore(2), CodedStore(4)], (given["low"], given["high"])
    encode_lists(stores, given["key"], given["value"], lists, torch.float64)
    for store, index in zip(stores, lists, strict=True):
        parts, segment = store.used, store.segment(None)
        for name in ("key", "value"):
            wanted = their_codes(given[f"{name}_codes{store.bits}"], store.bits, heads)
            assert torch.equal(unpacked(parts[name], store.bits).long(), wanted)
        for found, wanted in zip(segment.numbers(torch.float64), ("key_read", "value_read"), strict=True):
            at = index[..., None].expand(-1, -1, -1, found.shape[3])
            torch.testing.assert_close(found, given[wanted].gather(2, at), rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", [0, 1])
def test_saliency_is_that_of_the_paper(number):
    given = case("inference_side/zipcache", number)
    found = saliency(given["query"], given["key"], given["probe"][None])
    torch.testing.assert_close(found, given["saliency_paper"], rtol=0, atol=1e-9)
    low, high = divided(given["saliency_code"], given["low"].shape[2], None)
    assert torch.equal(low, given["low"]) and torch.equal(high, given["high"])


def test_probes_are_of_the_seed_and_the_length():
    for length in (1, 5, 60, 400):
        places = probe_places(length, 0.05, 0.05, 3)
        assert torch.equal(places, probe_places(length, 0.05, 0.05, 3))
        assert len(places.unique()) == len(places) == min(length, 2 * max(1, length // 20))
        assert length - 1 in places
    assert not torch.equal(probe_places(400, 0.05, 0.05, 3), probe_places(400, 0.05, 0.05, 4))
    assert probe_places(100, 0.1, 0.0, 0).tolist() == list(range(90, 100))


KIND = ZipCache(high_share=0.6, newest_probes=0.1, random_probes=0.2, refresh=10, parameters="float32")
GROUP, WIDTH = 2, 8


class Direct:
    """One row, token by token: the numbers that are read, a list a token, from the formulas."""

    def __init__(self, tensors, prompt):
        query, key, value = (x[:prompt] for x in tensors)
        scores = torch.einsum("ihgd,jhd->hgij", query.unflatten(1, (-1, GROUP)), key) * WIDTH**-0.5
        hidden = torch.ones(prompt, prompt, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        probes = probe_places(prompt, KIND.newest_probes, KIND.random_probes, KIND.seed)
        visits = (probes[:, None] >= torch.arange(prompt)).sum(0)
        self.key, self.value, self.weights = [], [], []
        self.code(key, value, weights[:, :, probes].sum((1, 2)) / visits / GROUP)

    def code(self, key, value, mean):
        """Append what the codes of tokens [n, H, D] stand for, by their saliency [H, n]."""
        few = int(0.4 * len(key) + 1e-9)
        scale = value.abs().amax(0).sqrt().float().double()
        key, value = key.clone(), value / scale
        lists = [mean.argsort(1)[:, :few].sort().values, mean.argsort(1)[:, few:].sort().values]
        for bits, index in zip((2, 4), lists, strict=True):
            for head, at in enumerate(index):
                if len(at) == 0:
                    continue
                x = key[at, head]
                key[at, head] = self.rounded(x, x.amin(0), x.amax(0), bits)
            for slot in range(index.shape[1]):
                at = index[:, slot], torch.arange(len(index))
                x = value[at]
                value[at] = self.rounded(x, x.min(), x.max(), bits)
        self.key += key.unbind(0)
        self.value += (value * scale).unbind(0)
        self.exact = []

    @staticmethod
    def rounded(x, low, high, bits):
        step = ((high - low) / (2**bits - 1)).float().double()
        low = low.float().double()
        return torch.where(step > 0, ((x - low) / step).round().clamp(0, 2**bits - 1), 0.0) * step + low

    def step(self, query, key, value):
        """The output of a token [H, D]."""
        self.exact.append((key, value))
        keys, values = (torch.stack(x) for x in ([*self.key], [*self.value]))
        own = [torch.stack(x) for x in zip(*self.exact, strict=True)]
        keys, values = torch.cat((keys, own[0])), torch.cat((values, own[1]))
        scores = torch.einsum("hgd,jhd->hgj", query.unflatten(0, (-1, GROUP)), keys) * WIDTH**-0.5
        weights = scores.softmax(-1)
        output = torch.einsum("hgj,jhd->hgd", weights, values).flatten(0, 1)
        self.weights.append(weights[..., len(self.key) :].sum(1))
        if len(self.exact) == KIND.refresh:
            mass = sum(torch.nn.functional.pad(x, (0, KIND.refresh - x.shape[1])) for x in self.weights)
            self.code(*own, mass / torch.arange(KIND.refresh, 0, -1) / GROUP)
            self.weights = []
        return output


@pytest.mark.parametrize("lengths", [(23, 23), (23, 6, 1)], ids=str)
def test_what_is_read_are_the_codes_of_each_row(lengths):
    tensors = rows(len(lengths), 60)
    cache = begun(KIND, tensors, lengths)
    direct = [Direct([x[row] for x in tensors], length) for row, length in enumerate(lengths)]
    for number in range(25):
        places = [length + number for length in lengths]
        found = step(cache, tensors, places)
        for row, place in enumerate(places):
            wanted = direct[row].step(*(x[row, place] for x in tensors))
            torch.testing.assert_close(found[row, 0], wanted, rtol=0, atol=1e-12)
    assert cache.coded == 2


def test_a_piece_and_its_tokens_one_by_one_end_with_the_same_codes_of_the_prompt_and_mass():
    tensors = rows(2, 60)
    for lengths in ((23, 23), (23, 6)):
        cache, other = (begun(KIND, tensors, lengths) for _ in range(2))
        step(cache, tensors, lengths, 7)
        for number in range(7):
            step(other, tensors, [length + number for length in lengths])
        torch.testing.assert_close(cache.mass, other.mass, rtol=0, atol=1e-12)
        found = [step(each, tensors, [length + 7 for length in lengths]) for each in (cache, other)]
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.slow
@torch.no_grad()
def test_a_document_after_the_prompt_reads_nothing_before_it():
    tensors, other = rows(2, 60), rows(2, 60, 1)
    for at in (3, 9, 10):
        found = []
        for old in (tensors, other):
            given = [torch.cat((a[:, :13], b[:, :47]), 1) for a, b in zip(old, tensors, strict=True)]
            cache = begun(KIND, given, (13, 13))
            for number in range(at):
                step(cache, given, [13 + number] * 2)
            cache.attend(*(x[:, 30:31] for x in tensors), torch.zeros(1, 1, dtype=torch.int64), torch.ones(2, 1).int())
            found.append(torch.stack([step(cache, tensors, [31 + number] * 2) for number in range(25)]))
        assert torch.equal(*found)


@torch.no_grad()
def test_codes_stay_what_they_are():
    tensors = rows(2, 90)
    cache, seen = begun(KIND, tensors, (13, 13)), []
    for number in range(60):
        step(cache, tensors, [13 + number] * 2)
        parts = [x.clone() for store in (*cache.prompt, *cache.blocks) for x in store.used.values()]
        for old, new in zip(seen, parts, strict=False):
            assert torch.equal(old, new[:, :, : old.shape[2]])
        seen = parts
    assert cache.coded == 6 and cache.recent == 0


@pytest.mark.slow
@torch.no_grad()
def test_forks_go_on_independently_and_share_the_codes_of_the_prompt():
    tensors = rows(2, 60)
    cache = begun(KIND, tensors, (13, 13))
    forked = cache.fork(3)
    assert forked.prompt[0].parts["key"].data_ptr() == cache.prompt[0].parts["key"].data_ptr()
    both = [x.repeat_interleave(3, 0) for x in tensors]
    again = begun(KIND, tensors, (13, 13))
    for number in range(25):
        step(forked, both, [40] * 6)
        assert torch.equal(*(step(each, tensors, [13 + number] * 2) for each in (cache, again)))


def test_bytes_held_are_counted_after_any_number_of_tokens():
    cache, tensors = begun(KIND, rows(2, 90), (13, 13)), rows(2, 90)
    heads, both = 2, 2 * WIDTH

    def codes(low, high):
        channels = 2 * heads * 3 * WIDTH * 4  # of two widths: low and step of keys, scale of values
        return heads * both * (low * 2 + high * 4) // 8 + channels + (low + high) * 2 * 4

    assert codes(5, 8) == KIND.bytes(cache.shape, 13) and cache.held_bytes() == 2 * codes(5, 8)
    for number in range(40):
        step(cache, tensors, [13 + number] * 2)
        recent = cache.recent * heads * (both * 8 + 8)  # with the weights they got
        assert cache.held_bytes() == 2 * (codes(5, 8) + cache.coded * codes(4, 6) + recent)


def test_default_bits_of_an_element():
    heads, width, length = 8, 128, 4096
    one = torch.zeros(1, 1, heads, width, dtype=torch.bfloat16)
    shape, kind = built(kind_of("zipcache"), one, one, one).shape, kind_of("zipcache")
    bits = 8 * kind.bytes(shape, length) / (2 * heads * width * length)
    exact = 3.2 + 16 / (heads * width)  # the values' low and step, 32 bits a token, over both
    of_channels = 2 * 3 * 16 / (2 * length)  # two widths: low and step of keys, scale of values
    assert abs(bits - exact - of_channels) < 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"high_share": 1.5}, r"cache\.high_share=1\.5 must be from 0 to 1"),
        ({"random_probes": -1.0}, r"cache\.random_probes=-1\.0 must be from 0 to 1"),
        ({"newest_probes": 0.0}, r"cache\.newest_probes=0\.0 must be above 0"),
        ({"refresh": 0}, r"cache\.refresh=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        kind_of("zipcache", settings)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_single_width_will_do(share):
    tensors = rows(2, 60)
    kind = ZipCache(high_share=share, refresh=10)
    cache = begun(kind, tensors, (13, 6))
    for number in range(25):
        assert step(cache, tensors, [13 + number, 6 + number]).isfinite().all()
    widths = [store.bits for store in (*cache.prompt, *cache.blocks) if store.blocks]
    assert set(widths) == ({4} if share else {2})
    copy = built(kind, *tensors)
    copy.shape = cache.shape
    copy.restore(cache.trimmed(), "cache")
    assert torch.equal(*(step(each, tensors, [50, 50]) for each in (cache, copy)))
