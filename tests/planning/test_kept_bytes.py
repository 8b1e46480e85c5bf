"""What a layer keeps from its forward to its backward pass, per token, for every mixer: it may only fall.

The figures are those of `model=125m` in bf16-mixed on a GPU, as the planner's rehearsal finds them.
"""

import json
from pathlib import Path

import pytest

from longmix.planning.arguments import read
from longmix.planning.dry_run import Setting, rehearse, rehearse_ends

CONFIGS = Path(__file__).parents[2] / "configs" / "mixer"
TABLE: dict[str, int] = json.loads(Path(__file__).with_name("kept_bytes.json").read_text())
RECOMPUTED = ("deltanet", "gated_deltanet", "kda", "gla", "rwkv7")
"""The mixers on the delta engine, which compute again what is cheap."""

LENGTH = 512


def kept_bytes(mixer: str, length: int = LENGTH) -> int:
    """Bytes per token and layer, the layer's output included."""
    asked = read(["gpu=cpu", "model=125m", "model.num_layers=2", f"seq_len={length}", f"mixer={mixer}"])
    model = asked.model()
    setting = Setting(1, length, "bf16-mixed", sharded=False, accumulates=False, checkpointed=False, device="cuda")
    part = rehearse(model, setting, rehearse_ends(model, setting)).layers[1]
    return round((part.kept + part.output) / length)


@pytest.mark.parametrize("mixer", TABLE)
def test_a_layer_keeps_no_more_than_the_table_says(mixer):
    found = kept_bytes(mixer)
    assert found <= TABLE[mixer], (
        f"{mixer} keeps {found} bytes per token and layer; kept_bytes.json allows {TABLE[mixer]}"
    )


def test_the_table_has_every_mixer():
    assert sorted(TABLE) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("mixer", RECOMPUTED)
def test_the_delta_rule_keeps_little_more_than_attention(mixer):
    assert TABLE[mixer] <= 1.3 * TABLE["flash"]
