"""The tools that are run with `python -m`: their usage names them, and what they refuse is short."""

import importlib
import sys

import pytest

TOOLS = [
    "longmix.interop.rwkv",
    "longmix.interop.huggingface",
    "longmix.reporting",
    "longmix.checkpoints",
    "longmix.planning.check",
    "longmix.planning",
]


def called(monkeypatch, tool: str, *arguments: str) -> int:
    module = importlib.import_module(tool)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{tool}.__main__")
    monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
    try:
        return module.main() or 0
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), (["--nonsense"], 2)])
def test_usage_names_the_program(monkeypatch, capsys, tool, arguments, code):
    assert called(monkeypatch, tool, *arguments) == code
    printed = capsys.readouterr()
    text = printed.err if code else printed.out
    assert f"python -m {tool}" in text or (code and "--nonsense is an option, and only words" in text), text
    assert "Traceback" not in text and "__main__.py" not in text
    assert (printed.out if code else printed.err) == ""


@pytest.mark.parametrize("tool", ["longmix.interop.rwkv", "longmix.reporting", "longmix.checkpoints"])
def test_without_arguments_there_is_a_usage(monkeypatch, capsys, tool):
    assert called(monkeypatch, tool) == 2
    assert f"usage: python -m {tool}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("longmix.interop.rwkv", ["nowhere", "out.pth"]),
        ("longmix.interop.huggingface", ["export", "nowhere", "out"]),
        ("longmix.interop.huggingface", ["import", "nowhere", "out"]),
        ("longmix.reporting", ["nowhere"]),
        ("longmix.checkpoints", ["consolidate", "nowhere"]),
        ("longmix.planning", ["mixer=nowhere"]),
        ("longmix.planning", ["nowhere"]),
    ],
)
def test_what_is_not_there_is_one_line(monkeypatch, capsys, tmp_path, tool, arguments):
    monkeypatch.chdir(tmp_path)
    assert called(monkeypatch, tool, *arguments) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and "nowhere" in printed and "Error: " in printed
    assert list(tmp_path.iterdir()) == []
