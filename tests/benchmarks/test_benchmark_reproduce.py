"""Each section of the results has a name in `benchmarks/reproduce.yaml`, with commands that exist and their files."""

import importlib
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import reproduce
from benchmarks.results import ROOT
from longmix.composing import composed
from longmix.errors import ConfigError

RESULTS = reproduce.read_results()


def anchors(page: str, levels: str = "#{1,6}") -> list[str]:
    """Anchors of a page's headings of these levels, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(rf"^{levels} (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_each_section_of_the_results_has_one_name_and_each_name_a_section():
    pages = [page for result in RESULTS.values() for page in result.pages]
    own = [page.partition("#")[2] for page in pages if page.startswith("docs/results.md#")]
    assert sorted(own) == sorted(anchors("docs/results.md", "#{2,3}"))
    for page in pages:
        name, _, anchor = page.partition("#")
        assert anchor in anchors(name), page


def test_each_picture_of_readme_and_results_has_a_name_and_stands_on_its_page():
    for result in RESULTS.values():
        shown = "\n".join(Path(ROOT / page.partition("#")[0]).read_text() for page in result.pages)
        others = "\n".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
        for picture in result.pictures:
            name = Path(picture).name
            assert name in shown or (result.name == "first_runs" and name in others), picture
    known = {Path(picture).name for result in RESULTS.values() for picture in result.pictures}
    for page in ("README.md", "docs/results.md"):
        assert set(re.findall(r"!\[[^]]*\]\((?:\S*/)?([^/)]+)\)", (ROOT / page).read_text())) <= known


@pytest.mark.parametrize("name", RESULTS)
def test_committed_files_are_there_and_of_their_commands(name):
    assert reproduce.faults(RESULTS[name], RESULTS) == []


def files_of(result: reproduce.Result, root: Path) -> None:
    for path in (*result.files, *result.pictures):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes((ROOT / path).read_bytes())


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("mixers", ("--steps 800", "--steps 900"), "steps was 800 and is 900"),
        ("mixers", ("benchmarks.mixers", "benchmarks.claims"), "it is of mixers and not of claims"),
        ("state_tracking", ("householders=2", "householders=3"), "it is of gated_deltaproduct householders=2"),
        ("decode", (" --compile", ""), "compile was given and is not"),
        ("decode", ("--prefills 9", "--check --prefills 9"), "check was not given and is 1"),
        ("lla", ("--keys 32 64", "--keys 32 65"), "keys was 32 64 128 256 and is 32 65 128 256"),
        ("state_tracking", ("parity=100", "parity=150"), "task was parity=100 and is parity=150"),
        (
            "mqar",
            ("mixer=kda", "mixer=gla"),
            "experiment=mqar max_steps=800 mixer.num_heads=1 mixer=kda is of no command",
        ),
        (
            "shootout",
            ("seq_len=2048,8192", "seq_len=2048"),
            "max_tokens=401408 mixer=flash seq_len=8192 is of no command",
        ),
        ("needles", ("parameters=130000", "parameters=140000"), "is of no command"),
        ("short_runs", ("seed=0,1", "seed=0"), "mixer=routing seed=1 seq_len=2048 trainer=cpu is of no command"),
    ],
)
def test_a_file_of_another_command_is_found(name, change, fault):
    result = RESULTS[name]
    assert any(change[0] in command for command in result.commands)
    other = replace(result, commands=[command.replace(*change) for command in result.commands])
    found = reproduce.faults(other, {name: other})
    assert found and any(fault in line for line in found), found


def test_a_missing_file_and_a_file_of_others_alone_are_found(tmp_path):
    result = RESULTS["lla"]
    files_of(result, tmp_path)
    assert reproduce.faults(result, {"lla": result}, tmp_path) == []
    (tmp_path / result.files[0]).unlink()
    assert reproduce.faults(result, {"lla": result}, tmp_path) == [f"{result.files[0]} is missing"]
    first, long = RESULTS["first_runs"], RESULTS["long_runs"]
    nothing = replace(first, commands=["python train.py mixer=gla"])
    (fault,) = reproduce.faults(
        nothing, {"first_runs": nothing, "all": replace(long, commands=long.commands + first.commands)}
    )
    assert fault.endswith("nothing in it is of the commands of first_runs")


def test_a_file_without_words_is_of_no_command(tmp_path):
    (tmp_path / "some.json").write_text(json.dumps({"runs": [{"mixer": "flash"}]}))
    result = replace(RESULTS["needles"], files=["some.json"], pictures=[])
    assert "says of no run which words it had" in reproduce.faults(result, {"needles": result}, tmp_path)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_commands_are_understood(name):
    for command in RESULTS[name].commands:
        program, *rest = shlex.split(command)[1:]
        if program == "train.py":
            for words in reproduce._expanded(command):
                composed("train", [re.sub(r"\$\(.*\)", "library", word) for word in words])
        elif program == "evaluate.py":
            composed("evaluate", rest)
        else:
            module = importlib.import_module(rest[0])
            if rest[0] != "benchmarks.pictures":
                module.parse(rest[1:])


def test_lists_prints_and_refuses(capsys):
    assert reproduce.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and page in listed for name, result in RESULTS.items() for page in result.pages)
    assert reproduce.main(["lla", "--print"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("python -m benchmarks.lla --dims 4 8 --keys 32 64 128 256 --seeds 10\n")
    assert "# leaves what is in benchmarks/results/lla_cpu_2026-11-29_22-47-44.json" in printed
    assert reproduce.main(["--check", "lla"]) == 0
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["nothing"])
    assert "there is no result nothing" in capsys.readouterr().err


def test_commands_run_until_one_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    result = replace(RESULTS["lla"], commands=["touch first", "exit 3", "touch second"])
    assert reproduce.run(result) == 3 and [path.name for path in tmp_path.iterdir()] == ["first"]
    assert reproduce.run(replace(result, commands=["touch second"])) == 0 and (tmp_path / "second").exists()


def test_an_entry_that_lacks_something_is_named(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("mine:\n  pages: []\n")
    with pytest.raises(ConfigError, match=r"some\.yaml: mine: .*missing"):
        reproduce.read_results(path)
