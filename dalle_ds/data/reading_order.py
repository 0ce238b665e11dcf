"""Reading order: which sample each lane of the global batch reads at each update, by (seed, update, manifests) alone.

The blocks of a set are permuted once an epoch. Every WINDOW_BLOCKS neighbours in that permutation form a window, whose
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

Several sets by weight. Over PERIOD updates each set gives a whole number q of the PERIOD * G samples, as near to its weight as
whole numbers go. It owns q // PERIOD lanes of the batch for good, spread evenly among those of the others. What is left of all
the quotas, q % PERIOD a set, fills the few lanes (fewer than sets) that are shared: over a period their samples are dealt to
the sets in one fixed sequence, evenly spaced. So a set of share f = q / PERIOD reads, beside its whole lanes, one lane more at
the slower pace of its remainder. It has epochs of its own, of S updates: lane l of its own owns positions [l*S, (l+1)*S) of its
order as above, and the slower lane counts on from behind them. S is the largest that surely fits, so that an epoch has no
sample twice; of K sets, it leaves out fewer than f + 2K + 4. Up to any update a set has given f samples an update, at most
K/2 + 1 more or less. All of it is arithmetic on the update's number: a seek with many sets costs what it costs with one.

Memory: a few integers a block, a window's permutation a lane; never a list of samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dalle_ds.errors import ConfigError, DataError

WINDOW_BLOCKS = 8
PERIOD = 1000  # updates
_BLOCKS, _WINDOW, _USES = 0, 1, 4  # uses of the seed; numbers of one set are so many apart from the next one's


@dataclass(frozen=True)
class Places:
    """Samples, an entry each: row `row` of block `block` (the manifests' order); `index` counts rows over all blocks before it
    too, and `epoch` is that of the sample's own set. Blocks and rows are counted through all sets."""

    block: np.ndarray
    row: np.ndarray
    index: np.ndarray
    epoch: np.ndarray

    def __len__(self) -> int:
        return len(self.block)

    def split(self, size: int) -> "list[Places]":
        """The same in pieces of `size`."""
        return [
            Places(self.block[i : i + size], self.row[i : i + size], self.index[i : i + size], self.epoch[i : i + size])
            for i in range(0, len(self), size)
        ]


class ReadingOrder:
    """The order for sets with blocks of the given sizes.

    Args:
        sets: samples in each block of each set, in its manifest's order.
        weights: share of each set in the samples, to any sum.
        seed: of the run; equal seeds give equal orders on any machine and numpy version.
        global_batch: samples of one update over all ranks.

    Raises:
        DataError: fewer samples in a set than it gives to one update.
        ConfigError: a weight that is no share, or too small for one sample in PERIOD updates.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[int] | np.ndarray],
        weights: Sequence[float] = (1.0,),
        *,
        seed: int,
        global_batch: int,
        window_blocks: int = WINDOW_BLOCKS,
    ) -> None:
        if seed < 0 or global_batch < 1 or window_blocks < 1:
            raise ConfigError(
                f"seed {seed}, global_batch {global_batch}, window_blocks {window_blocks}: expected a seed of at "
                "least 0 and at least 1 of the others"
            )
        self.seed, self.global_batch = seed, global_batch
        self._quotas = _quotas(weights, PERIOD * global_batch)
        self._n_lanes, remainders = self._quotas // PERIOD, self._quotas % PERIOD
        self._n_shared = int(remainders.sum()) // PERIOD
        # Which set each slot of the batch reads, and by which of its lanes; number len(sets) stands for the shared slots.
        self._set_of_slot = _evenly([*self._n_lanes.tolist(), self._n_shared])
        self._lane_of_slot = _counts_before(self._set_of_slot, len(sets) + 1)[np.arange(global_batch), self._set_of_slot]
        # The sets of the shared slots over a period, slot after slot, update after update.
        self._sequence = _evenly(remainders.tolist())
        self._given = np.concatenate([_counts_before(self._sequence, len(sets)), [remainders]])
        self._sets: list[_SetOrder] = []
        first_block = first_index = 0
        for number, sizes in enumerate(sets):
            slack = len(sets) + 2 if remainders[number] else 0
            order = _SetOrder(np.asarray(sizes, dtype=np.int64), seed, number, window_blocks, first_block, first_index)
            order.steps = max(0, order.n_samples - slack) * PERIOD // int(self._quotas[number])
            if not order.steps:
                which, what = "", "one"
                if len(sets) > 1:
                    which, what = f" of set {number + 1}", f"its share of {self._quotas[number] / PERIOD:g} samples in one"
                raise DataError(
                    f"{order.n_samples} samples in {len(sizes)} blocks{which} do not fill {what} global batch of "
                    f"{global_batch}; use more data or a smaller global batch"
                )
            self._sets.append(order)
            first_block, first_index = first_block + len(sizes), first_index + order.n_samples
        self._slots: Sequence[int] | None = None

    @property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Updates that an epoch of each set takes."""
        return tuple(order.steps for order in self._sets)

    def n_drawn(self, update: int) -> list[int]:
        """Samples that each set has given before update number `update`."""
        return (update * self._n_lanes + self._shared_before(update * self._n_shared)).tolist()

    def lanes_by_set(self, slots: Sequence[int]) -> list[int]:
        """How many lanes of each set these slots of the batch read, the slower ones of shared slots too."""
        of_slots = self._set_of_slot[slots]
        is_shared = bool((of_slots == len(self._sets)).any())
        return [
            int((of_slots == number).sum()) + (is_shared and quota % PERIOD > 0)
            for number, quota in enumerate(self._quotas.tolist())
        ]

    def places(self, update: int, slots: Sequence[int]) -> Places:
        """The samples of these slots of the batch at update number `update` (0, 1, ... over all epochs), in their order."""
        if slots != self._slots:
            self._slots, self._readers = slots, self._readers_of(np.asarray(slots, dtype=np.int64))
            self._shared = np.flatnonzero(self._set_of_slot[slots] == len(self._sets)).tolist()
        places = Places(*np.empty((4, len(slots)), dtype=np.int64))
        for at, reader, lanes in self._readers:
            epoch, step = divmod(update, reader.order.steps)
            reader.read(places, at, epoch, lanes * reader.order.steps + step)
        for at in self._shared:
            self._read_shared(places, at, update, int(self._lane_of_slot[slots[at]]))
        return places

    def _readers_of(self, slots: np.ndarray) -> list[tuple[np.ndarray, "_Reader", np.ndarray]]:
        set_of_slot, readers = self._set_of_slot[slots], []
        for number, order in enumerate(self._sets):
            at = np.flatnonzero(set_of_slot == number)
            if len(at):
                readers.append((at, _Reader(order, len(at)), self._lane_of_slot[slots[at]]))
        return readers

    def _read_shared(self, places: Places, at: int, update: int, shared_slot: int) -> None:
        slot = update * self._n_shared + shared_slot
        number = int(self._sequence[slot % len(self._sequence)])
        order = self._sets[number]
        epoch = update // order.steps
        epoch_began = epoch * order.steps * self._n_shared
        nth = int(self._shared_before(slot)[number] - self._shared_before(epoch_began)[number])
        position = np.array([self._n_lanes[number] * order.steps + nth])
        order.slow_reader.read(places, np.array([at]), epoch, position)

    def _shared_before(self, slot: int) -> np.ndarray:
        """Samples of each set in the shared slots before number `slot`, counted over all updates."""
        periods, rest = divmod(slot, max(1, len(self._sequence)))
        return periods * self._given[-1] + self._given[rest]


class _SetOrder:
    """The order of one set in one epoch after another."""

    def __init__(
        self, block_sizes: np.ndarray, seed: int, number: int, window_blocks: int, first_block: int, first_index: int
    ) -> None:
        self.block_sizes, self.n_samples, self.steps = block_sizes, int(block_sizes.sum()), 0
        self.first_block, self.first_index = first_block, first_index + np.cumsum(block_sizes) - block_sizes
        self.slow_reader = _Reader(self, 1)
        self._seed, self._number, self._window_blocks = seed, number * _USES, window_blocks
        self._epoch = -1

    def enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._permuted_blocks = _permutation(len(self.block_sizes), self._seed, self._number + _BLOCKS, epoch)
        # Position of each permuted block's first sample, and one more entry for the end.
        self._starts = np.concatenate([[0], np.cumsum(self.block_sizes[self._permuted_blocks])])
        self._epoch = epoch

    def window_at(self, position: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        """The window around a position: its first position, its end, and the block and row of each sample in it."""
        permuted = int(np.searchsorted(self._starts, position, side="right")) - 1
        number = permuted // self._window_blocks
        first = number * self._window_blocks
        starts = self._starts[first : first + self._window_blocks + 1]
        start, end = int(starts[0]), int(starts[-1])
        shuffled = start + _permutation(end - start, self._seed, self._number + _WINDOW, self._epoch, number)
        permuted_blocks = np.searchsorted(starts, shuffled, side="right") - 1
        return start, end, self._permuted_blocks[first + permuted_blocks], shuffled - starts[permuted_blocks]


class _Reader:
    """Some lanes of one set, and the windows that they stand in."""

    def __init__(self, order: _SetOrder, n_lanes: int) -> None:
        self.order = order
        self._epoch = -1
        self._starts, self._ends = np.zeros((2, n_lanes), dtype=np.int64)
        self._lanes = np.arange(n_lanes)
        self._windows = np.empty((2, n_lanes, 0), dtype=np.int32)  # block and row by place in the lane's window

    def read(self, places: Places, at: np.ndarray, epoch: int, positions: np.ndarray) -> None:
        """Put the samples at each lane's position into the entries `at` of `places`."""
        if epoch != self._epoch:
            self.order.enter(epoch)
            self._epoch, self._ends[:] = epoch, 0
        for lane in np.flatnonzero((positions < self._starts) | (positions >= self._ends)).tolist():
            self._enter_window(lane, int(positions[lane]))
        block, row = self._windows[:, self._lanes, positions - self._starts]
        places.block[at], places.row[at] = block + self.order.first_block, row
        places.index[at], places.epoch[at] = self.order.first_index[block] + row, epoch

    def _enter_window(self, lane: int, position: int) -> None:
        start, end, block, row = self.order.window_at(position)
        self._starts[lane], self._ends[lane], size = start, end, end - start
        if size > self._windows.shape[2]:
            wider = np.empty((2, len(self._lanes), size), dtype=np.int32)
            wider[:, :, : self._windows.shape[2]] = self._windows
            self._windows = wider
        self._windows[:, lane, :size] = block, row


def rank_lanes(*, global_batch: int, micro_batch: int, rank: int, world_size: int) -> range:
    """The lanes of one rank, its micro-batches one after another.

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
    lanes_of_rank = global_batch // world_size
    return range(rank * lanes_of_rank, (rank + 1) * lanes_of_rank)


def _quotas(weights: Sequence[float], n: int) -> np.ndarray:
    """n samples dealt in proportion to the weights: whole numbers, the largest fractions rounded up."""
    shares = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise ConfigError(f"weights {list(weights)}: expected numbers above 0")
    exact = shares / shares.sum() * n
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: n - int(quotas.sum())]] += 1
    if not quotas.all():
        raise ConfigError(f"weights {list(weights)}: the smallest is less than one sample in {PERIOD} global batches")
    return quotas


def _evenly(counts: Sequence[int]) -> np.ndarray:
    """counts[k] times the number k, for all k, each spread evenly over the whole."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    middles = np.concatenate([(2 * np.arange(n) + 1) / (2 * n) for n in counts if n] or [np.empty(0)])
    return numbers[np.argsort(middles, kind="stable")]


def _counts_before(numbers: np.ndarray, n_kinds: int) -> np.ndarray:
    """How often each kind stands before each entry: (entries, kinds)."""
    one_hot = numbers[:, None] == np.arange(n_kinds)
    return np.cumsum(one_hot, axis=0) - one_hot


def _permutation(n: int, *seed: int) -> np.ndarray:
    # numpy promises that the raw bits of a seeded generator stay as they are, but not what permutation() makes of them.
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int32)
