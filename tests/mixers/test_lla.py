"""Local linear attention as a mixer: what it equals, what it follows, and what it refuses."""

import pytest
import torch
from mixer_table import SHAPE

from benchmarks import lla as benchmark
from longmix.config import build
from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.lla import LLA, MOST_TOKENS
from longmix.mixers.parts.base import Mixer


def of(**settings) -> Mixer:
    return build({"_target_": "longmix.mixers.lla.LLA", **settings}, "mixer", shape=SHAPE, layer_index=0)


def test_it_nears_flash_with_the_same_weights_as_the_ridge_grows():
    flash, x = Flash(SHAPE, 0).double(), torch.randn(2, 30, SHAPE.d_model, dtype=torch.float64)
    differences = []
    for ridge in (1e5, 1e6):
        mixer = LLA(SHAPE, 0, ridge=ridge).double()
        mixer.load_state_dict(flash.state_dict())
        differences.append((mixer(x).y - flash(x).y).abs().max().item())
    assert differences[1] < 1e-3
    assert differences[0] / differences[1] == pytest.approx(10, rel=0.01)  # the error is linear in 1 / ridge


def test_work_grows_with_the_square_of_the_head():
    mixer, flash = LLA(SHAPE, 0), Flash(SHAPE, 0)
    more = 3 * ((2 * 16**2 + 4 * 16) * mixer.visible_pairs(20) + 20 * 2 * 16**3 // 3)
    assert mixer.flops(20) == flash.flops(20) + more


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ridge": 0.0}, "mixer.ridge=0.0 must be above 0"),
        ({"ridge": float("inf")}, "mixer.ridge=inf"),
        ({"bias": "alibi"}, "mixer.bias=alibi"),
        ({"sink_logits": True}, "mixer.sink_logits"),
    ],
)
def test_settings_that_it_cannot_have(settings, said):
    with pytest.raises(ConfigError, match=said):
        of(**settings)


def test_rows_that_are_too_long_are_refused_with_the_way_out():
    mixer = of()
    said = r"longmix.mixers.lla.LLA\) takes rows of at most 1,024 tokens, not of 1,025.*mixer=parallax"
    with pytest.raises(ConfigError, match=said):
        mixer.prepare(MOST_TOKENS + 1)
    with torch.no_grad(), pytest.raises(ConfigError, match=said):
        state = mixer(torch.randn(1, 1000, SHAPE.d_model), state=mixer.init_state(1)).state
        mixer(torch.randn(1, 25, SHAPE.d_model), state=state)


def test_it_follows_a_piecewise_linear_function_best(tmp_path, capsys):
    """The claim of arXiv 2510.01450, at the best factor and ridge of each."""
    options = ["--dims", "4", "--keys", "64", "128", "--seeds", "3", "--out", str(tmp_path)]
    assert benchmark.main(options) == 0
    records = list(benchmark.measure(benchmark.parse(options)))
    for keys in (64, 128):
        softmax, local, line = (r["error"] for r in records if r["keys"] == keys)
        assert local < 0.75 * softmax < softmax < 0.75 * line
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert "| channels | keys | softmax attention | local linear attention | one line |" in capsys.readouterr().out
