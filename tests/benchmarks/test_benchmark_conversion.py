"""The benchmark of conversions: the runs it makes, and what its table and picture show."""

import pytest

import longmix
from benchmarks import conversion
from benchmarks.conversion import Student
from longmix.reading import read_json

TEACHER = {"bits_per_byte": 2.0, "needle_token_accuracy": 0.5, "needle_gain": 1.0}


def options_of(*words):
    return conversion.parse(
        ["runs/a", "gla", "gla*3+flash", "--length", "64", "--step-tokens", "128", "--check", *words]
    )


def record_of(student, bits):
    facts = {
        "stage_seconds": [1.0, 2.0, 3.0],
        "tokens_per_second": 7.0,
        "needle_token_accuracy": 0.25,
        "needle_gain": 0.5,
    }
    return {"arm": student.name, "tokens_seen": range(0, 100 * len(bits), 100), "bits_per_byte": bits, **facts}


def test_ways_differ_in_weights_and_objectives():
    options = options_of("--tokens", "256", "0", "512", "--word-of-converted", "optimizer.learning_rate=0.1")
    found = {
        way: conversion.arm_of(Student("gla num_heads=2", way), {"d_model": 32}, options) for way in conversion.WAYS
    }
    assert len({arm.folder for arm in found.values()}) == 3
    words = {way: set(arm.words) for way, arm in found.items()}
    own = {"checkpoint=runs/a", "convert=true", "optimizer.learning_rate=0.1"}
    assert own <= words["distilled"] and own <= words["text"] and not own & words["scratch"]
    assert "stages=[{objective:layers,max_tokens:256},{objective:tokens,max_tokens:512}]" in words["distilled"]
    assert "stages=[{objective:tokens,max_tokens:256},{objective:tokens,max_tokens:512}]" in words["text"]
    assert "model.d_model=32" in words["scratch"] and all(
        {"batch_size=2", "mixer=gla"} <= own for own in words.values()
    )


def test_stages_have_their_own_learning_rates():
    options = options_of("--tokens", "1", "2", "3", "--scales", "1", "0.2", "0.05")
    stages = conversion.stages_of("distilled", options)
    assert "objective:layers,max_tokens:1}" in stages
    assert "objective:logits,max_tokens:2,learning_rate_scale:0.2}" in stages
    assert "objective:tokens,max_tokens:3,learning_rate_scale:0.05}" in stages
    assert "scale" not in conversion.stages_of("scratch", options)


def test_table_and_picture():
    options = options_of("--tokens", "100", "100", "0")
    records = [
        record_of(Student("gla", "distilled"), [4.0, 3.0, 2.5]),
        record_of(Student("gla", "scratch"), [3.5, 3.0]),
    ]
    rows = conversion.table([*records, record_of(Student("kda", "text"), [4, 3, 2])], TEACHER, options).splitlines()
    assert [cell.strip() for cell in rows[0].split("|")][3:6] == ["transfer", "after 100 tokens", "after 200 tokens"]
    assert rows[2] == "| teacher |  | 2.0000 |  |  |  | 0.50 | 1.00 |  |"
    assert rows[3] == "| `gla` | distilled | 4.0000 | 3.0000 | 2.5000 | 1, 2, 3 | 0.25 | 0.50 | 7 |"
    assert rows[4].startswith("| `gla` | scratch |  | 3.5000 | 3.0000 |")
    assert conversion._short_names(["gla", "kda a=1", "gdn a=1", "gdn a=2"]) == {
        **{"gla": "gla", "kda a=1": "kda"},
        **{name: name for name in ("gdn a=1", "gdn a=2")},
    }
    titles = [axes.get_title(loc="left") for axes in conversion.drawn(records, TEACHER, options).axes]
    assert titles == ["distilled", "scratch"]


@pytest.mark.parametrize("tokens", [("0", "0", "0"), ("5", "-1", "3")])
def test_impossible_stages_are_refused(tokens, capsys):
    with pytest.raises(SystemExit) as ended:
        options_of("--tokens", *tokens)
    assert ended.value.code == 2 and "--tokens" in capsys.readouterr().err


def test_a_missing_teacher_is_one_line(tmp_path, capsys):
    assert conversion.main([str(tmp_path / "none"), "gla", "--out", str(tmp_path)]) != 0
    assert capsys.readouterr().err.count("\n") <= 2


@pytest.mark.slow
def test_conversions_are_trained_and_measured(tmp_path, tiny_overrides):
    words = [*tiny_overrides, "seq_len=128", "mixer=flash"]
    teacher = longmix.train(words, folder=tmp_path / "teacher").folder
    own = [word for word in tiny_overrides if word.startswith("data.")]
    given = [str(teacher), "flash", "gla", "--length", "128", "--step-tokens", "128", "--tokens", "0", "128", "256"]
    given += ["--needles", "1", "--prompt", "The", "--written", "4", *(x for word in own for x in ("--word", word))]
    assert conversion.main([*given, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    found = {record["arm"]: record for record in read_json(path)["results"]}
    assert len(found) == 6 and found["gla, distilled"]["tokens_seen"] == [0, 128, 384]
    assert found["flash, scratch"]["tokens_seen"] == [128, 384]
    taught = read_json(teacher / "summary.json")["validation"]["bits_per_byte"]
    (table,) = (tmp_path / "out").glob("*.md")
    assert found["flash, text"]["bits_per_byte"][0] == taught and f"| teacher |  | {taught:.4f} |" in table.read_text()
    assert all(len(record["text"]) > 0 and len(record["stage_seconds"]) == 2 for record in found.values())
