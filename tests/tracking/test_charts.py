"""Charts show the values that they get."""

import numpy as np
import pytest
from matplotlib import colormaps

from dalle_ds.tracking.charts import curves, gradient_scales, position_heatmap


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
