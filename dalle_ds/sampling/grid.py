"""An image grid with captions."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from dalle_ds.sampling.lettering import Lettering, say_missing_letters

MARGIN, GAP = 24, 8
# Grey background: the border of an image with a white background, like most images of the demo, must be visible.
PAPER, INK, FAINT = (240, 241, 243), (32, 33, 36), (96, 101, 106)


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    *,
    title: str = "",
    column_titles: Sequence[str] = (),
    labels: Sequence[Sequence[str]] = (),
    smallest: int = 128,
) -> Image.Image:
    """Draw rows of images with each row's caption below it. Rows of a single image are placed side by side.

    Args:
        rows: images of one size, equally many in each row.
        captions: one per row.
        column_titles: titles above the columns, drawn if there is more than one column.
        labels: short text below each image, such as its score; "" for none.
        smallest: side in pixels; images with a shorter side are enlarged to it.

    Raises:
        ValueError: no images, rows of unequal length, or not one caption per row.
    """
    if not rows or len({len(row) for row in rows}) != 1 or len(rows) != len(captions):
        raise ValueError(f"rows of {[len(row) for row in rows]} images with {len(captions)} captions: expected equal rows")
    rows = [[_enlarged(image, smallest) for image in row] for row in rows]
    side = rows[0][0].width
    font = Lettering(max(15, side // 10))
    say_missing_letters([title, *captions])
    labels = labels or [()] * len(rows)
    width = len(rows[0]) * (side + GAP) - GAP
    cells = [_captioned(*cell, font, width) for cell in zip(rows, captions, labels, strict=True)]
    if len(rows[0]) == 1:
        n_columns = _columns_for(len(cells))
    else:
        n_columns = 1 if len(rows[0]) > 4 or len(rows) < 6 else 2
    lines = [cells[start : start + n_columns] for start in range(0, len(cells), n_columns)]
    header = _header(title, column_titles if len(rows[0]) > 1 else (), side, n_columns, cells[0].width, font)
    return _stacked(header, lines)


def _captioned(images: Sequence[Image.Image], caption: str, labels: Sequence[str], font: Lettering, width: int) -> Image.Image:
    lines, small = _wrapped(caption, font, width), _small(font)
    line_height, labels_height = round(font.size * 1.3), round(small.size * 1.4) if any(labels) else 0
    top = images[0].height + 6 + labels_height
    cell = Image.new("RGB", (width, top + line_height * len(lines)), PAPER)
    draw = ImageDraw.Draw(cell)
    for column, image in enumerate(images):
        cell.paste(image, (column * (image.width + GAP), 0))
    for column, label in enumerate(labels):
        small.draw(draw, (column * (images[0].width + GAP), images[0].height + 4), label, FAINT)
    for number, line in enumerate(lines):
        font.draw(draw, (0, top + number * line_height), line, INK)
    return cell


def _small(font: Lettering) -> Lettering:
    return Lettering(max(12, round(font.size * 0.8)))


def _wrapped(text: str, font: Lettering, width: int, at_most: int = 3) -> list[str]:
    """Wrap text into at most `at_most` lines; a longer text ends with an ellipsis. A word wider than a line is broken."""
    shown = text[: at_most * width]  # no letter is narrower than a pixel, and measuring a megabyte takes minutes
    lines = [""]
    for word in shown.split() or [""]:
        longer = f"{lines[-1]} {word}".strip()
        if font.length(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.length(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > at_most or len(shown) < len(text):
        last = lines[:at_most][-1]
        while last and font.length(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[:at_most][:-1], f"{last.rstrip()}..."]
    return lines


def _header(
    title: str, column_titles: Sequence[str], side: int, n_columns: int, cell_width: int, font: Lettering
) -> Image.Image | None:
    if not title and not column_titles:
        return None
    large, small = Lettering(round(font.size * 1.3)), _small(font)
    width = n_columns * (cell_width + MARGIN) - MARGIN
    title_lines = _wrapped(title, large, width) if title else []
    title_height = round(large.size * 1.35) * len(title_lines)
    titles_height = round(small.size * 1.6) if column_titles else 0
    header = Image.new("RGB", (width, title_height + titles_height), PAPER)
    draw = ImageDraw.Draw(header)
    for number, line in enumerate(title_lines):
        large.draw(draw, (0, number * round(large.size * 1.35)), line, INK)
    for repeat in range(n_columns if column_titles else 0):
        for column, text in enumerate(column_titles):
            x = repeat * (cell_width + MARGIN) + column * (side + GAP)
            small.draw(draw, (x, title_height), _wrapped(text, small, side, at_most=1)[0], FAINT)
    return header


def _stacked(header: Image.Image | None, lines: Sequence[Sequence[Image.Image]]) -> Image.Image:
    heights = [max(cell.height for cell in line) for line in lines]
    width = max(sum(cell.width + MARGIN for cell in line) for line in lines) + MARGIN
    header_height = header.height if header else 0
    sheet = Image.new("RGB", (width, MARGIN + header_height + sum(height + MARGIN for height in heights)), PAPER)
    if header:
        sheet.paste(header, (MARGIN, MARGIN))
    y = MARGIN + header_height
    for line, height in zip(lines, heights, strict=True):
        x = MARGIN
        for cell in line:
            sheet.paste(cell, (x, y))
            x += cell.width + MARGIN
        y += height + MARGIN
    return sheet


def _enlarged(image: Image.Image, smallest: int) -> Image.Image:
    short = min(image.size)
    if short >= smallest:
        return image
    factor = smallest / short
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def _columns_for(n: int) -> int:
    """Number of columns for `n` cells, chosen so that the grid is somewhat wider than high."""
    columns = 1
    while columns * columns * 0.7 < n:
        columns += 1
    return min(columns, n)
