"""`python -m longmix.planning`: what it prints and writes, and how it ends."""

import json
import re

import pytest

from longmix.accelerators import ACCELERATORS
from longmix.planning.__main__ import main
from longmix.planning.arguments import OWN, read

SMALL = (
    "model.d_model=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.mlp_hidden=96",
    "seq_len=512",
    "gpu=L40S",
)


@pytest.mark.slow
def test_a_run_that_fits_is_printed_and_written(tmp_path, capsys):
    assert main([*SMALL, "mixer=lightning", "gpus=2", "batch_size=8", f"output={tmp_path / 'plan'}"]) == 0
    text = capsys.readouterr().out
    assert "2 x L40S, ddp, bf16-mixed" in text
    assert "fits; most is held at" in text
    assert "assumed: products of matrices" in text
    assert "smallest change" not in text
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["fits"] is True
    assert plan["memory_total"] == sum(plan["memory"].values())
    assert plan["traffic"]["gradients"] == 4 * plan["parameters"]["total"]  # 2 (W - 1) / W of four bytes each
    assert plan["time"]["tokens_per_second"] == pytest.approx(8 * 512 / plan["time"]["total"])
    lengths = [row["seq_len"] for row in plan["by_length"]]
    assert lengths == [32, 64, 128, 256, 512, 1024]
    assert [row["memory_total"] for row in plan["by_length"]] == sorted(
        row["memory_total"] for row in plan["by_length"]
    )
    assert (tmp_path / "plan" / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_that_does_not_fit_ends_with_1_and_says_what_would(capsys):
    words = ["model=7b", "model.num_layers=2", "mixer=flash", "gpu=rtx4090", "seq_len=8192", "batch_size=16"]
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "smallest change that fits: trainer.micro_batch_size=" in text
    assert "alone, seq_len=" in text


def test_a_cpu_has_no_estimate_of_time(capsys):
    assert main([*SMALL[:-1], "gpu=cpu"]) == 0
    assert "unknown" in capsys.readouterr().out


def test_an_error_is_one_line_and_ends_with_2(capsys):
    assert main(["gpu=h300"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ConfigError: gpu=h300")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*SMALL, f"output={tmp_path / 'file' / 'plan'}"]) == 2
    assert "StorageError" in capsys.readouterr().err


def test_help_is_a_table_of_the_words(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert [line.split("=")[0].strip() for line in printed.splitlines() if re.match(r"  \w+=\S+  +", line)] == list(OWN)
    assert "The words of `python train.py` are taken too" in printed


def test_the_table_has_the_accelerators_and_defaults():
    assert OWN["gpu"].choices == (*ACCELERATORS, "cpu")
    plain, spelled = read([]), read([f"{name}={word.default}" for name, word in OWN.items()])
    assert (plain.gpus, plain.accelerator) == (spelled.gpus, spelled.accelerator) == (1, ACCELERATORS["H200"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is nothing to plan; give at least one word."),
        (["output="], "output is empty; was a variable of the shell not set?"),
        (["mixer=flahs"], "mixer=flahs does not exist. Did you mean flash?"),
        (["mixr=flash"], "unknown word mixr. Did you mean mixer?"),
        (["help"], "help is not a word"),
        (["seq_len=16k"], "Write seq_len=16000 or seq_len=16384."),
        (["gpus=1e1", "gpu=x"], "gpu=x is not in the table"),
        (["gpuss=2"], "unknown word gpuss. Did you mean gpus?"),
        (["outpt=plan"], "unknown word outpt. Did you mean output?"),
    ],
)
def test_refused_by_name(words, message, capsys):
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed.splitlines()[0] and "Search path" not in printed


def test_whole_numbers_in_any_form(capsys):
    assert main([*SMALL[:-1], "gpu=cpu", "seq_len=1e2"]) == 0
    assert "seq_len=100" in capsys.readouterr().out


def test_one_window_is_singular(capsys):
    main([*SMALL, "mixer=lightning"])
    assert "1 window a step, 1 at a time" in " ".join(capsys.readouterr().out.split())
