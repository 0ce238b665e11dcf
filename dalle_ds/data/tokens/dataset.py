"""Token data set: one split of the token shards, checked against dataset.json and read block by block."""

import logging
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalle_ds.data.manifest import Split
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.data.tokens.dataset_files import DatasetFiles, DatasetManifest
from dalle_ds.data.tokens.index import TokenIndex
from dalle_ds.data.tokens.shards import read_block
from dalle_ds.errors import DataError, UserError
from dalle_ds.storage import objects
from dalle_ds.storage.block_cache import BlockCache
from dalle_ds.storage.disk_cache import DiskCache
from dalle_ds.storage.fingerprint import fingerprint, require_same
from dalle_ds.storage.names import DATASET_FILE, TOKENIZER_FILE

# n samples per block, N image tokens

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
MASK_BYTES = 1 << 20  # of the mask, unpacked at a time: all of 250 million bits would take 250 MB in each rank


@dataclass(frozen=True)
class DecodedBlock:
    tokens_nN: np.ndarray  # uint16
    keys: list[str]
    captions: list[str]
    nbytes: int


class TokenDataset:
    """One split of a token data set. Opening it checks that manifests and tokenizer match dataset.json.

    Args:
        source: folder of dataset.json: a path, a file:// or an s3:// URL; or its files, read before.
        cache_bytes: maximum size of the in-memory cache of decoded blocks.
        disk: disk cache for stored blocks of a data set on remote storage; None: no disk cache.

    Raises:
        DataError: the data set is missing, damaged or empty.
        FingerprintMismatch: a shard or the tokenizer belongs to another data set.
    """

    def __init__(
        self,
        source: str | Path | DatasetFiles,
        split: Split = "train",
        *,
        cache_bytes: int = CACHE_BYTES,
        disk: DiskCache | None = None,
    ) -> None:
        files = source if isinstance(source, DatasetFiles) else DatasetFiles.read(source)
        self.root_url, self.split, self.cache_bytes = files.root_url, split, cache_bytes
        self.info, manifest = files.info, files.manifest
        self.fingerprint = self.info.fingerprint
        self.complete = manifest.complete
        if not manifest.complete:
            log.warning("%s", _told_as_incomplete(self.root_url, manifest))
        tokenizer_url = objects.join(self.root_url, TOKENIZER_FILE)
        self.tokenizer = CaptionTokenizer(files.tokenizer, tokenizer_url)
        require_same(
            f"tokenizer {tokenizer_url}",
            self.info.tokenizer,
            self.tokenizer.fingerprint,
            "The shards were encoded with another tokenizer.",
        )
        self.n_crops = self.info.n_crops(split)
        self._index_blocks(files.index)
        if not self.n_samples:
            raise DataError(
                f"{self.root_url}: no samples in split {split!r}, {sum(manifest.n_samples.values())} samples in all splits; "
                f"validation_fraction is {self.info.validation_fraction}"
            )
        self._disk = disk if objects.local_path(self.root_url) is None else None
        self._reading: set[str] = set()
        self._cache = BlockCache(self._load, cache_bytes)

    def _index_blocks(self, index: TokenIndex) -> None:
        # Crop by crop: the parts with the first crop of every image, then those with the second, and so on.
        self._parts = index.parts(self.split, range(self.n_crops))
        self._table = self._parts.blocks
        for shard, n_crops in Counter(self._parts.shards).items():
            if n_crops != self.n_crops:
                raise DataError(
                    f"shard {shard} of {self.root_url}: {n_crops} crops of each training image, expected "
                    f"{self.n_crops} as in {DATASET_FILE}"
                )
        n_blocks, left = divmod(len(self._table), self.n_crops)
        stored_sizes = self._table.n_samples[:n_blocks]
        if left or (self._table.n_samples.reshape(self.n_crops, n_blocks) != stored_sizes).any():
            raise DataError(f"{self.root_url}: the crops of the training images are not in equal blocks; encode it again")
        self._mask = index.masks.get(self.split)
        self._first_samples = np.cumsum(stored_sizes) - stored_sizes
        # Without masked samples, as if they were not stored: the order of the other samples follows from these sizes.
        self.block_sizes = stored_sizes if self._mask is None else stored_sizes - _count_masked(self._mask, stored_sizes)
        self.n_samples = int(self.block_sizes.sum())
        # `fingerprint` identifies how the data was made; this one identifies the samples and their order. An exact resume
        # compares it.
        parts = [[part.path, part.checksum] for part in map(self._parts.without_blocks, range(len(self._parts)))]
        mask = {} if self._mask is None else {"mask": self._mask}
        self.content_fingerprint = fingerprint({"parts": parts}, {"block_sizes": self.block_sizes, **mask})

    @property
    def n_blocks(self) -> int:
        """Number of blocks that the samples are in, counting one crop of every image."""
        return len(self.block_sizes)

    @property
    def n_stored_blocks(self) -> int:
        """Number of blocks of all crops. Crop c of block i is stored as block c * n_blocks + i."""
        return len(self._table)

    def blocks(self, numbers: Iterable[int]) -> dict[int, DecodedBlock]:
        """Decoded blocks by their number among the stored blocks, from the cache or by parallel ranged GETs."""
        return self._cache.get(numbers)

    def reads_under_way(self) -> str:
        """Describes the blocks that are being read, for messages."""
        blocks = sorted(self._reading.copy())
        return f"{blocks[0]} and {len(blocks) - 1} others" if blocks else f"no read of {self.root_url}"

    def shards_of(self, blocks: np.ndarray) -> list[str]:
        """Path below the root of the tar that contains each stored block."""
        return [self._parts.without_blocks(part).path for part in self._table.part[blocks].tolist()]

    @property
    def largest_block_bytes(self) -> int:
        """Size of the largest stored block. A decoded block has about the same size."""
        return int(self._table.bytes.max())

    def _load(self, number: int) -> DecodedBlock:
        part, block = self._parts.without_blocks(self._table.part[number]), self._table[number]
        where = f"{objects.join(self.root_url, part.path)}, block {block.name}"
        self._reading.add(where)
        try:
            tokens_nN, keys, captions = read_block(self.root_url, part, block, self._disk)
        except UserError:
            raise
        except Exception as error:
            raise DataError(f"{where}: cannot be read ({type(error).__name__}: {error})") from error
        finally:
            self._reading.discard(where)
        if tokens_nN.ndim != 2 or tokens_nN.shape[1] != self.info.n_tokens:
            raise DataError(
                f"{where}: tokens of shape {tokens_nN.shape}, expected {self.info.n_tokens} per sample "
                f"(grid {self.info.grid}x{self.info.grid})"
            )
        if int(tokens_nN.max()) >= self.info.n_codes:
            raise DataError(f"{where}: image token {tokens_nN.max()}, expected codes below {self.info.n_codes}")
        if self._mask is not None:
            rows = self._kept_rows(number % self.n_blocks, len(keys))
            tokens_nN, keys, captions = tokens_nN[rows], [keys[row] for row in rows], [captions[row] for row in rows]
        texts = sum(map(sys.getsizeof, keys)) + sum(map(sys.getsizeof, captions))
        return DecodedBlock(tokens_nN, keys, captions, nbytes=tokens_nN.nbytes + texts)

    def _kept_rows(self, block: int, n: int) -> list[int]:
        """The rows of a stored block of `n` samples that are not masked."""
        assert self._mask is not None
        first = int(self._first_samples[block])
        bits = np.unpackbits(self._mask[first // 8 : -(-(first + n) // 8)])[first % 8 :][:n]
        return np.flatnonzero(bits == 0).tolist()


def _count_masked(mask: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Number of masked samples in each block, from packed bits and the sizes of the blocks."""
    ends, counts = np.cumsum(sizes), np.zeros(len(sizes), np.int64)
    for start in range(0, len(mask), MASK_BYTES):
        masked = np.flatnonzero(np.unpackbits(mask[start : start + MASK_BYTES])) + 8 * start
        counts += np.bincount(np.searchsorted(ends, masked, "right"), minlength=len(sizes))
    return counts


def _told_as_incomplete(root_url: str, manifest: DatasetManifest) -> str:
    if not manifest.missing:
        return (
            f"{root_url}: encoding is not finished; reading the {manifest.n_shards} finished shards. The reading order changes "
            "when more shards are finished"
        )
    return (
        f"{root_url}: {len(manifest.missing)} raw shards are not encoded ({', '.join(manifest.missing[:3])}"
        f"{', ...' if len(manifest.missing) > 3 else ''}); reading the {manifest.n_shards} finished shards. "
        "`dalle-ds data status` names the reasons"
    )
