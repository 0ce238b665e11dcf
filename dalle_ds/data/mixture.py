"""Several data sets in one batch, each by its weight: which set every slot of the global batch reads at every update.

An example: a global batch of G = 3 of the sets A and B with weights 0.6 and 0.4. Over PERIOD = 1000 updates there are 3000
samples: A's quota is 1800, B's 1200. In 1000 updates one slot gives 1000 samples. So A has one slot of its own, and 800 samples
left over; B has one slot, and 200 left over. These 1000 samples fill the third slot, which is shared:

                      slot 0   slot 1   slot 2
    update 0          A        B        A
    update 1          A        B        A
    update 2          A        B        B
    update 3          A        B        A
    update 4          A        B        A
    update 5          A        B        A

In general a set of quota q has q // PERIOD slots of its own, spread evenly over the batch. What is left of the quotas, q %
PERIOD a set, fills the shared slots, of which there are fewer than sets. Over a period their samples are dealt to the sets in
one fixed sequence, evenly spaced. One set alone is a mixture of one: all slots are its own.

Each set has epochs of its own, of S updates, and is read in an order of its own (see `order`): its own slot s reads positions
s * S to s * S + S - 1 of the epoch; what it gives to shared slots is read from the positions behind those of its own slots.

What holds, for K sets of shares f = q / PERIOD:
  - All of it is arithmetic on the number of the update: a seek in many sets costs what it costs in one.
  - Up to any update a set has given f samples an update, at most K / 2 + 1 more or less.
  - S is the largest that surely fits, so that an epoch has no sample twice. It leaves out fewer than f + 2 K + 4 samples.
"""

from collections.abc import Sequence

import numpy as np

from dalle_ds.data.order import WINDOW_BLOCKS, SampleLocations, SetOrder, SlotReader
from dalle_ds.errors import ConfigError, DataError

PERIOD = 1000  # updates


class MixtureOrder:
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
        self.global_batch = global_batch
        quotas = _quotas(weights, PERIOD * global_batch)
        self._n_own, self._left_over = quotas // PERIOD, quotas % PERIOD
        self._n_shared = int(self._left_over.sum()) // PERIOD
        # Which set each slot reads, and its number among that set's own; number len(sets) stands for the shared slots.
        self._set_of_slot = _evenly([*self._n_own.tolist(), self._n_shared])
        self._number_in_set = _counts_before(self._set_of_slot, len(sets) + 1)[np.arange(global_batch), self._set_of_slot]
        # The sets of the shared slots over a period, slot after slot, update after update.
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
        slack = n_sets + 2 if self._left_over[number] else 0  # shared slots may give a few samples more than the share
        updates = max(0, n_samples - slack) * PERIOD // quota
        if not updates:
            which, what = "", "one"
            if n_sets > 1:
                which, what = f" of set {number + 1}", f"its share of {quota / PERIOD:g} samples in one"
            raise DataError(
                f"{n_samples} samples in {n_blocks} blocks{which} do not fill {what} global batch of "
                f"{self.global_batch}; use more data or a smaller global batch"
            )
        return updates

    @property
    def updates_per_epoch(self) -> tuple[int, ...]:
        """Updates that an epoch of each set takes."""
        return tuple(order.updates_per_epoch for order in self._sets)

    def n_drawn(self, update: int) -> list[int]:
        """Samples that each set has given before update number `update`."""
        return (update * self._n_own + self._shared_before(update * self._n_shared)).tolist()

    def n_windows(self, slots: Sequence[int]) -> list[int]:
        """How many windows of each set these batch slots stand in at a time."""
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
        turn = update * self._n_shared + shared_slot  # turns of shared slots, counted over all updates
        number = int(self._sequence[turn % len(self._sequence)])
        order = self._sets[number]
        epoch = update // order.updates_per_epoch
        epoch_began = epoch * order.updates_per_epoch * self._n_shared
        nth = int(self._shared_before(turn)[number] - self._shared_before(epoch_began)[number])
        position = np.array([self._n_own[number] * order.updates_per_epoch + nth])
        self._shared_readers[number].read_positions(found, np.array([at]), epoch, position)

    def _shared_before(self, turn: int) -> np.ndarray:
        """Samples of each set in the shared slots before turn number `turn`."""
        periods, rest = divmod(turn, max(1, len(self._sequence)))
        return periods * self._given[-1] + self._given[rest]


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
