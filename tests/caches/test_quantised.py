"""The cache in codes of one width, against attention to the numbers that the codes stand for."""

import pytest
import torch

from longmix.caches.kinds import kind_of
from longmix.caches.quantised import Quantised
from longmix.errors import ConfigError
from tests.caches.direct import built
from tests.caches.prompts import begun, rows, step

KEY_HEADS, GROUP, WIDTH = 2, 2, 8  # those of `rows`
KIND = Quantised(bits=2, group=4, residual=8, parameters="float32")


def coded(x, axis):
    """What 2 bits of numbers x [n, H, 4] or [4, H, n] stand for, from the formula, with a step over an axis."""
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    step = ((high - low) / 3).float().double()
    low = low.float().double()
    return ((x - low) / step).round().clamp(0, 3) * step + low


def held(key, value, prompt):
    """Keys and values [S, H, D] as they are read after a prompt of so many of them."""
    key, value = key.clone(), value.clone()
    whole = prompt - prompt % 4 + (len(key) - prompt) // 8 * 8
    for start in range(0, whole, 4):
        key[start : start + 4] = coded(key[start : start + 4], 0)
    for part in (slice(0, 4), slice(4, 8)):
        value[:whole, :, part] = coded(value[:whole, :, part], 2)
    return key, value


def softmax_attention(query, key, value):
    """Of one query [Hq, D] to keys and values [S, Hkv, D]."""
    key, value = (x.repeat_interleave(GROUP, 1) for x in (key, value))
    weights = (torch.einsum("hd,shd->hs", query, key) * WIDTH**-0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, value)


def expected(query, key, value, prompt, place):
    """The output of the token at a place behind the prompt: codes of what came before, and itself."""
    before = held(key[:place], value[:place], prompt)
    own = key[place : place + 1], value[place : place + 1]
    return softmax_attention(query[place], *(torch.cat(pair) for pair in zip(before, own, strict=True)))


@pytest.mark.parametrize("lengths", [(13, 13), (3, 3), (16, 16), (13, 6, 2)], ids=str)
def test_what_is_read_are_the_codes_of_each_row(lengths):
    tensors = rows(len(lengths), 50)
    cache = begun(KIND, tensors, lengths)
    for number in range(30):
        places = [length + number for length in lengths]
        found = step(cache, tensors, places)
        for row, place in enumerate(places):
            one = [x[row] for x in tensors]
            torch.testing.assert_close(found[row, 0], expected(*one, lengths[row], place), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [5, 20])
def test_a_piece_after_the_prompt_reads_codes_and_itself(count):
    tensors, lengths = rows(2, 50), (13, 6)
    cache = begun(KIND, tensors, lengths)
    found = step(cache, tensors, lengths, count)
    for row, length in enumerate(lengths):
        query, key, value = (x[row] for x in tensors)
        old = held(key[:length], value[:length], length)
        for place in range(count):
            seen = [torch.cat((x, y[length : length + place + 1])) for x, y in zip(old, (key, value), strict=True)]
            wanted = softmax_attention(query[length + place], *seen)
            torch.testing.assert_close(found[row, place], wanted, rtol=0, atol=1e-12)
    found = step(cache, tensors, [length + count for length in lengths])
    for row, length in enumerate(lengths):
        wanted = expected(*(x[row] for x in tensors), length, length + count)
        torch.testing.assert_close(found[row, 0], wanted, rtol=0, atol=1e-12)


@pytest.mark.slow
@torch.no_grad()
def test_a_document_after_the_prompt_reads_nothing_before_it():
    tensors, other = rows(2, 60), rows(2, 60, 1)
    for at in (3, 8, 10):
        found = []
        for old in (tensors, other):
            given = [torch.cat((a[:, :13], b[:, :47]), 1) for a, b in zip(old, tensors, strict=True)]
            cache = begun(KIND, given, (13, 13))
            for number in range(at):
                step(cache, given, [13 + number] * 2)
            ids = torch.ones(2, 1, dtype=torch.int32)
            part = [x[:, 30:31] for x in tensors]
            cache.attend(*part, torch.zeros(1, 1, dtype=torch.int64), ids)
            found.append(torch.stack([step(cache, tensors, [31 + number] * 2) for number in range(25)]))
        assert torch.equal(*found)


