"""Nodes within nodes: whatever holds them, they are checked and built, and messages name the place where they stand."""

import pytest
from config_nodes import Part, Whole

from longmix.config import TrainConfig, build, read
from longmix.errors import ConfigError

PART = "config_nodes.Part"


def whole(**settings):
    return build({"_target_": "config_nodes.Whole", **settings}, "room.whole")


def test_are_built_in_dicts_and_lists():
    built = whole(
        one={"_target_": PART, "size": 2},
        named={"a": {"_target_": PART, "size": 3}},
        several=[{"_target_": PART, "size": 4}, {"_target_": PART, "inner": {"_target_": PART, "size": 5}}],
    )
    assert isinstance(built, Whole) and all(isinstance(part, Part) for part in (built.one, *built.several))
    assert (built.one.size, built.named["a"].size, built.several[0].size, built.several[1].inner.size) == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"one": {"_target_": PART, "size": 0}}, "room.whole.one.size=0 must be at least 1; data.partly.size"),
        ({"named": {"a": {"_target_": PART, "size": 0}}}, "room.whole.named.a.size=0 must"),
        ({"several": [{"_target_": PART}, {"_target_": PART, "size": 0}]}, "room.whole.several[1].size=0 must"),
        (
            {"named": {"a": {"_target_": PART, "inner": {"_target_": PART, "size": 0}}}},
            "room.whole.named.a.inner.size=0 must",
        ),
        ({"several": [{"_target_": PART, "siez": 0}]}, "unknown key room.whole.several[0].siez. Did you mean size?"),
        ({"several": [{"_target_": "builtins.dict"}]}, "room.whole.several[0]._target_=builtins.dict is no class of"),
        ({"several": [3]}, "room.whole.several[0]=3 is not a choice; it needs `_target_`"),
        ({"named": {"a": 3}}, "room.whole.named.a=3 is not a choice; it needs `_target_`"),
    ],
)
def test_are_named_by_their_place(settings, message):
    with pytest.raises(ConfigError) as refused:
        whole(**settings)
    assert str(refused.value).startswith(message)


def test_a_member_of_a_pattern_is_named_once(compose_config):
    from longmix.config import resolved
    from longmix.training.run import check_config

    config = resolved(compose_config("trainer=cpu", "logger=none", "mixer=routing*2+flash", "mixer.routing.clusters=1"))
    with pytest.raises(ConfigError) as refused:
        check_config(read(TrainConfig, config))
    message = str(refused.value)
    assert message == "mixer.routing.clusters=1 must be at least 2; mixer=sliding_window has none."
