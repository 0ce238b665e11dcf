"""The caption gap: how much worse the prior predicts images from wrong captions, in nats an image token.

The cheapest score of conditioning: it needs no weights but the model's own. Zero means that captions are ignored.
S samples, N image tokens a sample, G cells a side of the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle_ds.errors import DataError
from dalle_ds.evaluation.bootstrap import mean_interval


@dataclass(frozen=True)
class CaptionGap:
    """Means over samples, nats an image token; the interval is for the gap."""

    image_loss: float
    image_loss_shuffled: float
    gap: float
    gap_low: float
    gap_high: float
    confidence: float
    n_samples: int
    n_classes: int

    def to_dict(self) -> dict[str, Any]:
        """As `evaluate.json` and the summary of `dalle-ds eval loss` name it."""
        return {**self.metrics(), "confidence": self.confidence, "n_samples": self.n_samples, "n_classes": self.n_classes}

    def metrics(self) -> dict[str, float]:
        """As named in the tracker too."""
        return {
            "loss/validation/image": self.image_loss,
            "loss/validation/image_shuffled": self.image_loss_shuffled,
            "caption_gap": self.gap,
            "caption_gap_low": self.gap_low,
            "caption_gap_high": self.gap_high,
        }


def caption_classes(captions: Sequence[str], groups: Sequence[str]) -> np.ndarray:
    """Samples whose captions may stand for each other get the same class (S,): equal captions (letter case aside), equal
    groups, and whatever such pairs join."""
    parent = list(range(len(captions)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, (caption, group) in enumerate(zip(captions, groups, strict=True)):
        for mark in (("caption", " ".join(caption.lower().split())), ("group", group)):
            parent[find(i)] = find(first.setdefault(mark, i))
    return np.unique([find(i) for i in range(len(captions))], return_inverse=True)[1]


def derangement(classes_S: np.ndarray, seed: int = 0) -> np.ndarray:
    """A random order (S,) that puts no sample in the place of one of its class.

    Raises:
        DataError: impossible, since one class has more than half of the samples.
    """
    n = len(classes_S)
    largest = int(np.bincount(classes_S).max()) if n else 0
    if n < 2 or 2 * largest > n:
        raise DataError(
            f"captions can't be shuffled: {largest} of {n} validation samples have captions that are alike; "
            "expected at least two samples and at most half of them alike"
        )
    rng = np.random.default_rng(seed)
    # Classes in random order, members together in random order, then everybody moves on by the largest class: nobody lands
    # among its own kind, and no draw is ever rejected.
    ranks = rng.permutation(classes_S.max() + 1)[classes_S]
    line = np.lexsort((rng.random(n), ranks))
    order = np.empty(n, dtype=np.int64)
    order[line] = np.roll(line, -largest)
    return order


def measure_gap(
    nll_SN: np.ndarray,
    nll_shuffled_SN: np.ndarray,
    classes_S: np.ndarray,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> CaptionGap:
    """The gap with a bootstrap interval that resamples classes, since samples of one class are not independent.

    Raises:
        ValueError: shapes differ. DataError: losses that are not finite.
    """
    if nll_SN.shape != nll_shuffled_SN.shape or len(nll_SN) != len(classes_S):
        raise ValueError(
            f"losses {nll_SN.shape}, shuffled {nll_shuffled_SN.shape}, classes {classes_S.shape}: expected equal lengths"
        )
    if not (np.isfinite(nll_SN).all() and np.isfinite(nll_shuffled_SN).all()):
        raise DataError("validation losses are not finite: the model's weights are damaged or it diverged")
    right, wrong = nll_SN.mean(1, dtype=np.float64), nll_shuffled_SN.mean(1, dtype=np.float64)
    low, high = mean_interval(wrong - right, classes_S, confidence=confidence, n_resamples=n_resamples, seed=seed)
    return CaptionGap(
        float(right.mean()),
        float(wrong.mean()),
        float((wrong - right).mean()),
        low,
        high,
        confidence,
        len(right),
        len(np.unique(classes_S)),
    )


def position_map(nll_SN: np.ndarray) -> np.ndarray:
    """Mean loss by place in the image (G, G), nats. Raises ValueError where N is no square."""
    side = round(nll_SN.shape[1] ** 0.5)
    if side * side != nll_SN.shape[1]:
        raise ValueError(f"{nll_SN.shape[1]} tokens a sample are no square grid")
    return nll_SN.mean(0, dtype=np.float64).reshape(side, side)


def save_losses(
    path: Path,
    *,
    nll_SN: np.ndarray,
    nll_shuffled_SN: np.ndarray,
    order_S: np.ndarray,
    keys: Sequence[str],
    captions: Sequence[str],
    groups: Sequence[str],
) -> None:
    """Keep what `gap_of_file` needs, without Python objects inside."""
    np.savez_compressed(
        path,
        nll=nll_SN,
        nll_shuffled=nll_shuffled_SN,
        order=order_S,
        keys=np.array(keys, dtype=np.str_),
        captions=np.array(captions, dtype=np.str_),
        groups=np.array(groups, dtype=np.str_),
    )


def gap_of_file(path: Path, **options: Any) -> CaptionGap:
    """`measure_gap` of a file that `save_losses` wrote."""
    with np.load(path, allow_pickle=False) as file:
        classes_S = caption_classes(file["captions"].tolist(), file["groups"].tolist())
        return measure_gap(file["nll"], file["nll_shuffled"], classes_S, **options)
