"""Pictures replace older ones in one step."""

import pytest

from longmix.errors import StorageError
from longmix.reporting.plots import new_figure, save_figure


def test_a_picture_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.png"
    save_figure(new_figure(1)[0], path)
    before = path.read_bytes()
    figure = new_figure(1)[0]

    def half(place, **_):
        place.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(place))

    figure.savefig = half
    with pytest.raises(StorageError, match="No space left"):
        save_figure(figure, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.png"]
