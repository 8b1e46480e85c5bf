"""Rotary positions: the rotation, its scalings against transformers, what is refused, and the mixers that take them."""

import math

import pytest
import torch
from mixer_table import FILES, SHAPE, settings_of
from small_mixers import small_mixer

from longmix.config import build
from longmix.errors import ConfigError
from longmix.mixers.flash import Flash
from longmix.mixers.parts.layout import layouts
from longmix.mixers.parts.rotary import Rotary, rotary_angles, rotate
from longmix.mixers.retention import Retention

YARN = {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_length": 4096}
LLAMA3 = {"rotary_scaling": "llama3", "rotary_factor": 8.0, "rotary_original_length": 8192}
LINEAR = {"rotary_scaling": "linear", "rotary_factor": 2.0}


def rotary(head_dim: int = 64, base: float = 10_000.0, **settings) -> Rotary:
    found = Rotary.of(head_dim, "model.num_heads=3", rotary_base=base, **settings)
    assert found is not None
    return found


def test_rotation_is_multiplication_by_a_complex_number():
    x = torch.randn(2, 7, 3, 10, dtype=torch.float64)
    positions = torch.arange(7)[None]
    rotated = rotate(x, *rotary_angles(positions, rotary(10, 100.0)))
    frequency = 100.0 ** -(torch.arange(5, dtype=torch.float64) / 5)
    turn = torch.polar(torch.ones(7, 5, dtype=torch.float64), positions[0, :, None] * frequency)
    expected = torch.complex(x[..., :5], x[..., 5:]) * turn[:, None, :]
    torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, YARN, LLAMA3, LINEAR], ids=["plain", "yarn", "llama3", "linear"])
def test_scores_depend_on_distance_alone(settings):
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)

    def score(i: int, j: int) -> torch.Tensor:
        own = rotary(16, 1e4, **settings)
        at = [rotate(x, *rotary_angles(torch.tensor([[p]]), own)) for x, p in ((query, i), (key, j))]
        return (at[0] * at[1]).sum()

    torch.testing.assert_close(score(5, 2), score(1005, 1002), rtol=1e-3, atol=1e-3)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3


def test_a_fraction_rotates_the_first_channels_and_no_others():
    x = torch.randn(2, 7, 3, 32)
    angles = rotary_angles(torch.arange(7)[None] + 3, rotary(32, 500.0, rotary_fraction=0.25))
    rotated = rotate(x, *angles)
    assert torch.equal(rotated[..., 8:], x[..., 8:])
    torch.testing.assert_close(
        rotated[..., :8], rotate(x[..., :8], *rotary_angles(torch.arange(7)[None] + 3, rotary(8, 500.0)))
    )


