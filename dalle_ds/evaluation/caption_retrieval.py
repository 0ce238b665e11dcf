"""Retrieval: the fraction of images whose own caption a CLIP scores highest among many, as a person might guess it."""

# N images, P captions to draw from, K captions an image is compared with, D features

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dalle_ds.errors import DataError
from dalle_ds.evaluation.bootstrap import mean_interval
from dalle_ds.evaluation.caption_gap import caption_classes


def score_among(
    images_ND: np.ndarray,
    captions: Sequence[str],
    texts_PD: np.ndarray,
    pool: Sequence[str],
    among: int,
    alike: str | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare each image with its own caption and with `among` - 1 others, drawn from the pool.

    Args:
        images_ND: unit vectors of the images.
        captions: of each image.
        texts_PD: unit vectors of the captions in `pool`.
        pool: different captions, among them those of the images.
        alike: as in `candidates_of`.

    Returns:
        n, top1 and top5 with a 95 % interval of top1 over captions, and with `alike` the same for each text that it matches.

    Raises:
        DataError: as `candidates_of`.
    """
    candidates_NK = candidates_of(captions, pool, among, alike, seed=seed)
    # image by image: the candidates' features of all images together would take gigabytes
    pairs = zip(images_ND, candidates_NK, strict=True)
    scores_NK = np.stack([np.einsum("d,kd->k", image_D, texts_PD[candidates_K]) for image_D, candidates_K in pairs])
    rank_N = (scores_NK[:, 1:] >= scores_NK[:, :1]).sum(1)  # the own caption comes first; a tie is no success
    kinds = np.array([kind_of(caption, alike) for caption in captions])
    found = _summary(rank_N, captions, seed)
    if alike is not None:
        found["by_text"] = {
            str(kind): _summary(rank_N[kinds == kind], [c for c, k in zip(captions, kinds, strict=True) if k == kind], seed)
            for kind in np.unique(kinds)
        }
    return found


def candidates_of(
    captions: Sequence[str], pool: Sequence[str], among: int, alike: str | None = None, *, seed: int = 0
) -> np.ndarray:
    """Draw captions of the pool for each image: places (N, `among`) in the pool, the own caption first.

    Args:
        alike: regular expression. Only captions in which it matches the same text are drawn. None: all.

    Raises:
        DataError: the pool has too few captions.
    """
    kinds: dict[str, list[int]] = {}
    for place, caption in enumerate(pool):
        kinds.setdefault(kind_of(caption, alike), []).append(place)
    rng = np.random.default_rng(seed)
    place_of = {caption: place for place, caption in enumerate(pool)}
    rows = []
    for caption in captions:
        own = place_of[caption]
        others = [place for place in kinds[kind_of(caption, alike)] if place != own]
        if len(others) < among - 1:
            raise DataError(f"{len(others) + 1} captions like {caption!r}, expected {among} or more to compare each image with")
        rows.append([own, *rng.choice(others, among - 1, replace=False)])
    return np.array(rows)


def kind_of(caption: str, alike: str | None) -> str:
    """The text of a caption that `alike` matches; empty if there is none."""
    found = None if alike is None else re.search(alike, caption)
    return found[0] if found else ""


def _summary(rank_N: np.ndarray, captions: Sequence[str], seed: int) -> dict[str, Any]:
    top1_N = (rank_N == 0).astype(np.float64)
    low, high = mean_interval(top1_N, caption_classes(captions, captions), seed=seed)
    return {
        "n": len(rank_N),
        "top1": float(top1_N.mean()),
        "top1_low": low,
        "top1_high": high,
        "top5": float((rank_N < 5).mean()),
    }
