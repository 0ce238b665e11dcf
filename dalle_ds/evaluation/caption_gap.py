"""The caption gap: how much higher the prior's image loss is with wrong captions, in nats per image token.

It is the cheapest measure of conditioning, because it needs no weights other than the model's. Zero means that the model
ignores captions. S samples, N image tokens per sample, G x G token grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle_ds.errors import DataError
from dalle_ds.evaluation.bootstrap import mean_interval
from dalle_ds.storage.arrays import read_npz


@dataclass(frozen=True)
class CaptionGap:
    """Means over samples in nats per image token, and the confidence interval of the gap."""

    image_loss: float
    image_loss_shuffled: float
    gap: float
    gap_low: float
    gap_high: float
    confidence: float
    n_samples: int
    n_classes: int

    def to_dict(self) -> dict[str, Any]:
        """Entries of `evaluate.json` and of the summary of `dalle-ds eval loss`."""
        return {**self.metrics(), "confidence": self.confidence, "n_samples": self.n_samples, "n_classes": self.n_classes}

    def metrics(self) -> dict[str, float]:
        """Metrics, with the names used in the tracker."""
        return {
            "loss/validation/image": self.image_loss,
            "loss/validation/image_shuffled": self.image_loss_shuffled,
            "caption_gap": self.gap,
            "caption_gap_low": self.gap_low,
            "caption_gap_high": self.gap_high,
        }


def caption_classes(captions: Sequence[str], groups: Sequence[str]) -> np.ndarray:
    """Assign a class to each sample. Returns (S,).

    Samples are in one class if their captions are equal (ignoring case and white space) or their groups are equal. The relation
    is transitive.
    """
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
    """Random permutation (S,) that assigns to each sample a sample of a different class.

    Raises:
        DataError: fewer than two samples, or one class has more than half of the samples.
    """
    n = len(classes_S)
    largest = int(np.bincount(classes_S).max()) if n else 0
    if n < 2 or 2 * largest > n:
        raise DataError(
            f"captions cannot be shuffled: {largest} of {n} validation samples are in one class of equal captions or groups; "
            "expected at least two samples, and at most half of them in one class"
        )
    rng = np.random.default_rng(seed)
    # Sort the samples by class, with classes and members in random order. Then rotate by the size of the largest class: no
    # sample stays in its class, and no rejection sampling is needed.
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
    """Caption gap with a bootstrap interval. Classes are resampled, because samples of one class are not independent.

    Args:
        nll_SN: losses with the right captions, nats.
        nll_shuffled_SN: losses with the shuffled captions, nats.
        classes_S: classes of `caption_classes`.

    Raises:
        ValueError: the shapes differ.
        DataError: losses that are not finite.
    """
    if nll_SN.shape != nll_shuffled_SN.shape or len(nll_SN) != len(classes_S):
        raise ValueError(
            f"losses {nll_SN.shape}, shuffled {nll_shuffled_SN.shape}, classes {classes_S.shape}: expected equal lengths"
        )
    if not (np.isfinite(nll_SN).all() and np.isfinite(nll_shuffled_SN).all()):
        raise DataError("validation losses are not finite: the model's weights are damaged, or its training diverged")
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
    """Mean loss at each position of the token grid (G, G), nats. Raises ValueError if N is not a square."""
    side = round(nll_SN.shape[1] ** 0.5)
    if side * side != nll_SN.shape[1]:
        raise ValueError(f"{nll_SN.shape[1]} tokens per sample: expected a square number")
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
    """Write the input of `gap_of_file` as .npz without pickled objects."""
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
    """`measure_gap` of a file written by `save_losses`."""
    file = read_npz(path)
    classes_S = caption_classes(file["captions"].tolist(), file["groups"].tolist())
    return measure_gap(file["nll"], file["nll_shuffled"], classes_S, **options)
