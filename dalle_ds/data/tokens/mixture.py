"""Weighted mixture of data sets in one batch: which data set each slot of the global batch reads at each update.

An example: a global batch of G = 3, read from the data sets A and B with weights 0.6 and 0.4. PERIOD = 1000 updates read 3000
samples, of which A's quota is 1800 and B's is 1200. One slot reads 1000 samples in 1000 updates. So A has one dedicated slot
and 800 remaining samples; B has one dedicated slot and 200 remaining samples. These 1000 remaining samples fill the third
slot, which is shared:

                      slot 0   slot 1   slot 2
    update 0          A        B        A
    update 1          A        B        A
    update 2          A        B        B
    update 3          A        B        A
    update 4          A        B        A
    update 5          A        B        A

In general, a data set with quota q has q // PERIOD dedicated slots, spread evenly over the batch. The remaining q % PERIOD
samples of each data set fill the shared slots; there are fewer shared slots than data sets. A fixed, evenly spaced sequence
assigns the samples of the shared slots in a period to the data sets. A single data set is a mixture of one: all slots are
dedicated.

Each data set has its own epochs of S updates and its own order (see `order`). Its dedicated slot s reads the positions s * S to
s * S + S - 1 of the epoch. The shared slots read the positions after those of the dedicated slots.

Properties, for K data sets, each with f = q / PERIOD samples per update:
  - Everything is computed from the update number, so a seek in a mixture costs as much as a seek in one data set.
  - After any number of updates, a data set has yielded f samples per update, with a deviation of at most K / 2 + 1 samples.
  - S is the largest number of updates that is guaranteed to fit, so an epoch reads no sample twice. An epoch skips fewer than
    f + 2 K + 4 samples.
"""

from collections.abc import Sequence

import numpy as np

from dalle_ds.data.tokens.order import WINDOW_BLOCKS, SampleLocations, SetOrder, SlotReader
from dalle_ds.errors import ConfigError, DataError

PERIOD = 1000  # updates


