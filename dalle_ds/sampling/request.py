"""A request for samples: captions and settings, cut into batches that are the same whoever draws them."""

from dataclasses import dataclass
from typing import NamedTuple

from dalle_ds.errors import DataError
from dalle_ds.sampling.image_prompt import ImagePrompt
from dalle_ds.sampling.settings import SamplingConfig
from dalle_ds.storage.hashing import hash_to_integer


class SampleIndex(NamedTuple):
    """One sample of a request: which caption of the request, and which candidate of that caption."""

    caption: int
    candidate: int


class WorkItem(NamedTuple):
    """Samples that are drawn together: some captions, and a range of the candidates of each."""

    number: int
    captions: range
    candidates: range

    @property
    def n_samples(self) -> int:
        return len(self.captions) * len(self.candidates)

    def indices(self) -> list[SampleIndex]:
        """In the order in which they are drawn: caption by caption."""
        return [SampleIndex(c, k) for c in self.captions for k in self.candidates]


@dataclass(frozen=True)
class Request:
    """Images that somebody wants.

    Raises:
        DataError: no captions, or empty ones. An image prompt needs none: "" draws variations of it.
    """

    captions: tuple[str, ...]
    settings: SamplingConfig
    image_prompt: ImagePrompt | None = None

    def __post_init__(self) -> None:
        n_empty = sum(not caption.strip() for caption in self.captions)
        if not self.captions or (n_empty and self.image_prompt is None):
            raise DataError(f"{len(self.captions)} captions, {n_empty} of them empty: expected some")

    def work_items(self) -> list[WorkItem]:
        """The batches that the images are drawn in: several captions, or a part of one's candidates. They are the same
        whoever draws them, since what a batch holds may change the rounding of its images."""
        n, batch = self.settings.n, self.settings.batch
        captions_at_once, candidates_at_once = max(1, batch // n), min(n, batch)
        parts = [
            (range(c, min(c + captions_at_once, len(self.captions))), range(k, min(k + candidates_at_once, n)))
            for c in range(0, len(self.captions), captions_at_once)
            for k in range(0, n, candidates_at_once)
        ]
        return [WorkItem(number, *part) for number, part in enumerate(parts)]

    def seed_of(self, index: SampleIndex) -> int:
        """The seed of one sample."""
        return seed_of(self.settings.seed, self.captions[index.caption], index.candidate)


def seed_of(seed: int, caption: str, candidate: int) -> int:
    """The seed of one image: it depends neither on the other captions nor on how many candidates are drawn."""
    return hash_to_integer(f"{seed}\0{candidate}\0{caption}") >> 1
