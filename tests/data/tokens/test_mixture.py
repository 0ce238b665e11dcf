"""Mixture of data sets: each yields its quota over any range of updates, and no sample twice in its own epoch."""

from collections import Counter

import numpy as np
import pytest

from dalle_ds.data.tokens import mixture
from dalle_ds.data.tokens.mixture import MixtureOrder
from dalle_ds.data.tokens.order import slots_of_rank
from dalle_ds.errors import ConfigError, DataError

BLOCKS = [[7] * 60, [16, 3, 9] * 30, [5] * 200]  # 420, 840 and 1000 samples
PINNED = [359, 684, 12, 1453, 159, 773, 1649, 47, 179, 18, 757, 62]  # update 5


def order(weights=(0.55, 0.3, 0.15), global_batch=12, **settings) -> MixtureOrder:
    return MixtureOrder(BLOCKS[: len(weights)], weights, **({"seed": 3, "global_batch": global_batch} | settings))


def sets_of(block: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum([len(blocks) for blocks in BLOCKS]), block, side="right")


@pytest.mark.parametrize(
    ("weights", "global_batch"), [((0.55, 0.3, 0.15), 12), ((7, 3), 2), ((1, 1, 1), 1), ((0.001, 0.999), 5), ((0.5, 0.5), 4)]
)
def test_each_stretch_has_the_shares_and_each_epoch_no_sample_twice(weights, global_batch):
    reading, n_updates = order(weights, global_batch), 2500
    shares = np.array(weights) / sum(weights)
    given = np.zeros(len(weights), dtype=int)
    seen: list[Counter] = [Counter() for _ in weights]
    for update in range(n_updates):
        found = reading.locations(update, range(global_batch))
        number = sets_of(found.block)
        for k in range(len(weights)):
            seen[k].update(zip(found.epoch[number == k].tolist(), found.index[number == k].tolist(), strict=True))
        given += np.bincount(number, minlength=len(weights))
        assert reading.n_drawn(update + 1) == given.tolist()
        assert np.abs(given - (update + 1) * global_batch * shares).max() <= len(weights) / 2 + 1 + (update + 1) / 1000
    first_index = np.cumsum([0, *(sum(blocks) for blocks in BLOCKS)])
    for k, (share, steps) in enumerate(zip(shares, reading.updates_per_epoch, strict=True)):
        n_samples = sum(BLOCKS[k])
        assert max(seen[k].values()) == 1
        assert all(first_index[k] <= index < first_index[k + 1] for _, index in seen[k])
        for epoch in range(n_updates // steps):
            n_seen = sum(1 for e, _ in seen[k] if e == epoch)
            assert n_samples - n_seen < share * global_batch + 2 * len(weights) + 4


@pytest.mark.parametrize("world_size", [2, 4, 12])
def test_ranks_and_seeks_give_the_same_samples(world_size):
    whole = order()
    ranks = [order() for _ in range(world_size)]
    for update in [*range(40), 999, 1000, 1001, 123_456]:
        of_ranks = [
            reading.locations(update, slots_of_rank(global_batch=12, micro_batch=1, rank=rank, world_size=world_size))
            for rank, reading in enumerate(ranks)
        ]
        for field in ("block", "row", "index", "epoch"):
            expected = getattr(whole.locations(update, range(12)), field)
            assert np.array_equal(np.concatenate([getattr(found, field) for found in of_ranks]), expected)
            assert np.array_equal(getattr(order().locations(update, range(12)), field), expected)


def test_a_set_keeps_its_slots_and_walks_through_its_windows():
    """Every slot except the shared ones always reads the same data set. A slot finishes a window before it starts the next."""
    reading = MixtureOrder([[256] * 400, [256] * 400], (0.7, 0.3), seed=0, global_batch=8)
    blocks = [reading.locations(update, range(8)).block for update in range(600)]
    of_slot = np.array(blocks) // 400
    is_fixed = (of_slot == of_slot[0]).all(0)
    assert is_fixed.sum() == 7  # 5 and 2 dedicated slots; the remainders 0.6 and 0.4 share a slot
    for slot in np.flatnonzero(is_fixed):
        assert len({of_update[slot] for of_update in blocks}) <= 16
    for number in (0, 1):
        shared = np.array(blocks)[of_slot[:, ~is_fixed][:, 0] == number, ~is_fixed]
        assert len(set(shared.tolist())) <= 16


def test_mixes_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="expected numbers above 0"):
        order((1.0, 0.0))
    with pytest.raises(ConfigError, match="expected at least one sample in 1000 global batches"):
        order((1.0, 1e-9))
    with pytest.raises(DataError, match="420 samples in 60 blocks of set 1 do not fill its part of 990 samples"):
        order((0.99, 0.01), global_batch=1000)


def test_the_order_of_a_mix_is_pinned():
    """Golden values: a change of this list breaks the resume of every existing run on a mix."""
    assert order().locations(5, range(12)).index.tolist() == PINNED


def test_the_example_in_the_docstring_is_true():
    reading = MixtureOrder([[10] * 60, [10] * 60], (0.6, 0.4), seed=0, global_batch=3)
    for update in range(6):
        sets = "        ".join("AB"[block // 60] for block in reading.locations(update, range(3)).block)
        assert f"update {update}          {sets}\n" in mixture.__doc__
