"""Files of feature statistics. Each file records how its statistics were made, so that only comparable ones are compared."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dalle_ds.errors import DataError
from dalle_ds.evaluation.fid import Moments
from dalle_ds.evaluation.image_sets import PREPARATION
from dalle_ds.storage import objects
from dalle_ds.storage.arrays import read_npz
from dalle_ds.storage.fingerprint import fingerprint


@dataclass(frozen=True)
class Measure:
    """Settings that must be equal for samples and reference of an FID: the extractor, and the preparation of an image."""

    extractor: str
    extractor_fingerprint: str
    size: int
    blur: float
    preparation: str = PREPARATION

    def __str__(self) -> str:
        return f"{self.extractor} {self.extractor_fingerprint} at {self.size} pixels, blur {self.blur:g}, {self.preparation}"


@dataclass(frozen=True)
class Statistics:
    """Moments of the features of one set of images. `images` is the fingerprint of the set."""

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
        """Read a file of statistics. Raises DataError if the file is missing, damaged or of another kind."""
        try:
            file = read_npz(path)
            if {"mu", "sigma"} <= file.keys():
                raise ValueError("mu and sigma are of pytorch-fid, whose network gives other features")
            about, mean_D, factor_RD = json.loads(str(file["about"])), file["mean"], file["factor"]
            found = cls(
                Measure(**about["measure"]), about["source"], about["images"], Moments(int(about["n"]), mean_D, factor_RD)
            )
        except Exception as error:  # a damaged zip file or JSON can raise any exception
            hint = "`dalle-ds eval images --cache` writes such files"
            raise DataError(f"{path} has no statistics of images ({error}); {hint}") from None
        if factor_RD.ndim != 2 or factor_RD.shape[1:] != mean_D.shape:
            raise DataError(f"{path}: mean {mean_D.shape} and factor {factor_RD.shape} do not match")
        return found


def require_comparable(ours: Measure, theirs: Measure, where: str | Path) -> None:
    """Raises DataError, which names both measures, if they differ."""
    if ours != theirs:
        raise DataError(f"{where} cannot be compared: its statistics were made with {theirs}; expected {ours}")


def cache_path(folder: Path, measure: Measure, images: str) -> Path:
    """Path of the statistics in the cache `folder`, for a set of images (its fingerprint) and a measure."""
    return folder / f"{fingerprint({**asdict(measure), 'images': images})}.npz"
