"""Check sets of images before a measurement: all images that cannot be used are found, counted and listed at once."""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from dalle_ds.console import progress
from dalle_ds.data.images import ImageProblem, decode_image
from dalle_ds.errors import DataError
from dalle_ds.evaluation.image_sets import Entry, ImageSet

log = logging.getLogger(__name__)

WORKERS, BATCH = 4, 64
SHOWN = 50  # names in a message


@dataclass(frozen=True)
class Survey:
    """Which images of a set can be used. `side` is the short side of the first of them, None if there is none."""

    images: ImageSet
    n: int
    problems: dict[str, str]
    """Reason by key."""
    side: int | None

    @property
    def usable(self) -> ImageSet:
        return self.images.without(self.problems)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by reason."""
        return dict(Counter(self.problems.values()).most_common())

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {reason}" for reason, n in self.counts.items())
        names = [f"{key} ({reason})" for key, reason in islice(self.problems.items(), SHOWN)]
        more = f", and {len(self.problems) - SHOWN} more" if len(self.problems) > SHOWN else ""
        return f"{self.images.source}: {len(self.problems)} of {self.n} images, {counts}: {', '.join(names)}{more}"


def survey(
    images: ImageSet, *, size: int | None = None, needs_caption: bool = False, is_sized_by_first: bool = False
) -> Survey:
    """Decode every image once, and find those that cannot be used.

    Args:
        size: shortest side in pixels that an image must have.
        needs_caption: an image without a caption cannot be used.
        is_sized_by_first: if `size` is None, it is the short side of the first image that can be used.
    """
    problems: dict[str, str] = {}
    n, first = 0, None
    iterator = iter(images)
    with ThreadPoolExecutor(WORKERS) as pool, progress(what=f"check {images.source}", unit="image") as bar:
        while batch := list(islice(iterator, BATCH)):
            for entry, found in zip(batch, pool.map(_examined, batch), strict=True):
                n += 1
                if isinstance(found, str):
                    problems[entry.key] = found
                elif needs_caption and not entry.caption:
                    problems[entry.key] = "without a caption"
                else:
                    first = found if first is None else first
                    least = size or (first if is_sized_by_first else 0)
                    if found < least:
                        problems[entry.key] = f"smaller than {least} pixels"
            bar.update(len(batch))
    return Survey(images, n, problems, first)


def require_usable(surveys: Sequence[Survey], max_failure_rate: float) -> None:
    """Check that few enough images cannot be used. Those that cannot are logged.

    Raises:
        DataError: more than `max_failure_rate` of one set, or all of it. The message lists the images of all sets.
    """
    bad = [survey for survey in surveys if survey.problems]
    if any(len(survey.problems) > max_failure_rate * survey.n or len(survey.problems) == survey.n for survey in bad):
        needed = max(len(survey.problems) / survey.n for survey in bad)
        hint = f"; leave them out with max_failure_rate {needed:.2g} or more" if needed < 1 else ""
        raise DataError("\n  ".join([f"images that cannot be used{hint}", *map(str, bad)]))
    for survey in bad:
        log.warning("left out: %s", survey)


def _examined(entry: Entry) -> int | str:
    """The short side of an image, or why it cannot be used."""
    if entry.problem is not None:
        return entry.problem
    try:
        return min(decode_image(entry.data).size)
    except ImageProblem as problem:
        return problem.reason
