"""Token batches: what the prior trains on and is validated on, drawn from a token data set."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dalle_ds.data.prefetch import Prefetch
from dalle_ds.data.reading_order import WINDOW_BLOCKS, Place, ReadingOrder, rank_lanes
from dalle_ds.data.token_dataset import DecodedBlock, TokenDataset
from dalle_ds.errors import ConfigError, DataError

# B batch, T text tokens (the model's text length - 1: it puts start-of-text before them), N image tokens

log = logging.getLogger(__name__)

PAD = -1
_DROPOUT, _CAPTION = 2, 3  # uses of the seed, beside the two of the reading order


@dataclass(frozen=True)
class TokenBatch:
    """Samples of one micro-batch. `shards` says where each one came from, for diagnosis."""

    text_BT: torch.Tensor  # int64, PAD at the right
    image_BN: torch.Tensor  # int64, raster order
    keys: tuple[str, ...]
    captions: tuple[str, ...]  # as stored, dropped ones too
    shards: tuple[str, ...]
    n_truncated: int  # captions with more than T tokens

    def __len__(self) -> int:
        return len(self.keys)


class TokenStream:
    """The micro-batches of one rank, update after update, over epochs without end; see `reading_order` for which samples.

    Each item is the list of the rank's global_batch / (micro_batch * world_size) micro-batches of one update. Update n
    belongs to epoch n // steps_per_epoch. All of it, both dropouts included, is a function of (seed, update, manifest): a
    stream started at update n on any number of ranks gives what an uninterrupted one would have given.

    Args:
        text_len: the model's text slots; captions are cut to text_len - 1 tokens (slot 0 is start-of-text).
        bpe_dropout: chance to drop a merge candidate; the paper has 0.1.
        caption_dropout: chance that a sample's text is all PAD, so that the prior learns pictures without a caption too and can
            be sampled with classifier-free guidance; the paper has none. Kept captions stay as they would be without it.
        start_update: number of the first update to give.
        prefetch: updates made ahead on a background thread.

    Raises:
        ConfigError, DataError: at birth, where the batch does not divide or the data does not fill one.
        DataError: from iteration, naming the shard, where a block is damaged or storage stayed out of reach.
    """

    def __init__(self, dataset: TokenDataset, *, text_len: int, global_batch: int, micro_batch: int, rank: int, world_size: int,
                 seed: int, bpe_dropout: float, caption_dropout: float = 0.0, start_update: int = 0, prefetch: int = 2) -> None:
        if not 0.0 <= bpe_dropout <= 1.0 or start_update < 0:
            raise ConfigError(f"bpe_dropout {bpe_dropout}, start_update {start_update}: expected a chance from 0 to 1 and an "
                              "update of at least 0")
        if not 0.0 <= caption_dropout < 1.0:
            raise ConfigError(f"caption_dropout {caption_dropout}: expected a chance of at least 0 and below 1")
        lanes = rank_lanes(global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size)
        order = ReadingOrder(dataset.block_sizes, seed=seed, global_batch=global_batch)
        self.steps_per_epoch = order.steps_per_epoch
        self.n_left_out = order.n_samples - order.steps_per_epoch * global_batch  # of each epoch, others in each
        self.next_update = start_update
        self.n_truncated = 0
        _warn_if_cache_is_small(dataset, n_lanes=len(lanes) * micro_batch)
        collate = _Collate(dataset, text_len=text_len, bpe_dropout=bpe_dropout, caption_dropout=caption_dropout, seed=seed)
        self._prefetch = Prefetch(_updates(dataset, order, lanes, collate, start_update), prefetch, f"token-stream-{rank}",
                                  dataset.reads_under_way)

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> list[TokenBatch]:
        micro_batches = next(self._prefetch)
        self.next_update += 1
        self.n_truncated += sum(batch.n_truncated for batch in micro_batches)
        return micro_batches

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for data so far."""
        return self._prefetch.wait_seconds

    def close(self) -> None:
        """Stop the background thread. The stream cannot be read on."""
        self._prefetch.close()

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ValidationBatches(list[TokenBatch]):
    """The rank's validation batches; `n_samples` are read over all ranks, `n_dropped` (of the split or the limit) are not."""

    def __init__(self, batches: Iterable[TokenBatch], *, n_samples: int, n_dropped: int) -> None:
        super().__init__(batches)
        self.n_samples, self.n_dropped = n_samples, n_dropped


