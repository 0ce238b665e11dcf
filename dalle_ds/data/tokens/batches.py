"""Token batches for training and validating the prior, read from token data sets."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dalle_ds.data.sample_seeds import sample_generators
from dalle_ds.data.tokenizer import ID_BYTES
from dalle_ds.data.tokens.dataset import DecodedBlock, TokenDataset
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.data.tokens.mixture import MixtureOrder
from dalle_ds.data.tokens.order import WINDOW_BLOCKS, SampleLocations, slots_of_rank
from dalle_ds.data.tokens.prefetch import Prefetch
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.padding import PAD

# B batch, T text tokens (the model's text_len - 1, since the model prepends start-of-text), N image tokens

log = logging.getLogger(__name__)

BPE_DROPOUT = 0.1  # as in the paper
_DROPOUT, _CAPTION = 2, 3  # separate random streams of one seed; `order` uses 0 and 1


@dataclass(frozen=True)
class TokenBatch:
    """Samples of one micro-batch. `shards` names the shard of each sample, for diagnosis."""

    text_BT: torch.Tensor  # int64, padded on the right with PAD
    image_BN: torch.Tensor  # int64, in raster order
    keys: tuple[str, ...]
    captions: tuple[str, ...]  # as stored, also if caption dropout removed the caption from text_BT
    shards: tuple[str, ...]
    n_truncated: int  # number of captions with more than T tokens

    def __len__(self) -> int:
        return len(self.keys)


class TokenStream:
    """The micro-batches of one rank, update by update, over endless epochs. `order` and `mixture` define the sample order.

    If the images of a data set have several crops (`encode.crops`), each of its epochs reads the next crop of all images.

    Each item is the list of this rank's global_batch / (micro_batch * world_size) micro-batches of one update. Each data set
    has its own epochs. All items, including BPE and caption dropout, are a function of (seed, update, manifests): a stream
    started at update n, on any number of ranks, equals an uninterrupted stream from update n on.

    Args:
        mix: the data sets with their weights.
        text_len: the model's number of text positions. Captions are truncated to text_len - 1 tokens, since position 0 is
            start-of-text.
        bpe_dropout: probability of dropping a merge candidate; 0.1 in the paper.
        caption_dropout: probability that a sample's text is all PAD. The prior then also learns images without a caption, as
            classifier-free guidance needs. The paper does not use it. Other captions do not change.
        start_update: number of the first update to yield.
        prefetch: number of updates prepared ahead on a background thread.

    Raises:
        ConfigError: from the constructor, if a value is out of range or the global batch cannot be divided among the ranks.
        DataError: from the constructor, if a data set has too few samples for one update.
        DataError: from iteration, if a block is damaged or storage is unreachable; the message names the shard.
    """

    def __init__(
        self,
        mix: TokenMix,
        *,
        text_len: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        bpe_dropout: float,
        caption_dropout: float = 0.0,
        start_update: int = 0,
        prefetch: int = 2,
    ) -> None:
        if not 0.0 <= bpe_dropout <= 1.0 or start_update < 0:
            raise ConfigError(
                f"bpe_dropout {bpe_dropout}, start_update {start_update}: expected a probability from 0 to 1 and an "
                "update of at least 0"
            )
        if not 0.0 <= caption_dropout < 1.0:
            raise ConfigError(f"caption_dropout {caption_dropout}: expected a probability of at least 0 and below 1")
        slots = slots_of_rank(global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size)
        self._order = MixtureOrder(
            [dataset.block_sizes for dataset in mix.sets], mix.weights, seed=seed, global_batch=global_batch
        )
        # For a mix: the number of updates that read as many samples as all data sets have together.
        self.updates_per_epoch = mix.n_samples // global_batch
        self.next_update = start_update
        self.n_truncated = 0
        for dataset, n_windows in zip(mix.sets, self._order.n_windows(slots), strict=True):
            _warn_if_cache_is_small(dataset, n_windows)
        collate = _Collate(mix, text_len=text_len, bpe_dropout=bpe_dropout, caption_dropout=caption_dropout, seed=seed)
        self._prefetch = Prefetch(
            _updates(mix, self._order, slots, micro_batch, collate, start_update),
            prefetch,
            f"token-stream-{rank}",
            mix.reads_under_way,
        )

    @property
    def n_drawn(self) -> list[int]:
        """Number of samples of each data set in the updates yielded so far, over all ranks and restarts."""
        return self._order.n_drawn(self.next_update)

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> list[TokenBatch]:
        micro_batches = next(self._prefetch)
        self.next_update += 1
        self.n_truncated += sum(batch.n_truncated for batch in micro_batches)
        return micro_batches

    @property
    def wait_seconds(self) -> float:
        """Total time in seconds that the consumer has waited for data."""
        return self._prefetch.wait_seconds

    def close(self) -> None:
        """Stop the background thread. The stream cannot be read afterwards."""
        self._prefetch.close()

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def validation_batches(
    mix: TokenMix, *, text_len: int, batch: int, rank: int, world_size: int, limit: int | None = None
) -> list[TokenBatch]:
    """Validation batches of one rank, without dropout: the same at every call, and as many on every rank.

    All ranks together have the same samples, each once, whatever their number and that of the batches. So sizes of batches
    differ by one where samples do not divide: weight losses by samples. The samples of all data sets are read together: a data
    set counts by its number of validation samples, not by its weight.

    Args:
        batch: largest number of samples in a batch; batches of 1 become some of 2 where ranks would get unequally many.
        limit: maximum number of samples over all ranks, taken from blocks spread over the whole split. None: all samples.

    Raises:
        ConfigError: `batch` or `rank` is out of range.
        DataError: too few samples for one on every rank.
    """
    if batch < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"batch {batch}, rank {rank} of {world_size}: expected at least 1, and 0 to {world_size - 1}")
    wanted = mix.n_samples if limit is None else min(limit, mix.n_samples)
    if wanted < world_size:
        limited = "" if limit is None else f", at most {limit} are wanted"
        raise DataError(
            f"{wanted} samples for validation (split {mix.split!r} has {mix.n_samples}{limited}), "
            f"expected at least {world_size}: one on each of {world_size} ranks"
        )
    n_batches = min(-(-wanted // (batch * world_size)), wanted // world_size)
    collate = _Collate(mix, text_len=text_len, bpe_dropout=0.0, caption_dropout=0.0, seed=0)
    # Neighbouring samples to each rank: they are in one or two blocks, and each block is a request.
    locations = mix.stored(_spread_samples(mix.block_sizes, wanted))
    bounds = np.arange(rank * n_batches, (rank + 1) * n_batches + 1) * wanted // (n_batches * world_size)
    own = [locations[start:end] for start, end in pairwise(bounds.tolist())]
    return [collate(samples, mix.blocks(samples.block.tolist())) for samples in own]


def _spread_samples(block_sizes: np.ndarray, n: int) -> SampleLocations:
    # Whole blocks in a fixed shuffled order: a limit must select neither only the first shards nor one sample per GET.
    order = np.argsort(np.random.PCG64(0).random_raw(len(block_sizes)), kind="stable")
    order = order[: np.searchsorted(np.cumsum(block_sizes[order]), n) + 1]
    block = np.repeat(order, block_sizes[order])[:n]
    row = np.concatenate([np.arange(size) for size in block_sizes[order]])[:n]
    return SampleLocations(block, row, (np.cumsum(block_sizes) - block_sizes)[block] + row, np.zeros_like(row))


class _Collate:
    """Makes a TokenBatch from sample locations, whose blocks are numbered as stored, and decoded blocks."""

    def __init__(self, mix: TokenMix, *, text_len: int, bpe_dropout: float, caption_dropout: float, seed: int) -> None:
        if text_len < 2:
            raise ConfigError(f"text_len is {text_len}, expected at least 2: start-of-text and one token")
        self._mix, self._n_text, self._seed = mix, text_len - 1, seed
        self._p, self._p_caption = bpe_dropout, caption_dropout

    def __call__(self, samples: SampleLocations, blocks: Mapping[int, DecodedBlock]) -> TokenBatch:
        found = [blocks[block] for block in samples.block.tolist()]
        rows = samples.row.tolist()
        image_BN = np.empty((len(rows), self._mix.info.n_tokens), dtype=np.int64)
        for image_N, block, row in zip(image_BN, found, rows, strict=True):
            image_N[:] = block.tokens_nN[row]
        captions = tuple([block.captions[row] for block, row in zip(found, rows, strict=True)])
        text_BT, n_truncated = self._text(captions, samples)
        return TokenBatch(
            text_BT=torch.from_numpy(text_BT),
            image_BN=torch.from_numpy(image_BN),
            keys=tuple([block.keys[row] for block, row in zip(found, rows, strict=True)]),
            captions=captions,
            shards=tuple(self._mix.shards_of(samples.block)),
            n_truncated=n_truncated,
        )

    def _text(self, captions: tuple[str, ...], samples: SampleLocations) -> tuple[np.ndarray, int]:
        packed = self._pack(captions, samples)
        lengths = np.array(list(map(len, packed))) // ID_BYTES
        if n_truncated := int((lengths > self._n_text).sum()):
            packed = [ids[: self._n_text * ID_BYTES] for ids in packed]
        text_BT = np.full((len(captions), self._n_text), PAD, dtype=np.int64)
        # The mask selects the first lengths[i] columns of row i: one assignment instead of a Python loop.
        text_BT[np.arange(self._n_text) < lengths[:, None]] = np.frombuffer(b"".join(packed), dtype=np.int32)
        return text_BT, n_truncated

    def _pack(self, captions: tuple[str, ...], samples: SampleLocations) -> list[bytes]:
        tokenizer = self._mix.tokenizer
        if self._p == 0.0:
            packed = list(map(tokenizer.pack, captions))
        else:
            # Seed by sample, not by rank: the dropped merges must not depend on the number of ranks.
            seeded = sample_generators(self._seed, _DROPOUT, samples.epoch, samples.index)
            packed = [
                tokenizer.pack_with_dropout(caption, self._p, np.random.Generator(bits))
                for caption, bits in zip(captions, seeded, strict=True)
            ]
        if self._p_caption > 0.0:
            # A separate random stream: caption dropout does not change the draws of BPE dropout.
            seeded = sample_generators(self._seed, _CAPTION, samples.epoch, samples.index)
            packed = [
                b"" if bits.random_raw() < self._p_caption * 2.0**64 else ids for ids, bits in zip(packed, seeded, strict=True)
            ]
        return packed


def _updates(
    mix: TokenMix, order: MixtureOrder, slots: range, micro_batch: int, collate: _Collate, update: int
) -> Iterator[list[TokenBatch]]:
    while True:
        samples = mix.stored(order.locations(update, slots))
        # Request all blocks of the update at once: missing blocks are fetched in parallel.
        blocks = mix.blocks(samples.block.tolist())
        yield [collate(of_micro_batch, blocks) for of_micro_batch in samples.split(micro_batch)]
        update += 1


def _warn_if_cache_is_small(dataset: TokenDataset, n_windows: int) -> None:
    in_use = min(n_windows * WINDOW_BLOCKS, dataset.n_blocks) * dataset.largest_block_bytes
    if in_use > dataset.cache_bytes:
        log.warning(
            "%s: %d samples of each batch on this rank keep %.1f MiB of blocks in use, but the cache holds %.1f MiB: "
            "blocks will be read repeatedly; increase cache_bytes or use more ranks",
            dataset.root_url,
            n_windows,
            in_use / 2**20,
            dataset.cache_bytes / 2**20,
        )
