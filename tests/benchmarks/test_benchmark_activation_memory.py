"""`python -m benchmarks.activation_memory`: a row for each mixer and kind, in JSON, a table and a picture."""

import json

import pytest

from benchmarks import activation_memory
from longmix.planning import check
from longmix.planning.arguments import read

PEAKS = {"none": 4000, "block": 1000, "selective": 2000}


@pytest.mark.slow
def test_leaves_a_row_for_each_mixer_and_kind(tmp_path, monkeypatch, capsys):
    asked = []

    def peak(given: list[str]) -> tuple[int, float]:
        asked.append(read(given))
        return PEAKS[asked[-1].variant.activation_checkpointing] * 2**20, 1.5

    monkeypatch.setattr(activation_memory, "in_a_process", peak)
    words = ["--mixers", "flash", "retention", "--length", "64", "--layers", "2", "--width", "32"]
    assert activation_memory.main([*words, "--out", str(tmp_path)]) == 0
    assert {(each.variant.seq_len, each.accelerator) for each in asked} == {(64, None)}
    (file,) = tmp_path.glob("*.json")
    records = json.loads(file.read_text())["results"]
    assert [(each["mixer"], each["activation_checkpointing"]) for each in records] == [
        (mixer, kind) for mixer in ("flash", "retention") for kind in ("none", "block", "selective")
    ]
    assert all(each["planned_bytes"] > 0 for each in records)
    lines = file.with_suffix(".md").read_text().splitlines()
    assert lines[3].startswith("| flash | block | 1,000 | 25% |")
    assert file.with_suffix(".png").stat().st_size > 5000
    assert "written:" in capsys.readouterr().out


def test_a_row_is_what_one_step_held(monkeypatch):
    monkeypatch.setattr(check, "peak_on_cpu", lambda request, steps: 7 if steps == 1 else 0)
    found = []

    class Queue:
        put = found.append

    options = activation_memory.parse(["--length", "64"])
    activation_memory.measured(activation_memory.words(options, "flash", "none"), Queue)
    assert found[0][0] == 7
