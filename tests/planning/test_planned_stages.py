"""Plans of runs with stages: each stage in a line, and the one that takes the most memory in full."""

import pytest

from longmix.errors import ConfigError
from longmix.planning.__main__ import main
from longmix.planning.arguments import read_stages
from longmix.reading import read_json

SMALL = ["model.num_layers=1", "model.d_model=32", "model.mlp_hidden=32", "gpu=cpu"]
STAGES = "stages=[{seq_len:64,batch_size:8},{seq_len:512,batch_size:4,micro_batch_size:2},{seq_len:128}]"


def test_each_stage_is_a_request_of_its_own():
    requests = read_stages([*SMALL, STAGES])
    assert [request.variant.seq_len for request in requests] == [64, 512, 128]
    assert [request.variant.micro_batch_size for request in requests] == [8, 2, 1]
    assert [request.batch_size(request.variant) for request in requests] == [8, 4, 1]
    (alone,) = read_stages([*SMALL, "seq_len=64", "batch_size=8"])
    assert alone.variant == requests[0].variant


def test_the_dearest_stage_is_planned_in_full(tmp_path, capsys):
    assert main([*SMALL, STAGES, f"output={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "the dearest" in next(line for line in printed.splitlines() if line.split()[:2] == ["2", "512"])
    assert "seq_len=512, on 1 x CPU" in " ".join(printed.split())
    plan = read_json(tmp_path / "plan.json")
    assert [stage["seq_len"] for stage in plan["stages"]] == [64, 512, 128]
    assert plan["memory_total"] == max(stage["memory_total"] for stage in plan["stages"])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("{},{batch_size:3}", r"stages\[1\]: batch_size=3 does not divide over 2 replicas"),
        ("{},{micro_batch_size:3,batch_size:4}", r"stages\[1\]: trainer.micro_batch_size=3 does not divide"),
        ("{mixer:{qk_norm:false}}", r"stages\[0\]: mixer.qk_norm comes from the whole run"),
    ],
)
def test_impossible_stages_are_refused_by_number(stages, message):
    with pytest.raises(ConfigError, match=message):
        read_stages([*SMALL, f"stages=[{stages}]", "gpus=2"])
