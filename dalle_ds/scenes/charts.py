"""Charts of a score: bars by category, and a sheet of the images with their verdicts."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image

from dalle_ds.figures import drawn, new_figure
from dalle_ds.scenes.meaning import CATEGORIES, Split
from dalle_ds.scenes.score import Judged, Report

SPLIT_COLOURS: Final[dict[Split, str]] = {"training": "#9aa0a6", "seen": "#3b6fd4", "zero_shot": "#e0802f"}
RIGHT, WRONG = (46, 160, 67), (207, 34, 46)  # frames of the sheet
_FRAME, _TILE, _COLUMNS = 3, 96, 12


def score_chart(report: Report, ceiling: Report | None = None) -> Image.Image:
    """Bars of the shares of right images, with intervals; dots are chance levels, and dashes are the ceiling."""
    names = (*CATEGORIES, "mean")
    splits = list(report.rows)
    figure = new_figure(10, 4.2)
    axes = figure.subplots()
    width = 0.8 / len(splits)
    for n, split in enumerate(splits):
        shares = {**report.rows[split], "mean": report.means[split]}
        at = [i + (n - (len(splits) - 1) / 2) * width for i, name in enumerate(names) if name in shares]
        values, low, high = (np.array([getattr(s, key) for s in _in_order(shares, names)]) for key in ("value", "low", "high"))
        errors = np.abs([values - low, high - values])
        axes.bar(at, values, width * 0.92, yerr=errors, capsize=3, color=SPLIT_COLOURS[split], label=split.replace("_", "-"))
        chances = [np.nan if share.chance is None else share.chance for share in _in_order(shares, names)]
        axes.plot(at, chances, "o", color="black", markersize=4, label="chance" if n == 0 else None)
        if ceiling is not None and split in ceiling.rows:
            tops = {**ceiling.rows[split], "mean": ceiling.means[split]}
            values = [tops[name].value if name in tops else np.nan for name in names if name in shares]
            axes.plot(at, values, "_", color="black", markersize=16, label="ceiling" if n == 0 else None)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set(ylabel="right images", ylim=(0, 1.05), title="Scenes: every object right, and nothing else")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn(figure)


def judged_sheet(images: Sequence[Image.Image], judged: Sequence[Judged]) -> Image.Image:
    """The images in rows of twelve, enlarged, each in a green frame where it is right, else in a red one."""
    side = _TILE + 2 * _FRAME
    rows = -(-len(images) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (side + 2), rows * (side + 2)), (255, 255, 255))
    for n, (image, one) in enumerate(zip(images, judged, strict=True)):
        tile = Image.new("RGB", (side, side), RIGHT if one.verdict.is_right else WRONG)
        enlarging = image.width < _TILE
        tile.paste(
            image.resize((_TILE, _TILE), Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS), (_FRAME, _FRAME)
        )
        sheet.paste(tile, (n % _COLUMNS * (side + 2), n // _COLUMNS * (side + 2)))
    return sheet


def _in_order(shares: dict, names: Sequence[str]) -> list:
    return [shares[name] for name in names if name in shares]
