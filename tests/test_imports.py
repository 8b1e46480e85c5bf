"""Imports go one way: rooms stand in an order, none imports a later one, and modules make no circle.

Imports within functions count, those for types alone do not.
"""

import ast
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/longmix"

ORDER = (
    "longmix",
    "errors",
    "paths",
    "locks",
    "files",
    "distributed",
    "invocation",
    "naming",
    "printable",
    "notices",
    "console",
    "startup",
    "allocation",
    "machine_memory",
    "aliases",
    "wording",
    "config",
    "command_line",
    "cli",
    "reading",
    "metrics",
    "progress",
    "versions",
    "composing",
    "checkpoints",
    "batch",
    "data",
    "pytrees",
    "recipe",
    "caches",
    "mixers",
    "model",
    "trust",
    "restore",
    "share",
    "generation",
    "accelerators",
    "reporting",
    "analysis",
    "evaluation",
    "conversion",
    "training",
    "api",
    "entry_points",
    "__main__",
    "interop",
    "planning",
)
"""Every folder and module right below src/longmix: each imports only what stands before it. `longmix` is its
`__init__`."""


def modules(source: Path) -> dict[str, Path]:
    """Files by the names of their modules."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Each import: the module, and the names that are taken from it. `if TYPE_CHECKING:` is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name their module in full"
            yield node.module or "", [alias.name for alias in node.names]
        else:
            yield from imports(node)


def arrows(source: Path) -> dict[str, set[str]]:
    """For each module those of the same package that it imports."""
    files = modules(source)
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        targets = set()
        for base, names in imports(ast.parse(path.read_text(encoding="utf-8"))):
            inner = {f"{base}.{name}" for name in names} & files.keys()
            outer = {base} if len(inner) < max(len(names), 1) else set()  # the package itself, if only it has a name
            targets |= inner | (outer & files.keys())
        found[module] = targets - {module}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def upward(source: Path, order: Sequence[str]) -> list[str]:
    """Imports of a room that stands later."""
    place = {name: number for number, name in enumerate(order)}
    return [
        f"{module} imports {target}"
        for module, targets in arrows(source).items()
        for target in sorted(targets)
        if place[room(target)] > place[room(module)]
    ]


def circle(source: Path) -> list[str]:
    """Modules that import each other in a circle; none if there is no such."""
    try:
        TopologicalSorter(arrows(source)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_room_has_its_place():
    assert sorted(ORDER) == sorted({room(module) for module in modules(SOURCE)})


def test_no_import_goes_up():
    assert upward(SOURCE, ORDER) == []


def test_no_circle():
    assert circle(SOURCE) == []


@pytest.mark.parametrize(
    ("text", "up", "round_"),
    [
        ("", [], False),
        ("from package import b", ["package.a imports package.b"], True),
        ("from package.b import thing", ["package.a imports package.b"], True),
        ("import package.b", ["package.a imports package.b"], True),
        ("def late():\n    from package.b import thing", ["package.a imports package.b"], True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.b import thing", [], False),
    ],
)
def test_what_goes_up_is_found(tmp_path, text, up, round_):
    folder = tmp_path / "package"
    folder.mkdir()
    for name, content in {"__init__": "", "a": text, "b": "from package.a import thing"}.items():
        (folder / f"{name}.py").write_text(content)
    assert upward(folder, ["package", "a", "b"]) == up
    assert bool(circle(folder)) is round_
