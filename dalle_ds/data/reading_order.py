"""Reading order: which sample each lane of the global batch reads at each update, by (seed, epoch, manifest) alone.

The blocks of the split are permuted once an epoch. Every WINDOW_BLOCKS neighbours in that permutation form a window, whose
samples are permuted among themselves. The windows in a row are the epoch's order of all N samples. A global batch of G has
G lanes and an epoch S = N // G updates; lane l owns positions [l*S, (l+1)*S) of the order, and update `step` reads
position l*S + step of every lane. Rank r of W carries the neighbouring lanes [r*G/W, (r+1)*G/W).

What follows:
  - The global batch does not depend on the number of ranks. Any W that divides G continues any run exactly.
  - (epoch, step) says which samples were consumed; no list is kept. A seek computes one window for each lane.
  - A lane walks through its windows one after another, so a block is fetched about once an epoch as long as S is large
    against a window, and a rank keeps WINDOW_BLOCKS blocks for each of its lanes.
  - A batch mixes G far-apart places of a permuted list, so windows can be small.
  - N - S*G samples (fewer than G) are left out of an epoch: others in each, since the permutation differs.

Memory: two integers a block, a window's permutation a lane; never a list of samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dalle_ds.errors import ConfigError, DataError

WINDOW_BLOCKS = 8
_BLOCKS, _WINDOW = 0, 1  # the two uses of the seed


@dataclass(frozen=True)
class Place:
    """One sample: row `row` of block `block` (the manifest's order); `index` counts rows over all blocks before it too."""

    block: int
    row: int
    index: int


class ReadingOrder:
    """The order for blocks of the given sizes.

    Args:
        block_sizes: samples in each block, in the manifest's order.
        seed: of the run; equal seeds give equal orders on any machine and numpy version.
        global_batch: samples of one update over all ranks.

    Raises:
        DataError: fewer samples than one global batch.
    """

    def __init__(self, block_sizes: Sequence[int] | np.ndarray, *, seed: int, global_batch: int,
                 window_blocks: int = WINDOW_BLOCKS) -> None:
        if seed < 0 or global_batch < 1 or window_blocks < 1:
            raise ConfigError(f"seed {seed}, global_batch {global_batch}, window_blocks {window_blocks}: expected a seed of at "
                              "least 0 and at least 1 of the others")
        self.block_sizes = np.asarray(block_sizes, dtype=np.int64)
        self.n_samples = int(self.block_sizes.sum())
        if self.n_samples < global_batch:
            raise DataError(f"{self.n_samples} samples in {len(self.block_sizes)} blocks do not fill one global batch of "
                            f"{global_batch}; use more data or a smaller global batch")
        self.seed, self.global_batch, self.window_blocks = seed, global_batch, window_blocks
        self.steps_per_epoch = self.n_samples // global_batch
        self._first_index = np.cumsum(self.block_sizes) - self.block_sizes
        self._epoch = -1
        self._window_of_lane: dict[int, _Window] = {}

    def places(self, update: int, lanes: Sequence[int]) -> list[Place]:
        """The samples of the given lanes at update number `update` (0, 1, ... over all epochs), in the order of the lanes."""
        epoch, step = divmod(update, self.steps_per_epoch)
        self._enter(epoch)
        return [self._place(lane, lane * self.steps_per_epoch + step) for lane in lanes]

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._permuted_blocks = _permutation(len(self.block_sizes), self.seed, _BLOCKS, epoch)
        # Position of each permuted block's first sample, and one more entry for the end.
        self._starts = np.concatenate([[0], np.cumsum(self.block_sizes[self._permuted_blocks])])
        self._window_of_lane.clear()
        self._epoch = epoch

    def _place(self, lane: int, position: int) -> Place:
        window = self._window_of_lane.get(lane)
        if window is None or not window.start <= position < window.end:
            window = self._window_of_lane[lane] = self._window_at(position)
        at = position - window.start
        return Place(int(window.block[at]), int(window.row[at]), int(window.index[at]))

    def _window_at(self, position: int) -> "_Window":
        permuted = int(np.searchsorted(self._starts, position, side="right")) - 1
        number = permuted // self.window_blocks
        first = number * self.window_blocks
        starts = self._starts[first : first + self.window_blocks + 1]
        start, end = int(starts[0]), int(starts[-1])
        shuffled = start + _permutation(end - start, self.seed, _WINDOW, self._epoch, number)
        permuted_blocks = np.searchsorted(starts, shuffled, side="right") - 1
        block, row = self._permuted_blocks[first + permuted_blocks], shuffled - starts[permuted_blocks]
        return _Window(start, end, block, row, self._first_index[block] + row)


class _Window(NamedTuple):
    """Positions `start` to `end` of an epoch's order, and the sample at each of them."""

    start: int
    end: int
    block: np.ndarray
    row: np.ndarray
    index: np.ndarray


def rank_lanes(*, global_batch: int, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """The lanes of one rank, one range for each of its micro-batches.

    Raises:
        ConfigError: the global batch is no multiple of micro_batch * world_size.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank}, expected 0 to {world_size - 1}")
    if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * world_size):
        raise ConfigError(f"global batch {global_batch} is not a multiple of micro-batch {micro_batch} x {world_size} ranks = "
                          f"{micro_batch * world_size}")
    lanes_of_rank = global_batch // world_size
    first = rank * lanes_of_rank
    return [range(lane, lane + micro_batch) for lane in range(first, first + lanes_of_rank, micro_batch)]


def _permutation(n: int, *seed: int) -> np.ndarray:
    # numpy promises that the raw bits of a seeded generator stay as they are, but not what permutation() makes of them.
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int32)
