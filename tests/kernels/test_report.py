"""The report of all engines: what it prints, writes and refuses, and what counts as a fault."""

import json

import pytest
from engine_contract import CLEAN, SPILLING, WITHOUT_WGMMA, Compiled

from longmix_kernels import aot, report
from longmix_kernels.attention import decode_report, probe_launch, split_launch
from longmix_kernels.attention import report as attention
from longmix_kernels.delta import report as delta
from longmix_kernels.linear import report as linear
from longmix_kernels.scatter import report as scatter

# By engine: options for one small table, the columns it begins with, and its kernels.
COMMANDS = {
    "attention": (
        ["--dim", "64"],
        ["dim", "mode", "feature"],
        (
            *attention.launch.KERNELS,
            *split_launch.KERNELS,
            *probe_launch.KERNELS,
            *(build.kernel for build in decode_report.builds((90,), (64,), features=("plain",))),
        ),
    ),
    "linear": (
        ["--dims", "64/64", "--gate", "sig"],
        ["dims", "gate"],
        (*linear.launch.TILED, "gates", "grad_gates", "step"),
    ),
    "delta": (
        ["--dims", "64/64", "--decay", "exact"],
        ["dims", "form", "decay"],
        (*delta.launch.KERNELS, "prepare", "scan"),
    ),
    "scatter": (["--sizes", "64/64", "--block", "128"], ["sizes", "block"], scatter.launch.KERNELS),
}
REPORTS = {"attention": attention, "linear": linear, "delta": delta, "scatter": scatter}


@pytest.mark.parametrize("engine", report.ENGINES)
def test_command_prints_tables_and_writes_json(engine, tmp_path, capsys, monkeypatch):
    options, columns, kernels = COMMANDS[engine]
    results = dict.fromkeys(kernels, CLEAN) | {kernels[1]: SPILLING}
    monkeypatch.setattr(aot.Build, "compile", lambda build: results[build.kernel])
    path = tmp_path / "report.json"
    arguments = [engine, "--arch", "90", *options, "--json", str(path)]
    assert report.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    head = ["kernel", "arch", "dtype", *columns]
    assert lines[0].split()[: len(head)] == head
    assert [line.split()[0] for line in lines[1 : len(kernels) + 1]] == list(kernels)
    assert lines[2].endswith("spills 24 bytes") and lines[1].endswith("-")
    written = json.loads(path.read_text())[engine]
    assert [row["kernel"] for row in written["kernels"]] == list(kernels)
    assert written["kernels"][0]["registers"] == 200 and written["kernels"][1]["spills"] == 24
    assert written["costs"] == REPORTS[engine].costs()
    results[kernels[1]] = CLEAN
    assert report.main(arguments) == 0


def test_without_an_engine_all_are_reported(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert report.main(["--cost-only", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert {engine: found["costs"] for engine, found in written.items()} == {
        engine: module.costs() for engine, module in REPORTS.items()
    }
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line in report.ENGINES] == list(report.ENGINES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--dim", "300"], "--dim got [300]; allowed are 1 to 256"),
        (["linear", "--dims", "64"], "--dims got ['64']; allowed are pairs"),
        (["linear", "--dims", "600/64"], "--dims got ['600/64']; allowed are pairs"),
        (["delta", "--dims", "300/64"], "--dims got ['300/64']; allowed are pairs"),
        (["delta", "--dims", "64/0"], "--dims got ['64/0']; allowed are pairs"),
        (["scatter", "--sizes", "64/300"], "--sizes got ['64/300']; allowed are pairs"),
        (["scatter", "--sizes", "0/64"], "--sizes got ['0/64']; allowed are pairs"),
        (["scatter", "--block", "0"], "--block got [0]; allowed are at least 1"),
        (["--dim", "64"], "unrecognized arguments: --dim 64"),
        (["softmax"], "unrecognized arguments: softmax"),
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "dtype", "fault"),
    [
        ({}, "bf16", None),
        ({"spills": 8}, "bf16", "spills 8 bytes"),
        ({"stack": 16}, "bf16", "uses 16 bytes of stack"),
        ({"shared": 10**6}, "bf16", "wants 1000000 bytes of shared memory"),
        ({"serialized": True}, "bf16", "serializes wgmma"),
        ({"tensor_cores": WITHOUT_WGMMA.tensor_cores}, "fp16", "has no wgmma"),
        ({"tensor_cores": WITHOUT_WGMMA.tensor_cores}, "fp32", None),
    ],
)
def test_what_counts_as_a_fault(changed, dtype, fault):
    compiled = Compiled(**{**vars(CLEAN), **changed})
    assert attention.Build("forward", 90, dtype, 64, 64).faults(compiled) == ([] if fault is None else [fault])


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (delta.Build("prepare", 90, "bf16", 64, 64), True),
        (delta.Build("prepare", 90, "bf16", 64, 64, decay="exact"), False),
        (delta.Build("scan", 90, "bf16", 64, 64, decay="exact"), True),
        (delta.Build("scan", 90, "bf16", 16, 64), False),
        (delta.Build("prepare", 80, "bf16", 64, 64), False),
        (linear.Build("output", 90, "bf16", 64, 64), True),
        (linear.Build("gates", 90, "bf16", 64, 64), False),
        (scatter.Build("merge", 90, "bf16", 64, 64), True),
        (scatter.Build("merge", 90, "bf16", 64, 64, block_size=32), False),
        (scatter.Build("sums", 90, "bf16", 20, 64), False),
        (scatter.Build("scan", 90, "bf16", 64, 64), False),
        (scatter.Build("merge", 80, "bf16", 64, 64), False),
    ],
    ids=str,
)
def test_wgmma_is_wanted_where_tiles_have_the_rows_for_it(build, wanted):
    assert build.faults(WITHOUT_WGMMA) == (["has no wgmma"] if wanted else [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attention", "--dim", "0"], "--dim got [0]; allowed are 1 to 256"),
        (["delta", "--dims", "0/0"], "--dims got ['0/0']; allowed are pairs such as 64/64"),
        (["scatter", "--sizes", "x/64"], "--sizes got ['x/64']; allowed are pairs"),
        (["linear", "--nosuch"], "unrecognized arguments: --nosuch"),
    ],
)
def test_impossible_options_are_refused_in_one_line_also_where_only_costs_are_asked_for(capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        report.main([*arguments, "--cost-only"])
    (message,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and said in message