@pytest.mark.slow
@torch.no_grad()
def test_forks_go_on_independently_and_share_the_codes_of_the_prompt():
    tensors = rows(2, 60)
    cache = begun(KIND, tensors, (13, 13))
    prompt = cache.held_bytes()
    forked = cache.fork(3)
    assert forked.prompt[0].parts["key"].data_ptr() == cache.prompt[0].parts["key"].data_ptr()
    both = [x.repeat_interleave(3, 0) for x in tensors]
    for number in range(20):
        step(forked, both, [40] * 6)
        found = step(cache, tensors, [13 + number] * 2)
        again = begun(KIND, tensors, (13, 13))
        for earlier in range(number):
            step(again, tensors, [13 + earlier] * 2)
        assert torch.equal(found, step(again, tensors, [13 + number] * 2))
    assert forked.fork(1).held_bytes() - prompt < 3 * (cache.held_bytes() - prompt) + 3 * 2 * 4 * 2 * 16 * 8


@torch.no_grad()
def test_codes_stay_what_they_are():
    tensors = rows(2, 90)
    cache = begun(KIND, tensors, (13, 13))
    seen = []
    for number in range(60):
        step(cache, tensors, [13 + number] * 2)
        stores = [*cache.prompt, *cache.blocks]
        parts = [x.clone() for store in stores for x in store.used.values()]
        for old, new in zip(seen, parts, strict=False):
            assert torch.equal(old, new[:, :, : old.shape[2]])
        seen = parts
    assert cache.coded == 7 and cache.recent == 4


@torch.no_grad()
def test_tokens_since_the_last_block_are_taken_back():
    tensors = rows(2, 60)
    for lengths in ((13, 13), (13, 6)):
        cache, other = (begun(KIND, tensors, lengths) for _ in range(2))
        for number in range(13):
            for each in (cache, other) if number < 10 else (cache,):
                step(each, tensors, [length + number for length in lengths])
        cache.truncate(other.length)
        assert torch.equal(*(step(each, tensors, [20, 20]) for each in (cache, other)))
        with pytest.raises(ValueError, match="has codes of all but the last"):
            cache.truncate(13)


def test_bytes_held_are_counted_after_any_number_of_tokens():
    for prompt in (2, 13, 16):
        cache, tensors = begun(KIND, rows(2, 90), (prompt, prompt)), rows(2, 90)
        assert cache.held_bytes() == 2 * KIND.bytes(cache.shape, prompt)
        for number in range(40):
            step(cache, tensors, [prompt + number] * 2)
            codes, exact = cache.coded * 8 + prompt - prompt % 4, prompt % 4 + cache.recent
            each = KEY_HEADS * (
                2 * WIDTH * 2 // 8 + WIDTH * 2 * 4 // 4 + 2 * 2 * 4
            )  # codes, parameters of keys, of values
            assert cache.held_bytes() == 2 * (codes * each + exact * KEY_HEADS * 2 * WIDTH * 8)


def test_default_bits_of_an_element():
    tensors = [torch.zeros(1, 1, 2, 64), *[torch.zeros(1, 1, 1, 64)] * 2]
    for bits, share in ((8, 9 / 32), (4, 5 / 32), (2, 3 / 32)):  # of float32
        kind = kind_of("quantised", {"bits": bits})
        shape = built(kind, *tensors).shape
        assert kind.bytes(shape, 512) == share * shape.token_bytes * 512


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 3}, r"cache\.bits=3 must be 8, 4 or 2"),
        ({"group": 0}, r"cache\.group=0 must be at least 1"),
        ({"residual": 100}, r"cache\.residual=100 must be a multiple of cache\.group=32"),
        ({"parameters": "int8"}, r"cache\.parameters=int8 must be one of float16, float32"),
    ],
)
def test_settings_out_of_range_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        kind_of("quantised", settings)


def test_heads_that_fill_no_bytes_are_named():
    with pytest.raises(ConfigError, match="2 bits of 6 channels fill no whole bytes"):
        built(KIND, torch.zeros(1, 1, 2, 6), torch.zeros(1, 1, 2, 6), torch.zeros(1, 1, 2, 6))


def test_room_that_was_reserved_is_taken_once():
    """The buffers of the blocks grow once, for all that was said to come, and hold what they would have held."""
    tensors, found = rows(1, 93), []
    for room in (0, 80):
        cache = begun(KIND, tensors, (13,))
        if room:
            cache.reserve(room)
        places = set()
        for place in range(13, 93):
            step(cache, tensors, [place])
            places |= {part["key"].data_ptr() for part in [cache.blocks[0].parts] if part}
        found.append((len(places), cache.held_bytes(), cache.blocks[0].capacity))
    (often, held, _), (once, held_too, capacity) = found
    assert often > once == 1
    assert held == held_too
    assert capacity == 10
