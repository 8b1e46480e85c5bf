"""Settings of the mixers: a class has the defaults of its file, and refuses by name what it cannot be built with."""

import pytest
import torch
from mixer_table import FILES, SHAPE, settings_of

from longmix.config import build, locate, settings
from longmix.errors import ConfigError
from longmix.mixers.mlstm_tfla import MLSTMTFLA
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.parts.gated_memory import GatedMemory
from longmix.mixers.parts.head_decay import HeadDecay
from longmix.mixers.routing import Routing
from longmix.mixers.rwkv7 import RWKV7
from longmix.mixers.scatterbrain import Scatterbrain

WIDE = ModelShape(d_model=64, num_layers=2, num_heads=4)
TARGETS = sorted({settings_of(path)["_target_"] for path in FILES})


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.rpartition(".")[2])
def test_a_class_needs_no_settings(target):
    mixer = locate(target, "mixer")(WIDE, 0)
    assert mixer(torch.zeros(1, 3, 64)).y.shape == (1, 3, 64)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_the_class_does_without_it(path):
    node = settings_of(path)
    with torch.device("meta"):
        torch.manual_seed(0)
        default = locate(node["_target_"], "mixer")(WIDE, 0)
        configured = build(node, "mixer", shape=WIDE, layer_index=0)
    plain = {name: value for name, value in vars(default).items() if isinstance(value, int | float | str | None)}
    assert plain == {name: vars(configured)[name] for name in plain}
    assert {n: x.shape for n, x in default.state_dict().items()} == {
        n: x.shape for n, x in configured.state_dict().items()
    }


NUMBERS = [
    pytest.param(path, name, value, id=f"{path.stem}-{name}-{value:.0e}")
    for path in FILES
    for name, hint in settings(locate(settings_of(path)["_target_"], "mixer")).items()
    if any(kind in str(hint) for kind in ("int", "float")) and name != "layer_index" and name != "shape"
    for value in (10**30, -(10**30))
]


@pytest.mark.parametrize(("path", "name", "value"), NUMBERS)
def test_absurd_numbers_are_refused_by_name(path, name, value):
    node, given = settings_of(path), [float(value)] * 2 if name == "forget_bias" else value
    with pytest.raises(ConfigError, match=f"mixer.{name}"), torch.device("meta"):
        build({**node, name: given}, "mixer", shape=WIDE, layer_index=0)


REFUSED = {
    "mlstm-key-factor": (
        lambda: MLSTMTFLA(SHAPE, 0, key_factor=-1),
        r"mixer.key_factor=-1 must be positive and at most 64",
    ),
    "lightning-key-factor": (lambda: HeadDecay(SHAPE, 0, key_factor=0.0), r"mixer.key_factor=0.0 must be positive"),
    "linear-norm-eps": (lambda: HeadDecay(SHAPE, 0, norm_eps=-1e-6), r"mixer.norm_eps=-1e-06 must not be negative"),
    "delta-norm-eps": (lambda: GatedMemory(SHAPE, 0, norm_eps=-1.0), r"mixer.norm_eps=-1.0 must not be negative"),
    "rwkv7-norm-eps": (lambda: RWKV7(SHAPE, 0, head_dim=16, norm_eps=-1.0), r"mixer.norm_eps=-1.0 must not be"),
    "clusters": (lambda: Routing(SHAPE, 0, clusters=0), r"mixer.clusters=0 must be at least 2"),
    "one-cluster": (lambda: Routing(SHAPE, 0, clusters=1), r"mixer.clusters=1 must be at least 2"),
    "seed": (
        lambda: Scatterbrain(SHAPE, 0, feature_seed=2**63),
        r"mixer.feature_seed=9223372036854775808 is out of ra",
    ),
    "cap": (
        lambda: MLSTMTFLA(SHAPE, 0, gate_cap=1e300),
        r"mixer.gate_cap=1e\+300 is out of range; it must be from -1,000",
    ),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


OTHER_VALUES = {
    **{"rotary_base": 500.0, "rotary_fraction": 0.5, "rotary_scaling": "linear", "rotary_factor": 3.0},
    **{"window": 5, "local_window": 3, "sample": 0.5, "sink": 2, "local": 3, "stride": 5},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_may_change_changes_no_weight(path):
    node = settings_of(path)
    kind = locate(node["_target_"], "mixer")
    assert set(kind.changeable) <= set(settings(kind))
    if not kind.changeable:
        return
    base = {"rotary_base": 10_000.0} if "rotary_base" in node else {}
    changes = {name: value for name, value in OTHER_VALUES.items() if name in kind.changeable}
    both = []
    for given in (base, changes):
        torch.manual_seed(0)
        both.append(build({**node, **given}, "mixer", shape=SHAPE, layer_index=0).state_dict())
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(weight, both[1][name]) for name, weight in both[0].items())
