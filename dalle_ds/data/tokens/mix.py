"""Token mix: several token data sets, read as one with weights. A single data set is a mix of one."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from dalle_ds.data.manifest import Split
from dalle_ds.data.tokens.dataset import CACHE_BYTES, DecodedBlock, TokenDataset
from dalle_ds.data.tokens.dataset_files import DatasetFiles
from dalle_ds.data.tokens.order import SampleLocations
from dalle_ds.errors import ConfigError, FingerprintMismatch
from dalle_ds.storage import objects
from dalle_ds.storage.disk_cache import DiskCache


class TokenMix:
    """Data sets that share one dVAE and tokenizer. Blocks and samples are numbered consecutively over all data sets.

    Stored blocks are numbered consecutively too. The numbers differ if images have several crops: `stored` converts them.

    Raises:
        ConfigError: the numbers of data sets and weights differ, or two data sets contain the same samples.
        FingerprintMismatch: two data sets differ in grid, n_codes, dVAE or tokenizer.
    """

    def __init__(self, sets: Sequence[TokenDataset], weights: Sequence[float] = (1.0,)) -> None:
        if len(sets) != len(weights) or not sets:
            raise ConfigError(f"{len(sets)} data sets and {len(weights)} weights: expected equal numbers, at least 1")
        self.sets, self.weights = tuple(sets), tuple(weights)
        first = sets[0]
        self.info, self.tokenizer, self.split = first.info, first.tokenizer, first.split
        for i, dataset in enumerate(sets):
            for what in ("dvae", "tokenizer", "grid", "n_codes"):
                expected, found = getattr(first.info, what), getattr(dataset.info, what)
                if expected != found:
                    raise FingerprintMismatch(
                        f"{what} of data set {dataset.root_url}",
                        str(expected),
                        str(found),
                        f"It is mixed with {first.root_url}, which has the expected value.",
                    )
            for other in sets[:i]:
                if other.content_fingerprint == dataset.content_fingerprint:
                    raise ConfigError(
                        f"{other.root_url} and {dataset.root_url} contain the same samples: list one of them, with the "
                        "sum of the weights"
                    )
        self.block_sizes = np.concatenate([dataset.block_sizes for dataset in sets])
        self.n_samples = sum(dataset.n_samples for dataset in sets)
        self._n_blocks, self._n_crops = (
            np.array([getattr(dataset, name) for dataset in sets]) for name in ("n_blocks", "n_crops")
        )
        self._stored_ends = np.cumsum(self._n_blocks * self._n_crops)
        self.root_url = self._name([dataset.root_url for dataset in sets])
        self.fingerprint = self._name([dataset.fingerprint for dataset in sets])
        self.content_fingerprint = self._name([dataset.content_fingerprint for dataset in sets])

    @classmethod
    def open(
        cls, shares: Sequence[tuple[str | DatasetFiles, float]], split: Split, disk: DiskCache | None = None
    ) -> "TokenMix":
        """Open data sets from (root or files, weight) pairs. Their in-memory caches are together as large as that of one."""
        memory = CACHE_BYTES // max(1, len(shares))
        sets = [TokenDataset(source, split, cache_bytes=memory, disk=disk) for source, _ in shares]
        return cls(sets, [weight for _, weight in shares])

    def _name(self, names: list[str]) -> str:
        if len(names) == 1:
            return names[0]
        return " + ".join(f"{weight:.12g} * {name}" for name, weight in zip(names, self.weights, strict=True))

    def stored(self, samples: SampleLocations) -> SampleLocations:
        """Replace the number of each sample's block by that of the stored block with the crop of the sample's epoch.

        Epoch e reads crop e modulo the number of crops.
        """
        ends = np.cumsum(self._n_blocks)
        of_set = np.searchsorted(ends, samples.block, side="right")
        within = samples.block - (ends - self._n_blocks)[of_set]
        crop = samples.epoch % self._n_crops[of_set]
        first = (self._stored_ends - self._n_blocks * self._n_crops)[of_set]
        return replace(samples, block=first + crop * self._n_blocks[of_set] + within)

    def blocks(self, numbers: Iterable[int]) -> dict[int, DecodedBlock]:
        """Decoded blocks by stored number, from each data set's cache or by parallel ranged GETs."""
        if len(self.sets) == 1:
            return self.sets[0].blocks(numbers)
        wanted = np.unique(np.fromiter(numbers, dtype=np.int64))
        found: dict[int, DecodedBlock] = {}
        for dataset, end in zip(self.sets, self._stored_ends.tolist(), strict=True):
            first = end - dataset.n_stored_blocks
            own = dataset.blocks((wanted[(wanted >= first) & (wanted < end)] - first).tolist())
            found |= {first + number: block for number, block in own.items()}
        return found

    def shards_of(self, blocks: np.ndarray) -> list[str]:
        """The tar that contains each stored block: a path below the root, or a full URL if there are several roots."""
        if len(self.sets) == 1:
            return self.sets[0].shards_of(blocks)
        names = [""] * len(blocks)
        of_block = np.searchsorted(self._stored_ends, blocks, side="right")
        for number, dataset in enumerate(self.sets):
            at = np.flatnonzero(of_block == number)
            paths = dataset.shards_of(blocks[at] - (self._stored_ends[number] - dataset.n_stored_blocks))
            for i, path in zip(at.tolist(), paths, strict=True):
                names[i] = objects.join(dataset.root_url, path)
        return names

    def reads_under_way(self) -> str:
        """Describes the blocks that are being read, for messages."""
        return "; ".join(dataset.reads_under_way() for dataset in self.sets)
