"""The sheet of a folder of samples, grid.png: a row for each caption, with what the samples are to be compared with."""

from PIL import Image
from torch import Tensor

from dalle_ds.models.dvae import DVAE
from dalle_ds.sampling.decode import decode_pictures, partial_pictures
from dalle_ds.sampling.grid import picture_grid
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.sampler import Candidate
from dalle_ds.sampling.settings import SampleSettings

MAX_CAPTIONS, MAX_PICTURES = 64, 32
"""What the sheet shows at most: it is there to look at."""


class SampleSheet:
    """Takes the first pictures of the first captions, in order."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._rows: list[list[tuple[Candidate, Image.Image]]] = []

    def add(self, candidate: Candidate, picture: Image.Image) -> None:
        """The next picture; those of a caption come one after another, caption by caption."""
        caption = candidate.index.caption
        if caption >= MAX_CAPTIONS:
            return
        if caption == len(self._rows):
            self._rows.append([])
        if len(self._rows[caption]) < MAX_PICTURES:
            self._rows[caption].append((candidate, picture))

    def draw(self, dvae: DVAE, real_codes_CN: Tensor | None = None) -> Image.Image:
        """Real pictures by their codes, where there are some; a given picture and its kept rows; samples with their scores."""
        given, n_rows = self._request.given, len(self._rows)
        leading: list[tuple[str, list[Image.Image]]] = []  # columns before the samples
        if real_codes_CN is not None:
            leading.append(("real, by its codes", decode_pictures(dvae, real_codes_CN[:n_rows])))
        if given is not None:
            top = partial_pictures(dvae, given.codes_N[None], given.rows)
            leading += [("given", [given.picture] * n_rows), (f"kept: {given.rows} rows", top * n_rows)]
        columns = [title for title, _ in leading]
        columns += [f"sample {k + 1}" for k in range(len(self._rows[0]))] if leading else []
        pictures = [
            [*(column[c] for _, column in leading), *(picture for _, picture in row)] for c, row in enumerate(self._rows)
        ]
        labels = [[*([""] * len(leading)), *(_label(candidate) for candidate, _ in row)] for row in self._rows]
        is_scored = any(any(row) for row in labels)
        title, captions = _title(self._request.settings, is_scored), self._request.captions[:n_rows]
        return picture_grid(pictures, captions, title=title, column_titles=columns, labels=labels)


def _label(candidate: Candidate) -> str:
    return "" if candidate.score is None else f"{candidate.score:.3f}"


def _title(settings: SampleSettings, is_scored: bool) -> str:
    limits = [f"guidance {settings.guidance:g}"] * (settings.guidance != 1)
    limits += [f"top-k {settings.top_k}"] * (settings.top_k > 0) + [f"top-p {settings.top_p}"] * (settings.top_p < 1)
    limits += [f"best {settings.n_kept} of {settings.n} by score"] * is_scored
    return ", ".join([f"Temperature {settings.temperature:g}", *limits, f"seed {settings.seed}"])
