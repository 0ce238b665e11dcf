"""The order in which one data set is read: which sample every slot of the global batch gets at every update.

An example: N = 12 samples in 6 blocks of 2, numbered as they are stored; a global batch of G = 3; windows of 3 blocks; seed 0.

    1. The blocks are permuted:                   3 2 1 0 4 5
    2. Every 3 neighbours are a window:           3 2 1 | 0 4 5
    3. Samples are permuted within their window:  2 3 7 4 6 5 | 11 10 0 1 9 8
    4. An epoch has S = N // G = 4 updates. Slot s of the batch reads positions s * S to s * S + S - 1 of that order, one at
       each update:

                   slot 0   slot 1   slot 2
        update 0   2        6        0
        update 1   3        5        1
        update 2   7        11       9
        update 3   4        10       8

    Updates 4 to 7 are the next epoch, with other permutations. Rank r of W carries the neighbouring slots r * G / W to
    (r + 1) * G / W - 1: of three ranks here, each carries one column.

What holds:
  - The order is a function of (seed, epoch, block sizes). Nothing is stored: the number of the update says what was read.
  - The global batch does not depend on the number of ranks. Any W that divides G continues any run exactly.
  - An epoch has no sample twice. It leaves out N - S * G samples, fewer than G, and others than the next epoch.
  - A slot walks through its windows one after another. So a block is fetched about once an epoch where S is large against a
    window, and a rank holds WINDOW_BLOCKS blocks for each of its slots.
  - A batch mixes G far-apart positions of a permuted list, so windows can be small.
  - A seek computes one window for each slot. Memory: a few integers a block, one window's permutation a slot, never a list of
    samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dalle_ds.errors import ConfigError

WINDOW_BLOCKS = 8
_BLOCKS, _WINDOW, _USES = 0, 1, 4  # uses of the seed; numbers of one set are so many apart from the next one's


@dataclass(frozen=True)
class SampleLocations:
    """Where samples lie, an entry for each: in row `row` of block `block`, counted through all sets in their manifests' order.

    `index` is the sample's number among those of all sets; `epoch` is its own set's.
    """

    block: np.ndarray
    row: np.ndarray
    index: np.ndarray
    epoch: np.ndarray

    @classmethod
    def empty(cls, n: int) -> "SampleLocations":
        """`n` entries to be filled."""
        return cls(*np.empty((4, n), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.block)

    def split(self, size: int) -> "list[SampleLocations]":
        """The same in pieces of `size`."""
        fields = (self.block, self.row, self.index, self.epoch)
        return [SampleLocations(*(field[i : i + size] for field in fields)) for i in range(0, len(self), size)]


class SetOrder:
    """The samples of one set, permuted anew in every epoch.

    Args:
        block_sizes: samples in each block, in the manifest's order.
        updates_per_epoch: S above.
        set_number, first_block, first_index: the set's place among those that are read together, whose blocks and samples are
            numbered through.
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
        """Permute the blocks for an epoch, unless they are already."""
        if epoch == self._epoch:
            return
        self._permuted_blocks = _permutation(len(self._block_sizes), self._seed, self._first_use + _BLOCKS, epoch)
        # Position of each permuted block's first sample, and one more entry for the end.
        self._starts = np.concatenate([[0], np.cumsum(self._block_sizes[self._permuted_blocks])])
        self._epoch = epoch

    def window_at(self, position: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        """The window around a position of the epoch: its first position, its end, block and row of each sample in it."""
        permuted = int(np.searchsorted(self._starts, position, side="right")) - 1
        number = permuted // self._window_blocks
        first = number * self._window_blocks
        starts = self._starts[first : first + self._window_blocks + 1]
        start, end = int(starts[0]), int(starts[-1])
        shuffled = start + _permutation(end - start, self._seed, self._first_use + _WINDOW, self._epoch, number)
        permuted_blocks = np.searchsorted(starts, shuffled, side="right") - 1
        return start, end, self._permuted_blocks[first + permuted_blocks], shuffled - starts[permuted_blocks]


class SlotReader:
    """Some batch slots of one set, each with the window that it stands in."""

    def __init__(self, order: SetOrder, slots: Sequence[int] | np.ndarray) -> None:
        """`slots`: their numbers among those of this set."""
        self._order, self._slots = order, np.asarray(slots, dtype=np.int64)
        self._epoch = -1
        self._starts, self._ends = np.zeros((2, len(self._slots)), dtype=np.int64)
        self._each = np.arange(len(self._slots))
        self._windows = np.empty((2, len(self._slots), 0), dtype=np.int32)  # block and row by position in the slot's window

    def read(self, found: SampleLocations, at: np.ndarray, update: int) -> None:
        """Put each slot's sample of an update into the entries `at` of `found`."""
        epoch, step = divmod(update, self._order.updates_per_epoch)
        self.read_positions(found, at, epoch, self._slots * self._order.updates_per_epoch + step)

    def read_positions(self, found: SampleLocations, at: np.ndarray, epoch: int, positions: np.ndarray) -> None:
        """Put the sample at each slot's position of an epoch into the entries `at` of `found`."""
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
    """The batch slots of one rank, its micro-batches one after another.

    Raises:
        ConfigError: the global batch is no multiple of micro_batch * world_size.
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
    # numpy promises that the raw bits of a seeded generator stay as they are, but not what permutation() makes of them.
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int32)
