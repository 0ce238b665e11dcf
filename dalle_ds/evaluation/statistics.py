"""Feature statistics of a set of images in a file that says how they were made, so that unlike ones are never compared."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dalle_ds.errors import DataError
from dalle_ds.evaluation.fid import Moments
from dalle_ds.evaluation.image_sets import PREPARATION
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint


@dataclass(frozen=True)
class Measure:
    """All that must be equal on both sides of a FID: the extractor, and what happens to an image before it."""

    extractor: str
    extractor_fingerprint: str
    size: int
    blur: float
    preparation: str = PREPARATION

    def __str__(self) -> str:
        return f"{self.extractor} {self.extractor_fingerprint} at {self.size} pixels, blur {self.blur:g}, {self.preparation}"


@dataclass(frozen=True)
class Statistics:
    """Moments of the features of one set of images; `images` is the set's fingerprint."""

    measure: Measure
    source: str
    images: str
    moments: Moments

    def save(self, path: Path) -> None:
        about = {"measure": asdict(self.measure), "source": self.source, "images": self.images, "n": self.moments.n}
        path.parent.mkdir(parents=True, exist_ok=True)
        with objects.atomic_object(path) as aside, aside.open("wb") as file:
            np.savez(file, mean=self.moments.mean_D, factor=self.moments.factor_RD, about=np.array(json.dumps(about)))

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Raises DataError where the file is missing, damaged or something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                about, mean_D, factor_RD = json.loads(str(file["about"])), file["mean"], file["factor"]
            found = cls(
                Measure(**about["measure"]), about["source"], about["images"], Moments(int(about["n"]), mean_D, factor_RD)
            )
        except Exception as error:  # zip files and JSON meet damage with every kind of exception
            hint = "`dalle-ds eval images --cache` writes such files"
            raise DataError(f"{path}: no statistics of images ({error}); {hint}") from None
        if factor_RD.ndim != 2 or factor_RD.shape[1:] != mean_D.shape:
            raise DataError(f"{path}: mean {mean_D.shape} and factor {factor_RD.shape} don't belong together")
        return found


def require_comparable(ours: Measure, theirs: Measure, where: str | Path) -> None:
    """Raise DataError, with both measures, unless they are equal."""
    if ours != theirs:
        raise DataError(f"{where} can't be compared: its statistics are by {theirs}; expected {ours}")


def cache_path(folder: Path, measure: Measure, images: str) -> Path:
    """Where `folder` keeps the statistics of these very images by this measure."""
    return folder / f"{fingerprint({**asdict(measure), 'images': images})}.npz"
