"""A request for samples: captions and settings, divided into batches independently of the number of ranks."""

from dataclasses import dataclass
from typing import NamedTuple

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.sampling.image_prompt import ImagePrompt
from dalle_ds.sampling.settings import SamplingConfig
from dalle_ds.storage.hashing import hash_to_integer

MAX_BATCHES = 2_000_000
"""Maximum number of batches of a request, each of which takes memory: 0.5 GB. The paper's 30,000 captions with 512 candidates
in batches of 8 are as many. A record of samples from somebody else may ask for billions."""


class SampleIndex(NamedTuple):
    """Index of one sample: the caption's index in the request, and the candidate's index for that caption."""

    caption: int
    candidate: int


class WorkItem(NamedTuple):
    """One batch: a range of captions, and a range of candidates for each of them."""

    number: int
    captions: range
    candidates: range

    @property
    def n_samples(self) -> int:
        return len(self.captions) * len(self.candidates)

    def indices(self) -> list[SampleIndex]:
        """Returns the indices of the samples in batch order: caption by caption."""
        return [SampleIndex(c, k) for c in self.captions for k in self.candidates]


@dataclass(frozen=True)
class Request:
    """Captions, settings and an optional image prompt to sample images for.

    Raises:
        DataError: no captions, a caption that is not text, or an empty caption without an image prompt. With a prompt, the
            caption "" gives variations of the image.
    """

    captions: tuple[str, ...]
    settings: SamplingConfig
    image_prompt: ImagePrompt | None = None

    def __post_init__(self) -> None:
        for row, caption in enumerate(self.captions):
            try:
                caption.encode()
            except UnicodeEncodeError:  # bytes of an argument that are not UTF-8 become lone surrogates
                raise DataError(f"caption {row + 1} is not UTF-8: {ascii(caption)[:200]}; expected text in UTF-8") from None
        if not self.captions:
            raise DataError("no captions: expected one or more")
        empty = [row + 1 for row, caption in enumerate(self.captions) if not caption.strip()]
        if empty and self.image_prompt is None:
            if len(self.captions) == 1:
                raise DataError("the caption is empty: expected text, or an image prompt to draw variations of")
            raise DataError(f"{len(self.captions)} captions, {len(empty)} of them empty, the first is caption {empty[0]}")

    def work_items(self) -> list[WorkItem]:
        """Divide the request into batches: several captions with all their candidates, or some candidates of one caption.

        The division does not depend on the number of ranks, because the composition of a batch may change the rounding of its
        images.

        Raises:
            ConfigError: more than MAX_BATCHES.
        """
        n, batch = self.settings.n, self.settings.batch
        captions_at_once, candidates_at_once = max(1, batch // n), min(n, batch)
        n_batches = -(-len(self.captions) // captions_at_once) * -(-n // candidates_at_once)
        if n_batches > MAX_BATCHES:
            raise ConfigError(
                f"{len(self.captions)} captions with n {n} are {n_batches} batches of {batch}, expected at most {MAX_BATCHES}; "
                "raise batch, or divide the captions among several folders"
            )
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
    """Seed of one image. It depends neither on the other captions nor on the number of candidates."""
    return hash_to_integer(f"{seed}\0{candidate}\0{caption}") >> 1
