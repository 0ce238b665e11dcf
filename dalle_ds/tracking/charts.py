"""Charts for MLflow's page: curves, gradient scales over time, loss by position in the image."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from dalle_ds.figures import drawn, new_figure


def curves(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str = "update",
    y_label: str = "",
    log_y: bool = False,
) -> Image.Image:
    """Line chart of named series.

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
        axes.plot(x, y, label=name, linewidth=1.5, marker="." if len(x) < 30 else None)
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
    """Line chart of log2 of the gradient scales over time: one line per residual block, coloured from the first to the last.

    Args:
        scales: block name -> scale at each of `updates`, in the order of the blocks. A scale of 0, Inf or NaN leaves a gap.

    Raises:
        ValueError: a block has more or fewer scales than there are updates.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(scales)))
    for colour, (name, values) in zip(colours, scales.items(), strict=True):
        if len(values) != len(updates):
            raise ValueError(f"block {name!r} has {len(values)} scales for {len(updates)} updates")
        with np.errstate(all="ignore"):
            powers = np.log2(np.array(values, dtype=np.float64))
        powers[~np.isfinite(powers)] = np.nan
        axes.plot(updates, powers, color=colour, linewidth=1.0 if len(scales) > 12 else 2.0, label=name)
    axes.set(title=title, xlabel="update", ylabel="log2(scale)")
    axes.grid(alpha=0.25)
    if len(scales) > 12:  # too many for a legend
        mapping = ScalarMappable(Normalize(0, len(scales) - 1), colormaps["viridis"])
        figure.colorbar(mapping, ax=axes, label="residual block, from input to output")
    elif scales:
        axes.legend(frameon=False, fontsize=8, ncols=2)
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
