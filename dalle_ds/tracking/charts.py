"""Charts for MLflow's page: curves, gradient scales over time, loss by position in the image."""

# B residual blocks, T points in time, G rows and columns of the image tokens

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from dalle_ds.figures import drawn, new_figure

MAX_POINTS = 500
"""Maximum number of points of a line: about as many as the chart has pixels across."""
FEW = 12
"""Maximum number of lines with a legend."""


def thinned(n: int) -> np.ndarray:
    """At most MAX_POINTS of the indices 0 ... n - 1, at equal distances, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, MAX_POINTS)).round().astype(int))


def curves(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str = "update",
    y_label: str = "",
    log_y: bool = False,
) -> Image.Image:
    """Line chart of named series, with at most MAX_POINTS points of each.

    Args:
        series: name -> (x values, y values).

    Raises:
        ValueError: x and y of a series differ in length.
    """
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    for name, (x, y) in series.items():
        if len(x) != len(y):
            raise ValueError(f"curve {name!r} has {len(x)} x values and {len(y)} y values")
        kept = thinned(len(x))
        axes.plot(np.asarray(x)[kept], np.asarray(y)[kept], label=name, linewidth=1.5, marker="." if len(x) < 30 else None)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(frameon=False)
    return drawn(figure)


def gradient_scales(
    updates: Sequence[int], scales: Mapping[str, Sequence[float]], title: str = "Gradient scales"
) -> Image.Image:
    """Line chart of log2 of the gradient scales over time: one line per residual block, coloured from the first to the last,
    with at most MAX_POINTS points.

    Args:
        scales: block name -> scale at each of `updates`, in the order of the blocks. A scale of 0, Inf or NaN leaves a gap.

    Raises:
        ValueError: a block has more or fewer scales than there are updates.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize

    for name, values in scales.items():
        if len(values) != len(updates):
            raise ValueError(f"block {name!r} has {len(values)} scales for {len(updates)} updates")
    kept = thinned(len(updates))
    x_T = np.asarray(updates, dtype=np.float64)[kept]
    with np.errstate(all="ignore"):
        powers_BT = np.log2(np.array([np.asarray(values, dtype=np.float64)[kept] for values in scales.values()]))
    powers_BT[~np.isfinite(powers_BT)] = np.nan
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(scales)))
    if len(scales) > FEW:  # one artist: 128 lines take 0.1 s, and 0.9 s as artists of their own
        lines = [np.column_stack([x_T, powers_T]) for powers_T in powers_BT]
        axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.0))
        axes.autoscale_view()
        mapping = ScalarMappable(Normalize(0, len(scales) - 1), colormaps["viridis"])
        figure.colorbar(mapping, ax=axes, label="residual block, from input to output")
    elif scales:
        for colour, name, powers_T in zip(colours, scales, powers_BT, strict=True):
            axes.plot(x_T, powers_T, color=colour, linewidth=2.0, label=name)
        axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.set(title=title, xlabel="update", ylabel="log2(scale)")
    axes.grid(alpha=0.25)
    return drawn(figure)


def position_heatmap(
    values_GG: np.ndarray,
    title: str = "Validation image loss by position",
    label: str = "nats per image token",
    *,
    diverging: bool = False,
) -> Image.Image:
    """Heatmap over the grid of image tokens, first row at the top.

    Args:
        diverging: use a colour map centred on zero.

    Raises:
        ValueError: `values_GG` is not two-dimensional.
    """
    if values_GG.ndim != 2:
        raise ValueError(f"values have shape {values_GG.shape}, expected (rows, columns)")
    figure = new_figure(5.2, 4.4)
    axes = figure.add_subplot()
    reach = float(np.nanmax(np.abs(values_GG))) or 1.0
    options = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach} if diverging else {"cmap": "viridis"}
    image = axes.imshow(values_GG, interpolation="nearest", **options)
    axes.set(title=title, xlabel="column", ylabel="row")
    figure.colorbar(image, ax=axes, label=label)
    return drawn(figure)
