"""Warnings of longmix's own: one line, once a run, from one process; those of libraries stay as they are."""

import ast
import warnings
from pathlib import Path

import pytest

from longmix import notices
from longmix.mixers.parts.base import ModelShape
from longmix.mixers.routing import Routing
from longmix.mixers.scatterbrain import Scatterbrain
from longmix_kernels.launch import KernelWarning

ROOT = Path(__file__).parents[1]
SHAPE = ModelShape(d_model=32, num_layers=3, num_heads=2)


@pytest.fixture
def shown(monkeypatch):
    """As the entry points show warnings."""
    monkeypatch.setattr(notices, "_said", set())
    with warnings.catch_warnings():
        warnings.resetwarnings()
        notices.show_in_one_line()
        yield


def leaky(layer: int) -> None:
    Routing(SHAPE, layer, clusters=2, window=8, mode="sequence_topk")


def few_features(layer: int) -> None:
    Scatterbrain(SHAPE, layer, num_features=4, radius=2.0)


@pytest.mark.parametrize(
    ("build", "key", "cure"),
    [(leaky, "mixer.mode=sequence_topk", "mixer.mode=argmax_window"), (few_features, "mixer.num_features=4", "=55")],
)
def test_are_one_line_with_key_and_cure_once_a_run(shown, capsys, build, key, cure):
    for layer in range(3):
        build(layer)
    printed = capsys.readouterr().err
    assert printed.startswith(f"Warning: {key} ") and cure in printed and len(printed.splitlines()) == 1
    assert ".py" not in printed.replace("evaluate.py", "")
    notices.begin_run()
    build(0)
    assert capsys.readouterr().err == printed


def test_come_from_the_first_process_only(shown, capsys, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    leaky(0)
    assert capsys.readouterr().err == ""


def test_of_libraries_stay():
    """As whoever showed them before does, with file and line."""
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda *given, **options: seen.append(given)
        notices.show_in_one_line()
        warnings.warn("theirs", UserWarning, stacklevel=1)
    ((message, category, path, line, *_),) = seen
    assert (str(message), category, path) == ("theirs", UserWarning, __file__) and line > 0


def test_those_of_the_kernels_are_one_line_too(shown, capsys):
    warnings.warn("a smaller tile is taken", KernelWarning, stacklevel=1)
    assert capsys.readouterr().err == "Warning: a smaller tile is taken\n"


def test_filters_of_the_user_count(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        notices.show_in_one_line()
        leaky(0)
    assert capsys.readouterr().err == ""


def test_cannot_steer_a_terminal(shown, capsys):
    notices.notice("a\x1b[2Jb\nc")
    assert capsys.readouterr().err == "Warning: a\\x1b[2Jb\\nc\n"


@pytest.mark.slow
def test_all_go_one_way():
    """Any other `warnings.warn` would show a path and a line of the source."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("kernels/**/*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warnings.warn_explicit")
        if "KernelWarning" not in map(ast.unparse, node.args)  # shown in one line too
    ]
    assert [place for place in found if not place.startswith("src/longmix/notices.py")] == []
