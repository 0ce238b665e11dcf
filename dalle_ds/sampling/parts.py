"""The parts of a folder of samples: what is committed in one file, written by any process and read by any other.

C captions of a part, K candidates of each, M kept samples, N image tokens.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dalle_ds.errors import Damaged
from dalle_ds.sampling.request import SampleIndex, WorkItem
from dalle_ds.sampling.sampler import Batch, Candidate
from dalle_ds.storage import objects
from dalle_ds.storage.arrays import read_npz

SMALL_REQUEST = 4096
"""Maximum number of batches of a request whose batches are parts of their own, so that ranks share even a single caption."""
BATCHES = 16
"""Minimum number of batches in a part of a larger request, where a file for every batch would be too many files."""


@dataclass(frozen=True)
class Part:
    """Batches that are committed together: one, or all batches of some captions."""

    number: int
    items: tuple[WorkItem, ...]

    @property
    def captions(self) -> range:
        return range(self.items[0].captions.start, self.items[-1].captions.stop)

    @property
    def candidates(self) -> range:
        """Candidates of each caption."""
        return range(self.items[0].candidates.start, self.items[-1].candidates.stop)

    @property
    def n_samples(self) -> int:
        return sum(item.n_samples for item in self.items)


class PartContent(NamedTuple):
    """Indices (M, 2) and codes (M, N) uint16 of the kept samples. With a scorer, the scores (C, K) of all samples."""

    indices: np.ndarray
    codes: np.ndarray
    scores: np.ndarray | None

    def samples(self) -> Iterator[tuple[SampleIndex, torch.Tensor]]:
        """The kept samples with their codes."""
        for index, codes_N in zip(self.indices.tolist(), self.codes, strict=True):
            yield SampleIndex(*index), torch.from_numpy(codes_N)


def divide(items: list[WorkItem]) -> list[Part]:
    """Divide the batches of a request into parts. The division does not depend on the number of ranks.

    30,000 captions with 512 candidates are 480,000 batches, and 30,000 parts of a caption each.
    """
    if len(items) <= SMALL_REQUEST:
        return [Part(item.number, (item,)) for item in items]
    parts: list[Part] = []
    open_items: list[WorkItem] = []
    for _, of_captions in groupby(items, lambda item: item.captions):
        open_items += of_captions
        if len(open_items) >= BATCHES:
            parts.append(Part(len(parts), tuple(open_items)))
            open_items = []
    return [*parts, Part(len(parts), tuple(open_items))] if open_items else parts


class PartFiles:
    """The files of the parts."""

    def __init__(self, folder: Path, has_scores: bool = False) -> None:
        """`has_scores`: a scorer ranks the candidates, so every file has the scores of all of them."""
        self._folder = folder
        self._names = {"indices", "codes", *(["scores"] if has_scores else [])}

    def path(self, part: Part) -> Path:
        return self._folder / f"batch_{part.number:06d}.npz"

    def existing(self) -> set[str]:
        """Names of the files, by one listing."""
        return {path.name for path in self._folder.glob("batch_*.npz")}

    def write(self, part: Part, kept: list[Candidate], scores_CK: np.ndarray | None) -> None:
        """Commit a part."""
        data = io.BytesIO()
        np.savez(
            data,
            indices=np.array([candidate.index for candidate in kept]),
            codes=torch.stack([candidate.codes_N for candidate in kept]).numpy().astype(np.uint16),
            **({} if scores_CK is None else {"scores": scores_CK}),
        )
        objects.write_bytes(self.path(part), data.getvalue())

    def read(self, part: Part) -> PartContent | None:
        """Read a part. Returns None if it is not committed, or if its file is damaged by a power cut."""
        try:
            arrays = read_npz(self.path(part))
        except (FileNotFoundError, Damaged):
            return None
        # one changed bit of a name would hide the scores
        return PartContent(arrays["indices"], arrays["codes"], arrays.get("scores")) if arrays.keys() == self._names else None


class Collector:
    """Collects the batches of parts as they are finished, in order, and commits each part with its last batch."""

    def __init__(
        self, parts: Iterable[Part], files: PartFiles, choose: Callable[[list[Candidate], Batch], list[Candidate]]
    ) -> None:
        """`choose` returns what is kept of a part's candidates so far and of another batch."""
        self._parts, self._files, self._choose = iter(parts), files, choose
        self._part: Part | None = None
        self._n_taken, self._kept, self._scores_CK = 0, [], None

    def take(self, batch: Batch) -> None:
        """Add the next batch."""
        if self._part is None:
            self._part, self._n_taken, self._kept, self._scores_CK = next(self._parts), 0, [], None
        part = self._part
        self._kept = self._choose(self._kept, batch)
        if batch.scores_CK is not None:
            if self._scores_CK is None:
                self._scores_CK = np.full((len(part.captions), len(part.candidates)), np.nan, dtype=np.float32)
            row, column = batch.item.captions.start - part.captions.start, batch.item.candidates.start - part.candidates.start
            n_rows, n_columns = batch.scores_CK.shape
            self._scores_CK[row : row + n_rows, column : column + n_columns] = batch.scores_CK
        self._n_taken += 1
        if self._n_taken == len(part.items):
            self._files.write(part, self._kept, self._scores_CK)
            self._part = None
