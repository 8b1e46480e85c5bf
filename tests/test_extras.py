"""Extras: what a message or a page tells to install exists, spelled as every pip understands it."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"(?:longmix|\.)\[([a-zA-Z][\w.,\s-]*)\]'")
"""As in `pip install 'longmix[NAME]'` and `pip install -e '.[NAME,OTHER]'`."""

EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def named_extras() -> dict[str, set[str]]:
    """Each extra that a file of the project names, with the files."""
    found: dict[str, set[str]] = {}
    folders = ("src", "kernels", "configs", "docs", "benchmarks", "examples", "tests", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in [*files, *ROOT.glob("*.md"), *ROOT.glob("*.py")]:
        if path.suffix in (".py", ".md", ".yaml", ".yml", ".sh", "") and path != Path(__file__):
            for names in NAMED.findall(path.read_text(encoding="utf-8", errors="ignore")):
                for name in names.split(","):
                    found.setdefault(name.strip(), set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_extra_that_is_named_exists_as_spelled():
    named = named_extras()
    assert {"interop", "lm-eval", "test"} <= set(named)
    assert {name: files for name, files in named.items() if name not in EXTRAS} == {}


@pytest.mark.parametrize("name", sorted(EXTRAS))
def test_an_extra_has_its_normal_name(name):
    """Before 23.3, pip takes a name as it is spelled, and the metadata hold the normal one."""
    assert name == re.sub(r"[-_.]+", "-", name).lower()
