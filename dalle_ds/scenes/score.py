"""The score of images against their captions: shares of right ones by category, with intervals and chance levels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any, Final

import numpy as np
from PIL import Image

from dalle_ds.errors import DataError
from dalle_ds.scenes.captions import meaning_of
from dalle_ds.scenes.judge import FAULTS, Verdict, verdict
from dalle_ds.scenes.meaning import CATEGORIES, SPLITS, Category, Meaning, Split
from dalle_ds.scenes.objects import FoundObject, find_objects

CONFIDENCE: Final = 0.95
_OTHER_CAPTIONS: Final = 8  # that each image is judged against, for the chance level

Images = np.ndarray | Sequence[Image.Image]
Found = tuple[FoundObject, ...] | None


@dataclass(frozen=True)
class Share:
    """A share of right images with its 95 % interval; `chance` is the share that is right for another caption of the row."""

    value: float
    low: float
    high: float
    n_images: int
    n_captions: int
    chance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Judged:
    """One image's caption and verdict."""

    caption: str
    category: Category
    split: Split
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        names = {"caption": self.caption, "category": self.category, "split": self.split}
        return {**names, "right": self.verdict.is_right, "faults": list(self.verdict.faults)}


@dataclass(frozen=True)
class Report:
    """What images scored: a row for each split and category that has images, and for each split the mean of its categories."""

    rows: dict[Split, dict[Category, Share]]
    means: dict[Split, Share]
    faults: dict[Split, dict[str, float]]
    """Share of the images that have each fault; an image may have several."""
    judged: tuple[Judged, ...]

    def metrics(self) -> dict[str, float]:
        """Flat numbers: "seen/mean", "zero_shot/counting" and the like."""
        flat = {f"{split}/mean": mean.value for split, mean in self.means.items()}
        for split, shares in self.rows.items():
            flat |= {f"{split}/{category}": share.value for category, share in shares.items()}
        return flat

    def to_dict(self) -> dict[str, Any]:
        """All but single verdicts, as JSON takes it."""
        return {
            split: {
                "mean": mean.to_dict(),
                **{category: share.to_dict() for category, share in self.rows[split].items()},
                "faults": self.faults[split],
            }
            for split, mean in self.means.items()
        }


def score(images: Images, captions: Sequence[str], *, seed: int = 0) -> Report:
    """Judge images by their captions alone.

    Args:
        images: uint8 (B, S, S, 3), or B square images in RGB of 24 pixels a side or more.
        captions: one for each image, in the wordings of `captions.wordings`.
        seed: of the other captions that give the chance level.

    Raises:
        DataError: a caption outside the grammar, images of another form, or not as many of one as of the other.
    """
    if len(images) != len(captions):
        raise DataError(f"{len(images)} images and {len(captions)} captions: expected one caption for each image")
    return score_found(found_in(images), captions, seed=seed)


def score_found(found: Sequence[Found], captions: Sequence[str], *, seed: int = 0) -> Report:
    """`score` of what `found_in` gave for each image. Raises DataError for a caption outside the grammar, or no image."""
    if not captions:
        raise DataError("no images to judge: expected one or more")
    meanings = [require_meaning(caption) for caption in captions]
    verdicts = [verdict(objects, meaning) for objects, meaning in zip(found, meanings, strict=True)]
    judged = tuple(
        Judged(caption, meaning.category, meaning.split, one)
        for caption, meaning, one in zip(captions, meanings, verdicts, strict=True)
    )
    rows: dict[Split, dict[Category, Share]] = {}
    for split in SPLITS:
        for category in CATEGORIES:
            chosen = [i for i, one in enumerate(judged) if (one.split, one.category) == (split, category)]
            if chosen:
                right = [judged[i].verdict.is_right for i in chosen]
                chance = _chance([found[i] for i in chosen], [meanings[i] for i in chosen], seed)
                share = share_of(right, n_captions=len({captions[i] for i in chosen}), chance=chance)
                rows.setdefault(split, {})[category] = share
    return Report(rows, {split: mean_of(list(rows[split].values())) for split in rows}, _faults(judged), judged)


def found_in(images: Images) -> list[Found]:
    """`find_objects` of images that may differ in size. Raises DataError for images of another form than `score` takes."""
    if isinstance(images, np.ndarray):
        return find_objects(images)
    found: list[Found] = [None] * len(images)
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.size, []).append(i)
    for indices in by_size.values():
        pixels_BSSC = np.stack([np.asarray(images[i].convert("RGB")) for i in indices])
        for i, objects in zip(indices, find_objects(pixels_BSSC), strict=True):
            found[i] = objects
    return found


def require_meaning(caption: str) -> Meaning:
    """`meaning_of`. Raises DataError where a caption is outside the grammar."""
    meaning = meaning_of(caption)
    if meaning is None:
        raise DataError(
            f"caption {caption!r} is no caption of a scene, so that its image cannot be judged; expected captions such as "
            "'a red heart above a small blue star' or 'three green rings' (`dalle-ds data fetch --source scenes` lists some)"
        )
    return meaning


def share_of(right: Sequence[bool], *, n_captions: int, chance: float | None = None) -> Share:
    """The share of True with Wilson's interval. Images of one caption count as one witness: they are not independent."""
    value = fmean(right)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = (value + z * z / (2 * n_captions)) / (1 + z * z / n_captions)
    half = z / (1 + z * z / n_captions) * float(np.sqrt(value * (1 - value) / n_captions + (z / n_captions) ** 2 / 4))
    return Share(value, max(0.0, centre - half), min(1.0, centre + half), len(right), n_captions, chance)


def mean_of(shares: Sequence[Share]) -> Share:
    """The mean of independent shares, each with the same weight; the interval joins theirs (Zou and Donner's MOVER)."""
    value, n = fmean(share.value for share in shares), len(shares)
    below = float(np.sqrt(sum((share.value - share.low) ** 2 for share in shares))) / n
    above = float(np.sqrt(sum((share.high - share.value) ** 2 for share in shares))) / n
    chances = [share.chance for share in shares if share.chance is not None]
    n_images, n_captions = sum(share.n_images for share in shares), sum(share.n_captions for share in shares)
    return Share(value, value - below, value + above, n_images, n_captions, fmean(chances) if chances else None)


def _chance(found: Sequence[Found], meanings: Sequence[Meaning], seed: int) -> float | None:
    # None where all images of the row have one meaning
    rng = np.random.default_rng(seed)
    distinct = list(dict.fromkeys(meanings))
    right = []
    for objects, meaning in zip(found, meanings, strict=True):
        others = [other for other in distinct if other.key != meaning.key]
        for i in rng.permutation(len(others))[:_OTHER_CAPTIONS]:
            right.append(verdict(objects, others[int(i)]).is_right)
    return fmean(right) if right else None


def _faults(judged: Sequence[Judged]) -> dict[Split, dict[str, float]]:
    shares: dict[Split, dict[str, float]] = {}
    for split in SPLITS:
        verdicts = [one.verdict for one in judged if one.split == split]
        counts = Counter(fault for one in verdicts for fault in one.faults)
        if verdicts:
            shares[split] = {fault: counts[fault] / len(verdicts) for fault in FAULTS if counts[fault]}
    return shares
