"""Pictures replace older ones in one step, and words in them cover no curve."""

import numpy as np
import pytest

from longmix.errors import StorageError
from longmix.reporting.plots import draw_curves, draw_trained, drawing, lay_out, new_figure, save_figure


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


@drawing()
@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize(("heights", "top"), [([1.0, 0.9], False), ([0.1, 0.5], True), ([0.5, 1.0, 0.0], True)])
def test_the_word_at_the_trained_length_covers_no_curve(heights, top, log_x):
    figure, (axes,) = new_figure(1)
    lengths = [32, 64, 128, 256]
    curves = {str(height): (lengths, [height, height, 0.9 * height, 0.8 * height]) for height in heights}
    draw_curves(axes, curves, log_x=log_x, names=False)
    axes.set_ylim(-0.02, 1.05 if not top else 1.3)
    draw_trained(axes, 32)
    lay_out(figure)
    (word,) = axes.texts
    box = word.get_window_extent()
    for line in axes.lines[: len(curves)]:
        points = axes.transData.transform(line.get_xydata())
        places = np.linspace(box.x0, box.x1, 50)
        ups = np.interp(places, points[:, 0], points[:, 1])
        assert not ((ups > box.y0) & (ups < box.y1)).any()
    assert (word.xy[1] == 1) is top
