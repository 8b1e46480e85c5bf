"""`python -m benchmarks.state_tracking`: what its words mean, and its table and picture."""

import pytest

from benchmarks import state_tracking

MODELS = ("deltanet", "gated_deltaproduct householders=3 num_heads=1")


def test_a_model_is_a_mixer_and_its_settings():
    wanted = ["mixer=gated_deltaproduct", "mixer.householders=3", "mixer.num_heads=1"]
    assert state_tracking.words_of(MODELS[1]) == wanted


def test_training_may_begin_with_shorter_rows():
    assert state_tracking.course(100, []) == ["max_steps=100"]
    stages = "stages=[{seq_len:6,max_steps:33},{seq_len:12,max_steps:33},{max_steps:34}]"
    assert state_tracking.course(100, [6, 12]) == [stages, "max_steps=null"]


def test_a_row_for_each_task_and_model(tmp_path):
    records = [
        {"task": task, "model": model, "steps": 5, "trained_length": 8, "length": length, "accuracy": length / 32}
        for task in ("parity", "s3")
        for model in MODELS
        for length in (8, 16)
    ]
    lines = state_tracking.table(records).splitlines()
    assert lines[0] == "| task | mixer | steps | recall at 8 | recall at 16 |"
    assert lines[3] == f"| parity | `{MODELS[1]}` | 5 | 0.250 | 0.500 |" and len(lines) == 6
    figure = state_tracking.drawn(records)
    assert len(figure.axes) == 2
    (legend,) = figure.subfigs[-1].legends
    assert [text.get_text() for text in legend.get_texts()] == list(MODELS)


@pytest.mark.parametrize("given", ["parity", "parity=0", "copying=3"])
def test_what_is_no_task_is_one_line(given, capsys):
    with pytest.raises(SystemExit) as ended:
        state_tracking.main(["--task", given])
    assert ended.value.code == 2
    assert "must be NAME=STEPS" in capsys.readouterr().err
