"""Token data set: one split of the token shards, checked against dataset.json and read block by block."""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalle_ds.data.manifest import BlockTable, Part, Split, load_dataset_info, load_manifest
from dalle_ds.data.shards import read_block
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.errors import DataError, UserError
from dalle_ds.storage import objects
from dalle_ds.storage.block_cache import BlockCache
from dalle_ds.storage.disk_cache import DiskCache
from dalle_ds.storage.fingerprint import fingerprint, require_same
from dalle_ds.storage.names import TOKENIZER_FILE

# n samples per block, N image tokens

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class DecodedBlock:
    tokens_nN: np.ndarray  # uint16
    keys: list[str]
    captions: list[str]
    nbytes: int


class TokenDataset:
    """One split of a token data set. Opening it checks that manifests and tokenizer match dataset.json.

    Args:
        root_url: folder of dataset.json: a path, a file:// or an s3:// URL.
        cache_bytes: maximum size of the in-memory cache of decoded blocks.
        disk: disk cache for stored blocks of an s3:// data set; None: no disk cache.

    Raises:
        DataError: the data set is missing, damaged or empty.
        FingerprintMismatch: a shard or the tokenizer belongs to another data set.
    """

    def __init__(
        self, root_url: str | Path, split: Split = "train", *, cache_bytes: int = CACHE_BYTES, disk: DiskCache | None = None
    ) -> None:
        self.root_url, self.split, self.cache_bytes = str(root_url), split, cache_bytes
        self.info = load_dataset_info(root_url)
        self.fingerprint = self.info.fingerprint
        manifest = load_manifest(root_url)
        for shard in manifest.shards:
            require_same(
                f"shard {shard.shard} of {root_url}",
                self.fingerprint,
                shard.fingerprint,
                "It was encoded for another data set (dVAE, tokenizer or crop).",
            )
        self.complete = manifest.complete  # if False, ranks that open the data set at different times may see different shards
        if not manifest.complete:
            log.warning(
                "%s: encoding is not finished; reading the %d finished shards. The reading order changes "
                "when more shards are finished",
                root_url,
                len(manifest.shards),
            )
        tokenizer_url = objects.join(root_url, TOKENIZER_FILE)
        self.tokenizer = CaptionTokenizer(tokenizer_url)
        require_same(
            f"tokenizer {tokenizer_url}",
            self.info.tokenizer,
            self.tokenizer.fingerprint,
            "The shards were encoded with another tokenizer.",
        )
        self._index_blocks(manifest.parts(split))
        if not self.n_samples:
            raise DataError(
                f"{root_url}: no samples in split {split!r}, {sum(manifest.n_samples.values())} samples in all splits; "
                f"validation_fraction is {self.info.validation_fraction}"
            )
        self._disk = disk if objects.is_s3(self.root_url) else None
        self._reading: set[str] = set()
        self._cache = BlockCache(self._load, cache_bytes)

    def _index_blocks(self, parts: Sequence[Part]) -> None:
        self._table = BlockTable(parts)
        self._parts = [part.model_copy(update={"columns": None}) for part in parts]  # the columns are in the table
        self.block_sizes = self._table.n_samples
        self.n_samples = int(self.block_sizes.sum())
        # `fingerprint` identifies how the data was made; this one identifies the samples and their order. An exact resume
        # compares it.
        self.content_fingerprint = fingerprint(
            {"parts": [[part.path, part.checksum] for part in parts]}, {"block_sizes": self.block_sizes}
        )

    @property
    def n_blocks(self) -> int:
        return len(self._table)

    def blocks(self, numbers: Iterable[int]) -> dict[int, DecodedBlock]:
        """Decoded blocks by number, from the cache or by parallel ranged GETs."""
        return self._cache.get(numbers)

    def reads_under_way(self) -> str:
        """Describes the blocks that are being read, for messages."""
        blocks = sorted(self._reading.copy())
        return f"{blocks[0]} and {len(blocks) - 1} others" if blocks else f"no read of {self.root_url}"

    def shards_of(self, blocks: np.ndarray) -> list[str]:
        """Path below the root of the tar that contains each block."""
        return [self._parts[part].path for part in self._table.part[blocks].tolist()]

    @property
    def largest_block_bytes(self) -> int:
        """Size of the largest stored block. A decoded block has about the same size."""
        return int(self._table.bytes.max())

    def _load(self, number: int) -> DecodedBlock:
        part, block = self._parts[self._table.part[number]], self._table[number]
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
        texts = sum(map(sys.getsizeof, keys)) + sum(map(sys.getsizeof, captions))
        return DecodedBlock(tokens_nN, keys, captions, nbytes=tokens_nN.nbytes + texts)
