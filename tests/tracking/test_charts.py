"""Charts show the values that they get."""

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from dalle_ds.tracking.charts import MAX_POINTS, curves, gradient_scales, position_heatmap, thinned
from dalle_ds.training.dvae.metrics import usage_chart


def pixels(image):
    return np.asarray(image).astype(int)


def near(image, colour):
    """Mask of the pixels with about this colour (components 0 to 1)."""
    return np.abs(pixels(image) - np.array(colour[:3]) * 255).sum(-1) < 40


def test_curves_draw_each_series():
    one = pixels(curves("loss", {"train": ([0, 1], [1.0, 1.0])}))
    two = pixels(curves("loss", {"train": ([0, 1], [1.0, 1.0]), "validation": ([0, 1], [2.0, 1.5])}))
    assert one.shape == two.shape and (one != two).any()
    series = {"x": ([0, 1, 2], [1, 10, 100])}
    assert (pixels(curves("a", series, log_y=True)) != pixels(curves("a", series))).any()
    with pytest.raises(ValueError, match="'train' has 2 x values and 3 y values"):
        curves("loss", {"train": ([0, 1], [1, 2, 3])})


def test_scales_are_shown_as_powers_of_two():
    # equal steps of the power (13, 20, 27) must be equal distances in the chart
    chart = gradient_scales(list(range(40)), {f"block {power}": [2.0**power] * 40 for power in (13, 20, 27)})
    heights = []
    for place in (0.0, 0.46, 0.92):
        found = near(chart, colormaps["viridis"](place)).sum(1) > 300  # a line over most of the width, no legend
        assert found.any()
        heights.append(np.nonzero(found)[0].mean())
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=1.5)
    assert heights[0] > heights[1]  # larger scales are higher in the chart


def test_many_blocks_and_bad_scales_are_drawn():
    scales = np.exp2(np.arange(128)[:, None] % 24 + np.zeros((1, 30)))
    scales[3, 5], scales[4, 6], scales[5, 7] = 0, np.inf, np.nan
    lines = {f"block {i}": row for i, row in enumerate(scales.tolist())}
    assert len(np.unique(pixels(gradient_scales(range(30), lines)).reshape(-1, 3), axis=0)) > 100
    with pytest.raises(ValueError, match="'block 0' has 30 scales for 29 updates"):
        gradient_scales(range(29), lines)


def test_no_line_has_more_points_than_the_chart_shows(monkeypatch):
    drawn = []
    plot, collect = Axes.plot, LineCollection.set_segments
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **options: (drawn.append(len(x)), plot(axes, x, y, **options))[1])
    monkeypatch.setattr(
        LineCollection, "set_segments", lambda lines, segments: (drawn.extend(map(len, segments)), collect(lines, segments))[1]
    )
    n = 43_000
    gradient_scales(range(n), {f"block {i}": np.full(n, 2.0**i) for i in range(20)})
    gradient_scales(range(n), {f"block {i}": np.full(n, 2.0**i) for i in range(3)})
    curves("loss", {"train": (range(n), np.ones(n))})
    assert drawn == [MAX_POINTS] * 24
    assert thinned(n)[[0, -1]].tolist() == [0, n - 1] and thinned(7).tolist() == list(range(7)) and not len(thinned(0))


def test_many_lines_have_their_powers_and_gaps(monkeypatch):
    drawn = []
    collect = LineCollection.set_segments
    monkeypatch.setattr(
        LineCollection, "set_segments", lambda lines, segments: (drawn.extend(segments), collect(lines, segments))[1]
    )
    scales = {f"block {power}": [2.0**power, 0.0, 2.0**power] for power in range(13)}
    gradient_scales([10, 20, 40], scales)
    for power, line in enumerate(drawn):
        assert np.array_equal(line, [[10, power], [20, np.nan], [40, power]], equal_nan=True)
    assert len(drawn) == 13


def test_use_of_codes_is_one_outline_from_the_most_to_the_least_used(monkeypatch):
    patches = []
    add = Axes.add_patch
    monkeypatch.setattr(Axes, "add_patch", lambda axes, patch: (patches.append(patch), add(axes, patch))[1])
    counts = np.zeros(8192, dtype=int)
    counts[1::2] = np.arange(1, 4097)
    usage_chart(counts, "use")
    (outline,) = patches
    values, edges, _ = outline.get_data()
    assert len(values) == MAX_POINTS and values[0] == 4096 and values[-1] == 0 and (np.diff(values) <= 0).all()
    assert edges[0] == -0.5 and edges[-1] == 8191.5
    assert (values[edges[:-1] > 4096] == 0).all(), "half of the codes are unused"


def test_the_map_keeps_rows_down_and_columns_across():
    values = np.zeros((4, 4))
    values[0, 3] = 1.0  # upper right
    chart = position_heatmap(values, "x")
    bright = near(chart, colormaps["viridis"](1.0))
    bright[:, chart.width * 3 // 4 :] = False  # without the colour bar
    y, x = (index.mean() for index in np.nonzero(bright))
    assert y < chart.height / 3 and x > chart.width * 0.45
    assert (pixels(position_heatmap(values, "x", diverging=True)) != pixels(chart)).any()
    with pytest.raises(ValueError, match="expected \\(rows, columns\\)"):
        position_heatmap(np.zeros(4), "x")
