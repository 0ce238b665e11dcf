"""The image grid of a folder of samples, grid.png: one row per caption, with real images or the image prompt for comparison."""

from PIL import Image
from torch import Tensor

from dalle_ds.models.dvae import DVAE
from dalle_ds.sampling.decode import decode_images, partial_images
from dalle_ds.sampling.grid import image_grid
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.sampler import Candidate
from dalle_ds.sampling.settings import SamplingConfig

MAX_CAPTIONS, MAX_IMAGES = 64, 32
"""Maximum number of captions, and of images per caption, in the grid."""
MAX_PIXELS = 64 * 2**20  # of the grid: fewer captions are shown if images are large
SPACE = 16  # between images, about


class SampleSheet:
    """Collects the first images of the first captions, and draws the grid."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._rows: list[list[tuple[Candidate, Image.Image]]] = []

    def add(self, candidate: Candidate, image: Image.Image) -> None:
        """Add the next image. Images must be added caption by caption."""
        caption = candidate.index.caption
        cell = (image.width + SPACE) * (image.height + SPACE)
        if caption >= max(1, min(MAX_CAPTIONS, MAX_PIXELS // (cell * min(self._request.settings.n_kept, MAX_IMAGES)))):
            return
        if caption == len(self._rows):
            self._rows.append([])
        if len(self._rows[caption]) < MAX_IMAGES:
            self._rows[caption].append((candidate, image))

    def draw(self, dvae: DVAE, real_codes_CN: Tensor | None = None) -> Image.Image:
        """Draw the grid. Columns: the decoded real image, the image prompt and its kept rows (if given), then the samples.

        The samples are labelled with their scores.
        """
        image_prompt, n_rows = self._request.image_prompt, len(self._rows)
        leading: list[tuple[str, list[Image.Image]]] = []  # columns before the samples
        if real_codes_CN is not None:
            leading.append(("real image, decoded", decode_images(dvae, real_codes_CN[:n_rows])))
        if image_prompt is not None:
            top = partial_images(dvae, image_prompt.codes_N[None], image_prompt.rows)
            leading += [("image prompt", [image_prompt.image] * n_rows), (f"kept: {image_prompt.rows} rows", top * n_rows)]
        columns = [title for title, _ in leading]
        columns += [f"sample {k + 1}" for k in range(len(self._rows[0]))] if leading else []
        images = [[*(column[c] for _, column in leading), *(image for _, image in row)] for c, row in enumerate(self._rows)]
        labels = [[*([""] * len(leading)), *(_label(candidate) for candidate, _ in row)] for row in self._rows]
        is_scored = any(any(row) for row in labels)
        title, captions = _title(self._request.settings, is_scored), self._request.captions[:n_rows]
        return image_grid(images, captions, title=title, column_titles=columns, labels=labels)


def _label(candidate: Candidate) -> str:
    return "" if candidate.score is None else f"{candidate.score:.3f}"


def _title(settings: SamplingConfig, is_scored: bool) -> str:
    limits = [f"guidance {settings.guidance:g}"] * (settings.guidance != 1)
    limits += [f"top-k {settings.top_k}"] * (settings.top_k > 0) + [f"top-p {settings.top_p}"] * (settings.top_p < 1)
    limits += [f"best {settings.n_kept} of {settings.n} by score"] * is_scored
    return ", ".join([f"Temperature {settings.temperature:g}", *limits, f"seed {settings.seed}"])