def validation_batches(dataset: TokenDataset, *, text_len: int, batch: int, rank: int, world_size: int,
                       limit: int | None = None) -> ValidationBatches:
    """The same samples at every call, without dropout, equally many batches on all ranks.

    Args:
        limit: samples over all ranks at most; they come from blocks all over the split. None: all of them.

    Raises:
        DataError: too few samples for one batch on every rank.
    """
    if batch < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"batch {batch}, rank {rank} of {world_size}: expected at least 1, and 0 to {world_size - 1}")
    wanted = dataset.n_samples if limit is None else min(limit, dataset.n_samples)
    n_batches = wanted // (batch * world_size)
    if n_batches == 0:
        raise DataError(f"{wanted} samples of split {dataset.split!r} to validate on, expected at least {batch * world_size}: "
                        f"one batch of {batch} on each of {world_size} ranks")
    n_samples = n_batches * batch * world_size
    places = _spread_places(dataset.block_sizes, n_samples)
    collate = _Collate(dataset, text_len=text_len, bpe_dropout=0.0, caption_dropout=0.0, seed=0)
    starts = [(i * world_size + rank) * batch for i in range(n_batches)]
    ours = [places[start : start + batch] for start in starts]
    batches = [collate(chosen, dataset.blocks(place.block for place in chosen), epoch=0) for chosen in ours]
    return ValidationBatches(batches, n_samples=n_samples, n_dropped=wanted - n_samples)


def _spread_places(block_sizes: np.ndarray, n: int) -> list[Place]:
    # Whole blocks in a fixed shuffled order: a limit must not mean the first shards only, nor a GET a sample.
    first_index = np.cumsum(block_sizes) - block_sizes
    places: list[Place] = []
    for block in np.argsort(np.random.PCG64(0).random_raw(len(block_sizes)), kind="stable").tolist():
        if len(places) >= n:
            break
        places += [Place(block, row, int(first_index[block]) + row) for row in range(int(block_sizes[block]))]
    return places[:n]


class _Collate:
    """Places to a TokenBatch."""

    def __init__(self, dataset: TokenDataset, *, text_len: int, bpe_dropout: float, caption_dropout: float, seed: int) -> None:
        if text_len < 2:
            raise ConfigError(f"text_len is {text_len}, expected at least 2: start-of-text and one token")
        self._dataset, self._n_text, self._seed = dataset, text_len - 1, seed
        self._p, self._p_caption = bpe_dropout, caption_dropout

    def __call__(self, places: Sequence[Place], blocks: Mapping[int, DecodedBlock], *, epoch: int) -> TokenBatch:
        text_BT = np.full((len(places), self._n_text), PAD, dtype=np.int64)
        n_truncated = 0
        for row, place in zip(text_BT, places, strict=True):
            if self._drops_caption(epoch, place.index):
                continue
            tokens = self._encode(blocks[place.block].captions[place.row], epoch, place.index)
            n_truncated += len(tokens) > self._n_text
            row[: len(tokens)] = tokens[: self._n_text]
        return TokenBatch(
            text_BT=torch.from_numpy(text_BT),
            image_BN=torch.from_numpy(np.stack([blocks[p.block].tokens_nN[p.row] for p in places]).astype(np.int64)),
            keys=tuple(blocks[p.block].keys[p.row] for p in places),
            captions=tuple(blocks[p.block].captions[p.row] for p in places),
            shards=tuple(self._dataset.shard_of(p.block) for p in places),
            n_truncated=n_truncated)

    def _drops_caption(self, epoch: int, index: int) -> bool:
        if self._p_caption == 0.0:
            return False
        # A use of the seed of its own: with or without it, BPE dropout draws the same for this sample.
        bits = np.random.PCG64(np.random.SeedSequence((self._seed, _CAPTION, epoch, index))).random_raw()
        return bits < self._p_caption * 2.0**64

    def _encode(self, caption: str, epoch: int, index: int) -> list[int]:
        if self._p == 0.0:
            return self._dataset.tokenizer.encode(caption)
        # Seeded by the sample, not by the rank: another number of ranks must drop the same merges.
        seed = np.random.SeedSequence((self._seed, _DROPOUT, epoch, index))
        return self._dataset.tokenizer.encode_with_dropout(caption, self._p, np.random.Generator(np.random.PCG64(seed)))


def _updates(dataset: TokenDataset, order: ReadingOrder, lanes: Sequence[range], collate: _Collate,
             update: int) -> Iterator[list[TokenBatch]]:
    while True:
        places = [order.places(update, lanes_of_micro_batch) for lanes_of_micro_batch in lanes]
        # All of the update's missing blocks at once: they are fetched side by side.
        blocks = dataset.blocks(place.block for micro_batch in places for place in micro_batch)
        epoch = update // order.steps_per_epoch
        yield [collate(micro_batch, blocks, epoch=epoch) for micro_batch in places]
        update += 1


def _warn_if_cache_is_small(dataset: TokenDataset, n_lanes: int) -> None:
    in_use = min(n_lanes * WINDOW_BLOCKS, dataset.n_blocks) * dataset.largest_block_bytes
    if in_use > dataset.cache_bytes:
        log.warning("%s: %d samples of each batch on this rank keep %.1f MiB of blocks in use, the cache holds %.1f MiB: "
                    "blocks will be read many times over; raise cache_bytes or use more ranks", dataset.root_url, n_lanes,
                    in_use / 2**20, dataset.cache_bytes / 2**20)