SCALED = {
    "linear": ({"rope_type": "linear", "factor": 2.5}, {"rotary_scaling": "linear", "rotary_factor": 2.5}),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, YARN),
    "yarn-short": (
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64},
        {"rotary_scaling": "yarn", "rotary_factor": 32.0, "rotary_original_length": 64},
    ),
    "yarn-everything": (
        {
            **{"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048, "truncate": False},
            **{"beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.5},
        },
        {
            **{"rotary_scaling": "yarn", "rotary_factor": 16.0, "rotary_original_length": 2048},
            "rotary_options": {"truncate": False, "beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.5},
        },
    ),
    "llama3": (
        {
            **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
        LLAMA3,
    ),
    "llama3-other": (
        {
            **{"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 512},
            **{"low_freq_factor": 2.0, "high_freq_factor": 7.0},
        },
        {
            **{"rotary_scaling": "llama3", "rotary_factor": 32.0, "rotary_original_length": 512},
            "rotary_options": {"low_freq_factor": 2.0, "high_freq_factor": 7.0},
        },
    ),
}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("theirs", "ours"), SCALED.values(), ids=SCALED)
def test_scalings_are_those_of_transformers(theirs, ours, base, fraction):
    """Theirs are formed in float32."""
    modeling = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is an optional extra")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=384, num_attention_heads=4, max_position_embeddings=131_072)
    config.rope_parameters = {"rope_theta": base, "partial_rotary_factor": fraction, **theirs}
    expected, factor = modeling.ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
    own = rotary(96, base, rotary_fraction=fraction, **ours)
    torch.testing.assert_close(own.frequencies(torch.device("cpu")), expected, rtol=5e-6, atol=0)
    assert own.attention_factor == pytest.approx(factor, rel=1e-12)
    cosine, sine = rotary_angles(torch.tensor([[0]]), own)
    assert cosine.eq(torch.tensor(factor)).all() and sine.eq(0).all()


@pytest.mark.parametrize("settings", [{}, YARN, LLAMA3, LINEAR], ids=["plain", "yarn", "llama3", "linear"])
def test_angles_of_late_positions_are_exact_under_autocast_too(settings):
    own, positions = rotary(64, 500_000.0, **settings), torch.tensor([[0, 1, 4095, 30_001, 65_535]])
    with torch.autocast("cpu", torch.bfloat16):
        cosine, sine = rotary_angles(positions, own)
    assert cosine.dtype == sine.dtype == torch.float32
    frequencies = 500_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    if own.scaling is not None:
        frequencies = own.scaling.scaled(frequencies, own.base)
    exact = (positions[..., None] * frequencies).cos()[:, :, None] * own.attention_factor
    torch.testing.assert_close(cosine[..., :32].double(), exact, rtol=0, atol=5e-3)
    torch.testing.assert_close(cosine[:, :2, :, :32].double(), exact[:, :2], rtol=0, atol=1e-6)


def test_without_a_base_only_contents_and_order_count():
    """Two tokens before the last may change places: the last one's output stays."""
    mixer = Flash(SHAPE, 0, rotary_base=None).double()
    assert mixer.rotary is None
    x = torch.randn(1, 5, SHAPE.d_model, dtype=torch.float64)
    swapped = x[:, [1, 0, 2, 3, 4]]
    torch.testing.assert_close(mixer(swapped).y[:, 2:], mixer(x).y[:, 2:], rtol=0, atol=1e-12)
    with_positions = Flash(SHAPE, 0).double()
    assert (with_positions(swapped).y - with_positions(x).y)[:, 2:].abs().max() > 1e-3


def test_heads_of_odd_size_need_no_positions():
    assert Flash(SHAPE, 0, num_heads=16, rotary_base=None)(torch.zeros(1, 3, 48)).y.shape == (1, 3, 48)
    with pytest.raises(
        ConfigError, match=r"even head size, and mixer.num_heads=16 gives 3; mixer.rotary_base=null does"
    ):
        Flash(SHAPE, 0, num_heads=16)


ROTATING = [path for path in FILES if "rotary_base" in settings_of(path)]
ASKED = {
    "none": {"rotary_base": None},
    "yarn": {"rotary_base": 100.0, "rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_length": 16},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("path", ROTATING, ids=lambda path: path.stem)
@torch.no_grad()
def test_every_mixer_that_rotates_decodes_what_one_pass_computes(path, asked):
    torch.manual_seed(1)
    node = {
        **small_mixer(settings_of(path), 4),
        **asked,
        **({"key_factor": 1.0} if "key_factor" in settings_of(path) else {}),
    }
    mixer = build(node, "mixer", shape=SHAPE, layer_index=0).double().eval()
    assert (mixer.rotary is None) == (asked["rotary_base"] is None)
    x = torch.randn(2, 20, SHAPE.d_model, dtype=torch.float64)
    ids = torch.repeat_interleave(torch.arange(2), torch.tensor([7, 13])).expand(2, -1).int()
    for documents in (None, ids):
        state, pieces = mixer.init_state(2), []
        for piece in (slice(0, 5), *(slice(place, place + 1) for place in range(5, 9)), slice(9, 20)):
            own = None if documents is None else documents[:, piece]
            output = mixer(x[:, piece], state=state, document_ids=own)
            state = output.state
            pieces.append(output.y)
        whole = mixer(x, document_ids=documents).y
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)


def test_layers_with_the_same_positions_share_a_layout():
    mixers = [Flash(SHAPE, 0, **YARN), Flash(SHAPE, 1, **YARN), Flash(SHAPE, 2), Flash(SHAPE, 3, rotary_base=None)]
    made = layouts({mixer.layout_needs() for mixer in mixers}, torch.zeros(2, 9, dtype=torch.int64), None)
    assert len(made) == 3
    assert made[mixers[3].layout_needs()].cosine is None


REFUSED = {
    "factor-alone": (
        {"rotary_factor": 2.0},
        "mixer.rotary_factor=2.0 belongs to a mixer.rotary_scaling, which is null; .* or mixer.rotary_factor=null",
    ),
    "length-alone": ({"rotary_original_length": 64}, "mixer.rotary_original_length=64 belongs to a"),
    "options-alone": ({"rotary_options": {"beta_fast": 3}}, "mixer.rotary_options=.* belongs to a"),
    "no-factor": ({"rotary_scaling": "linear"}, "mixer.rotary_factor=null must be at least 1"),
    "small-factor": ({"rotary_scaling": "linear", "rotary_factor": 0.5}, "mixer.rotary_factor=0.5 must be at least 1"),
    "no-length": (
        {"rotary_scaling": "yarn", "rotary_factor": 2},
        "mixer.rotary_original_length=null must be the tokens",
    ),
    "useless-length": ({**LINEAR, "rotary_original_length": 64}, "length=64 changes nothing with .* make it null"),
    "short-length": ({**YARN, "rotary_original_length": 5}, "rotary_original_length=5 is so short that no channel"),
    "kind": ({"rotary_scaling": "ntk", "rotary_factor": 2}, "mixer.rotary_scaling='ntk' is not one of linear, yarn"),
    "no-base": (
        {"rotary_base": None, **LINEAR},
        "=linear has nothing to rotate: .* give a mixer.rotary_base, or mixer.rotary_scaling=null",
    ),
    "no-base-fraction": ({"rotary_base": None, "rotary_fraction": 0.5}, "=0.5 has nothing to rotate: .*_fraction=1"),
    "fraction": ({"rotary_fraction": 0.0}, "mixer.rotary_fraction=0.0 must be above 0 and at most 1"),
    "odd-fraction": ({"rotary_fraction": 0.1}, "mixer.rotary_fraction=0.1 of a head of 16 channels rotates 1; it must"),
    "option": ({**LINEAR, "rotary_options": {"beta_fast": 3}}, "rotary_options.beta_fast is unknown; .* are none"),
    "option-of-another": ({**LLAMA3, "rotary_options": {"beta_fast": 3}}, "are low_freq_factor, high_freq_factor"),
    "option-type": ({**YARN, "rotary_options": {"beta_fast": "3"}}, "rotary_options.beta_fast='3' is not a number"),
    "option-null": ({**YARN, "rotary_options": {"beta_fast": None}}, "rotary_options.beta_fast=null is not a number"),
    "ramp": ({**YARN, "rotary_options": {"beta_fast": 1}}, "rotary_options.beta_fast=1 must be above beta_slow=1.0"),
    "freq": (
        {**LLAMA3, "rotary_options": {"low_freq_factor": 4}},
        "high_freq_factor=4.0 must be above low_freq_factor",
    ),
    "gain": ({**YARN, "rotary_options": {"attention_factor": -1}}, "attention_factor=-1 must be above 0"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("kind", [Flash, Retention])
def test_what_makes_no_sense_is_refused_by_name(kind, settings, message):
    node = {"_target_": f"{kind.__module__}.{kind.__name__}", **({"key_factor": 1.0} if kind is Retention else {})}
    with pytest.raises(ConfigError, match=message) as caught:
        build({**node, **settings}, "mixer", shape=SHAPE, layer_index=0)
    assert "\n" not in str(caught.value)


def test_yarns_factor_is_that_of_its_paper():
    assert rotary(64, **YARN).attention_factor == 0.1 * math.log(4) + 1
