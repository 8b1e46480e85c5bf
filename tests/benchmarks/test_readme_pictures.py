"""The README's pictures come from the results that are committed."""

import json

import pytest
from matplotlib import image

from benchmarks import pictures
from benchmarks.command import RESULTS


def test_lines_are_in_the_order_of_x():
    rows = [{"mixer": name, "x": x, "y": 10 * x} for name, x in (("a", 3), ("b", 1), ("a", 2))]
    found = [(line.name, line.x, line.y) for line in pictures.series(rows, "x", "y")]
    assert found == [("a", [2, 3], [20, 30]), ("b", [1], [10])]


def test_needles_have_their_places():
    run = json.loads((RESULTS / "needle_cpu_2026-11-21.json").read_text())["runs"][1]
    found = pictures.needle_map(run)
    assert found.lengths == [128, 256, 512, 1024] and found.depths == [0, 0.25, 0.5, 0.75, 1]
    for cell in run["cells"]:
        place = found.depths.index(cell["depth"]), found.lengths.index(cell["seq_len"])
        assert found.accuracy[place[0]][place[1]] == cell["accuracy"]


@pytest.mark.parametrize("name", pictures.pictures(RESULTS))
def test_draws_what_is_asked_for(tmp_path, capsys, name):
    assert pictures.main([name, "--out", str(tmp_path / "new")]) == 0
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == f"{name}.png" and image.imread(path).std() > 0
    assert capsys.readouterr().out == f"written: {path}\n"


def test_an_unknown_picture_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        pictures.main(["nothing"])
    assert "there is no picture nothing" in capsys.readouterr().err
