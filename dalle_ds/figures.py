"""Matplotlib figures without pyplot. Pyplot's figures are global state, and charts are drawn while other threads run.

Matplotlib is imported when the first figure is created: only one rank draws charts, and start-up without the import is a third
of a second shorter.
"""

from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, `width` x `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def drawn(figure: "Figure", dpi: int = DPI) -> Image.Image:
    """Render the figure to an RGB image."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")
