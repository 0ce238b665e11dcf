"""The reading order of one data set: which sample each slot of the global batch reads at each update.

An example: N = 12 samples in 6 blocks of 2, numbered in stored order; a global batch of G = 3; windows of 3 blocks; seed 0.

    1. The blocks are permuted:                   3 2 1 0 4 5
    2. Every 3 consecutive blocks are a window:   3 2 1 | 0 4 5
    3. Samples are permuted within their window:  2 3 7 4 6 5 | 11 10 0 1 9 8
    4. An epoch has S = N // G = 4 updates. Slot s of the batch reads the positions s * S to s * S + S - 1 of this order, one
       per update:

                   slot 0   slot 1   slot 2
        update 0   2        6        0
        update 1   3        5        1
        update 2   7        11       9
        update 3   4        10       8

    Updates 4 to 7 are the next epoch, with other permutations. Rank r of W reads the consecutive slots r * G / W to
    (r + 1) * G / W - 1: with three ranks here, each reads one column.

Properties:
  - The order is a function of (seed, epoch, block sizes). No state is stored: the update number determines the samples read.
  - The global batch does not depend on the number of ranks. Any W that divides G continues any run exactly.
  - An epoch reads no sample twice. It skips N - S * G samples, fewer than G. The next epoch skips other samples.
  - A slot reads its windows one after another. If S is large compared with a window, each block is fetched about once per
    epoch. A rank keeps WINDOW_BLOCKS blocks in use for each of its slots.
  - A batch combines G distant positions of a permuted list, so windows can be small.
  - A seek computes one window per slot. Memory: a few integers per block and one window's permutation per slot, never a list
    of all samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dalle_ds.errors import ConfigError

WINDOW_BLOCKS = 8
_BLOCKS, _WINDOW, _USES = 0, 1, 4  # separate random streams of one seed; data set i uses the stream numbers from i * _USES on


@dataclass(frozen=True)
class SampleLocations:
    """Locations of samples, one entry each: row `row` of block `block`.

    Blocks are numbered consecutively over all data sets, in the order of their manifests. `index` is the sample's number among
    the samples of all data sets; `epoch` is the epoch of its own data set.
    """

    block: np.ndarray
    row: np.ndarray
    index: np.ndarray
    epoch: np.ndarray

    @classmethod
    def empty(cls, n: int) -> "SampleLocations":
        """`n` uninitialized entries."""
        return cls(*np.empty((4, n), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.block)

    def split(self, size: int) -> "list[SampleLocations]":
        """The same locations in consecutive parts of `size` entries."""
        return [self[i : i + size] for i in range(0, len(self), size)]

    def __getitem__(self, part: slice) -> "SampleLocations":
        return SampleLocations(self.block[part], self.row[part], self.index[part], self.epoch[part])


class SetOrder:
    """The samples of one data set, with a new permutation in every epoch.

    Args:
        block_sizes: number of samples in each block, in the manifest's order.
        updates_per_epoch: S above.
        seed: of the run.
        window_blocks: number of blocks per window.
        set_number: index of this data set among the data sets of a mixture.
        first_block, first_index: numbers of this data set's first block and first sample in the mixture.
    """

    def __init__(
        self,
        block_sizes: np.ndarray,
        *,
        updates_per_epoch: int,
        seed: int,
        window_blocks: int = WINDOW_BLOCKS,
        set_number: int = 0,
        first_block: int = 0,
        first_index: int = 0,
    ) -> None:
        self.updates_per_epoch = updates_per_epoch
        self.first_block, self.first_index = first_block, first_index + np.cumsum(block_sizes) - block_sizes
        self._block_sizes, self._window_blocks = block_sizes, window_blocks
        self._seed, self._first_use = seed, set_number * _USES
        self._epoch = -1

    def enter(self, epoch: int) -> None:
        """Permute the blocks for an epoch. Does nothing if `epoch` is the current epoch."""
        if epoch == self._epoch:
            return
        self._permuted_blocks = _permutation(len(self._block_sizes), self._seed, self._first_use + _BLOCKS, epoch)
        # Position of the first sample of each permuted block, followed by the end position.
        self._starts = np.concatenate([[0], np.cumsum(self._block_sizes[self._permuted_blocks])])
        self._epoch = epoch

    def window_at(self, position: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        """The window that contains a position of the epoch: (first position, end, block and row of each sample in it)."""
        permuted = int(np.searchsorted(self._starts, position, side="right")) - 1
        number = permuted // self._window_blocks
        first = number * self._window_blocks
        starts = self._starts[first : first + self._window_blocks + 1]
        start, end = int(starts[0]), int(starts[-1])
        shuffled = start + _permutation(end - start, self._seed, self._first_use + _WINDOW, self._epoch, number)
        permuted_blocks = np.searchsorted(starts, shuffled, side="right") - 1
        return start, end, self._permuted_blocks[first + permuted_blocks], shuffled - starts[permuted_blocks]


class SlotReader:
    """Reads samples for some batch slots of one data set; keeps the current window of each slot."""

    def __init__(self, order: SetOrder, slots: Sequence[int] | np.ndarray) -> None:
        """`slots`: numbers of these slots among the slots of this data set."""
        self._order, self._slots = order, np.asarray(slots, dtype=np.int64)
        self._epoch = -1
        self._starts, self._ends = np.zeros((2, len(self._slots)), dtype=np.int64)
        self._each = np.arange(len(self._slots))
        self._windows = np.empty((2, len(self._slots), 0), dtype=np.int32)  # block and row by position in the slot's window

    def read(self, found: SampleLocations, at: np.ndarray, update: int) -> None:
        """Write the location of each slot's sample at `update` into the entries `at` of `found`."""
        epoch, step = divmod(update, self._order.updates_per_epoch)
        self.read_positions(found, at, epoch, self._slots * self._order.updates_per_epoch + step)

    def read_positions(self, found: SampleLocations, at: np.ndarray, epoch: int, positions: np.ndarray) -> None:
        """Write the location of the sample at each slot's position in `epoch` into the entries `at` of `found`."""
        order = self._order
        order.enter(epoch)
        if epoch != self._epoch:
            self._epoch, self._ends[:] = epoch, 0
        for slot in np.flatnonzero((positions < self._starts) | (positions >= self._ends)).tolist():
            self._enter_window(slot, int(positions[slot]))
        block, row = self._windows[:, self._each, positions - self._starts]
        found.block[at], found.row[at] = block + order.first_block, row
        found.index[at], found.epoch[at] = order.first_index[block] + row, epoch

    def _enter_window(self, slot: int, position: int) -> None:
        start, end, block, row = self._order.window_at(position)
        self._starts[slot], self._ends[slot], size = start, end, end - start
        if size > self._windows.shape[2]:
            wider = np.empty((2, len(self._slots), size), dtype=np.int32)
            wider[:, :, : self._windows.shape[2]] = self._windows
            self._windows = wider
        self._windows[:, slot, :size] = block, row


def slots_of_rank(*, global_batch: int, micro_batch: int, rank: int, world_size: int) -> range:
    """The batch slots of one rank: the slots of its first micro-batch, then of its second, and so on.

    Raises:
        ConfigError: `rank` is out of range, or the global batch is not a multiple of micro_batch * world_size.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank}, expected 0 to {world_size - 1}")
    if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * world_size):
        raise ConfigError(
            f"global batch {global_batch} is not a multiple of micro-batch {micro_batch} x {world_size} ranks = "
            f"{micro_batch * world_size}"
        )
    n_slots = global_batch // world_size
    return range(rank * n_slots, (rank + 1) * n_slots)


def _permutation(n: int, *seed: int) -> np.ndarray:
    # numpy guarantees stable raw bits of a seeded generator across versions, but not a stable permutation().
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int32)
