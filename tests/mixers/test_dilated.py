"""Dilated and strided windows against NATTEN's masks, and attention with them; and merging as NATTEN does."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from longmix.errors import ConfigError
from longmix.mixers.parts.attention_state import Rows
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.dilated import dilated_bounds, positions, seen_pairs
from longmix.mixers.sliding_window import SlidingWindow
from longmix_kernels.attention import merge

ORACLES = Path(__file__).parents[1] / "fixtures/model_side"
MASKS = np.load(ORACLES / "natten_masks.npz")
SHAPES = [tuple(map(int, re.findall(r"\d+", name))) for name in MASKS if name.startswith("mask")]


def mask_of(length: int, window: int, stride: int, dilation: int) -> torch.Tensor:
    """Which keys each row sees, bool [T, T], from the bounds."""
    position = positions(None, length, torch.device("cpu"))
    found = dilated_bounds(position, position, length, window, stride, (dilation,), 1)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for lo, hi, row in zip(*(found[name][0, 0].tolist() for name in ("lo", "hi", "query_rows")), strict=True):
        mask[row, found["key_rows"][0, 0, lo:hi].long()] = True
    return mask


@pytest.mark.parametrize(("length", "window", "stride", "dilation"), SHAPES)
def test_masks_are_those_of_natten(length, window, stride, dilation):
    """But where the group of a token is not complete: there NATTEN's mask depends on the length of the row."""
    packed = MASKS[f"mask_T{length}_k{window}_s{stride}_d{dilation}"]
    wanted = torch.tensor(np.unpackbits(packed, axis=1)[:, :length]).bool()
    found = mask_of(length, window, stride, dilation)
    row = torch.arange(length)
    leader = (row // dilation // stride * stride + stride - 1) * dilation + row % dilation
    complete = leader < length
    assert torch.equal(found[complete], wanted[complete]) and complete.sum() > length // 2
    assert not (found & ~wanted).any() and found.diagonal().all()
    assert found.sum() == seen_pairs(length, window, stride, dilation)


@pytest.mark.parametrize("name", ["dilated", "strided"])
def test_attention_and_its_gradients_are_the_oracles(name):
    given = {key: torch.tensor(x) for key, x in np.load(ORACLES / f"natten_{name}.npz").items()}
    tensors = [given[part].requires_grad_() for part in ("q", "k", "v")]
    heads, kv_heads, dim = tensors[0].shape[2], tensors[1].shape[2], tensors[0].shape[3]
    settings = {word: int(given[word]) for word in ("window", "stride", "dilation")}
    mixer = SlidingWindow(ModelShape(heads * dim, 1, heads), 0, num_kv_heads=kv_heads, **settings)
    mixed, _ = mixer.attend(Rows(*tensors))
    found = (mixed, *torch.autograd.grad(mixed, tensors, given["grad_o"]))
    for each, part in zip(found, ("o", "grad_q", "grad_k", "grad_v"), strict=True):
        torch.testing.assert_close(each, given[part], rtol=0, atol=1e-12 * float(given[part].abs().max()))


def test_parts_are_merged_as_natten_does():
    given = {key: torch.tensor(x) for key, x in np.load(ORACLES / "merge.npz").items()}
    output, logsumexp = merge(list(zip(given["o"], given["logsumexp"], strict=True)))
    torch.testing.assert_close(output, given["merged_o"], rtol=0, atol=1e-12)
    torch.testing.assert_close(logsumexp, given["merged_logsumexp"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dilation": 0}, "mixer.dilation=0 must be a whole number from 1"),
        ({"dilation": []}, "mixer.dilation=[] must be a whole number from 1"),
        ({"dilation": [1, 2, 4]}, "mixer.dilation=[1, 2, 4] is of 3 heads, and there are 2"),
        ({"stride": 5}, "mixer.stride=5 must be from 1 to mixer.window=4"),
        ({"dilation": 2, "attention_dropout": 0.1}, "mixer.attention_dropout=0.1 has a window without gaps"),
    ],
)
def test_impossible_gaps_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        SlidingWindow(ModelShape(8, 1, 2), 0, window=4, **settings)