class MixtureOrder:
    """The reading order of a mixture of data sets.

    Args:
        sets: for each data set, the number of samples in each block, in its manifest's order.
        weights: relative weight of each data set; they need not sum to 1.
        seed: of the run; equal seeds give equal orders on any machine and numpy version.
        global_batch: samples per update over all ranks.
        window_blocks: number of blocks per window (see `order`).

    Raises:
        DataError: a data set has fewer samples than it yields in one update.
        ConfigError: a weight is not above 0, or is too small for one sample in PERIOD updates.
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
                "least 0, and at least 1 for the other values"
            )
        self.global_batch = global_batch
        quotas = _quotas(weights, PERIOD * global_batch)
        self._n_own, self._left_over = quotas // PERIOD, quotas % PERIOD
        self._n_shared = int(self._left_over.sum()) // PERIOD
        # The data set that each slot reads (len(sets) for shared slots), and the slot's number among that data set's slots.
        self._set_of_slot = _evenly([*self._n_own.tolist(), self._n_shared])
        self._number_in_set = _counts_before(self._set_of_slot, len(sets) + 1)[np.arange(global_batch), self._set_of_slot]
        # The data sets of the shared slots over a period, ordered by update, then by slot.
        self._sequence = _evenly(self._left_over.tolist())
        self._given = np.concatenate([_counts_before(self._sequence, len(sets)), [self._left_over]])
        self._sets: list[SetOrder] = []
        first_block = first_index = 0
        for number, (sizes, quota) in enumerate(zip(sets, quotas.tolist(), strict=True)):
            block_sizes = np.asarray(sizes, dtype=np.int64)
            n_samples = int(block_sizes.sum())
            order = SetOrder(
                block_sizes,
                updates_per_epoch=self._updates_per_epoch(number, n_samples, len(sizes), quota),
                seed=seed,
                window_blocks=window_blocks,
                set_number=number,
                first_block=first_block,
                first_index=first_index,
            )
            self._sets.append(order)
            first_block, first_index = first_block + len(sizes), first_index + n_samples
        self._shared_readers = [SlotReader(order, [0]) for order in self._sets]  # one position at a time
        self._slots: Sequence[int] | None = None

    def _updates_per_epoch(self, number: int, n_samples: int, n_blocks: int, quota: int) -> int:
        n_sets = len(self._n_own)
        slack = n_sets + 2 if self._left_over[number] else 0  # shared slots may yield a few samples more than the quota
        updates = max(0, n_samples - slack) * PERIOD // quota
        if not updates:
            which, what = "", "one"
            if n_sets > 1:
                which, what = f" of set {number + 1}", f"its part of {quota / PERIOD:g} samples in one"
            raise DataError(
                f"{n_samples} samples in {n_blocks} blocks{which} do not fill {what} global batch of "
                f"{self.global_batch}; use more data or a smaller global batch"
            )
        return updates

    @property
    def updates_per_epoch(self) -> tuple[int, ...]:
        """Number of updates per epoch of each data set."""
        return tuple(order.updates_per_epoch for order in self._sets)

    def n_drawn(self, update: int) -> list[int]:
        """Number of samples that each data set has yielded before update number `update`."""
        return (update * self._n_own + self._shared_before(update * self._n_shared)).tolist()

    def n_windows(self, slots: Sequence[int]) -> list[int]:
        """Number of windows of each data set that these batch slots read at a time."""
        of_slots = self._set_of_slot[slots]
        is_shared = bool((of_slots == len(self._sets)).any())
        return [int((of_slots == number).sum()) + (is_shared and n > 0) for number, n in enumerate(self._left_over.tolist())]

    def locations(self, update: int, slots: Sequence[int]) -> SampleLocations:
        """The samples of these batch slots at update number `update` (0, 1, ... over all epochs), in the order of `slots`."""
        if slots != self._slots:
            self._slots, self._readers = slots, self._readers_of(np.asarray(slots, dtype=np.int64))
            self._shared = np.flatnonzero(self._set_of_slot[slots] == len(self._sets)).tolist()
        found = SampleLocations.empty(len(slots))
        for at, reader in self._readers:
            reader.read(found, at, update)
        for at in self._shared:
            self._read_shared(found, at, update, int(self._number_in_set[slots[at]]))
        return found

    def _readers_of(self, slots: np.ndarray) -> list[tuple[np.ndarray, SlotReader]]:
        set_of_slot, readers = self._set_of_slot[slots], []
        for number, order in enumerate(self._sets):
            at = np.flatnonzero(set_of_slot == number)
            if len(at):
                readers.append((at, SlotReader(order, self._number_in_set[slots[at]])))
        return readers

    def _read_shared(self, found: SampleLocations, at: int, update: int, shared_slot: int) -> None:
        turn = update * self._n_shared + shared_slot  # number of this sample among the samples of all shared slots and updates
        number = int(self._sequence[turn % len(self._sequence)])
        order = self._sets[number]
        epoch = update // order.updates_per_epoch
        epoch_began = epoch * order.updates_per_epoch * self._n_shared
        nth = int(self._shared_before(turn)[number] - self._shared_before(epoch_began)[number])
        position = np.array([self._n_own[number] * order.updates_per_epoch + nth])
        self._shared_readers[number].read_positions(found, np.array([at]), epoch, position)

    def _shared_before(self, turn: int) -> np.ndarray:
        """Number of samples of each data set in the shared slots before sample number `turn`."""
        periods, rest = divmod(turn, max(1, len(self._sequence)))
        return periods * self._given[-1] + self._given[rest]


def _quotas(weights: Sequence[float], n: int) -> np.ndarray:
    """Divides n samples in proportion to the weights, as integers; the largest fractional parts are rounded up."""
    shares = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise ConfigError(f"weights {list(weights)}: expected numbers above 0")
    exact = shares / shares.sum() * n
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: n - int(quotas.sum())]] += 1
    if not quotas.all():
        raise ConfigError(f"weights {list(weights)}: expected at least one sample in {PERIOD} global batches for the smallest")
    return quotas


def _evenly(counts: Sequence[int]) -> np.ndarray:
    """A sequence that contains each number k counts[k] times, evenly spaced."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    middles = np.concatenate([(2 * np.arange(n) + 1) / (2 * n) for n in counts if n] or [np.empty(0)])
    return numbers[np.argsort(middles, kind="stable")]


def _counts_before(numbers: np.ndarray, n_kinds: int) -> np.ndarray:
    """How often each number in 0 .. n_kinds - 1 occurs before each entry: (entries, n_kinds)."""
    one_hot = numbers[:, None] == np.arange(n_kinds)
    return np.cumsum(one_hot, axis=0) - one_hot
