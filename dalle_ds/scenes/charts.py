"""Charts of a score: bars by category, and a sheet of the images with their verdicts."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dalle_ds.figures import drawn, new_figure
from dalle_ds.scenes.meaning import CATEGORIES, Split
from dalle_ds.scenes.score import Judged, Report

SPLIT_COLOURS: Final[dict[Split, str]] = {"training": "#9aa0a6", "seen": "#3b6fd4", "zero_shot": "#e0802f"}
RIGHT, WRONG = (46, 160, 67), (207, 34, 46)  # frames of the sheet
INK = (32, 33, 36)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_FRAME, _TILE, _COLUMNS, _GAP, _LINE, _HEAD = 3, 128, 10, 6, 13, 26


def score_chart(report: Report, reconstructed: Report | None = None) -> Image.Image:
    """Bars of the shares of right images, with intervals; dots are chance levels, and dashes are real scenes through a dVAE."""
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
        if reconstructed is not None and split in reconstructed.rows:
            real = {**reconstructed.rows[split], "mean": reconstructed.means[split]}
            values = [real[name].value if name in real else np.nan for name in names if name in shares]
            axes.plot(at, values, "_", color="black", markersize=16, label="reconstructed" if n == 0 else None)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set(ylabel="right images", ylim=(0, 1.05), title="Scenes: every object right, and nothing else")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn(figure)


def judged_sheet(images: Sequence[Image.Image], judged: Sequence[Judged], title: str) -> Image.Image:
    """The images in rows of ten, enlarged, with caption and faults below, each in a green frame if right, else in a red one."""
    font, side = ImageFont.load_default(11), _TILE + 2 * _FRAME
    texts = [_lines_of(one, font, side) for one in judged]
    rows = [slice(first, first + _COLUMNS) for first in range(0, len(images), _COLUMNS)]
    heights = [side + _LINE * max(map(len, texts[row])) + _GAP for row in rows]
    sheet = Image.new("RGB", (_COLUMNS * (side + _GAP), _HEAD + sum(heights)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 4), title, INK, ImageFont.load_default(14))
    y = _HEAD
    for row, height in zip(rows, heights, strict=True):
        for column, (image, one, lines) in enumerate(zip(images[row], judged[row], texts[row], strict=True)):
            x = column * (side + _GAP)
            sheet.paste(RIGHT if one.verdict.is_right else WRONG, (x, y, x + side, y + side))
            enlarging = image.width < _TILE
            tile = image.resize((_TILE, _TILE), Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS)
            sheet.paste(tile, (x + _FRAME, y + _FRAME))
            for k, (line, ink) in enumerate(lines):
                draw.text((x, y + side + k * _LINE), line, ink, font)
        y += height
    return sheet


def _lines_of(one: Judged, font: Font, width: int) -> list[tuple[str, tuple[int, int, int]]]:
    """The caption, wrapped, and the faults, each line with its colour."""
    lines = [(line, INK) for line in _wrapped(one.caption, font, width)]
    return lines if one.verdict.is_right else [*lines, (", ".join(one.verdict.faults), WRONG)]


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _in_order(shares: dict, names: Sequence[str]) -> list:
    return [shares[name] for name in names if name in shares]
