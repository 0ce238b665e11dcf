"""The reading order covers each epoch once for any number of ranks, and scales to a billion samples."""

import numpy as np
import pytest

from dalle_ds.data.tokens import order as module
from dalle_ds.data.tokens.mixture import MixtureOrder
from dalle_ds.data.tokens.order import slots_of_rank
from dalle_ds.errors import ConfigError, DataError
from tests.support.memory import peak_of

BLOCKS = [17, 5, 40, 1, 33, 8, 0, 21, 64, 2, 11, 9]  # 211 samples
PINNED = [80, 0, 67, 78, 5, 194, 170, 177, 205, 184, 59, 29]  # seed 3, epoch 0, update 0


def order(**kwargs) -> MixtureOrder:
    return MixtureOrder([BLOCKS], **({"seed": 3, "global_batch": 12, "window_blocks": 4} | kwargs))


def indices(reading: MixtureOrder, update: int, slots=None) -> list[int]:
    return reading.locations(update, range(reading.global_batch) if slots is None else slots).index.tolist()


@pytest.mark.parametrize("global_batch", [1, 7, 12, 211])
@pytest.mark.parametrize("window_blocks", [1, 4, 100])
def test_an_epoch_reads_every_sample_at_most_once(global_batch, window_blocks):
    reading = order(global_batch=global_batch, window_blocks=window_blocks)
    seen = [i for step in range(reading.updates_per_epoch[0]) for i in indices(reading, step)]
    assert reading.updates_per_epoch == (211 // global_batch,)
    assert len(seen) == len(set(seen)) == 211 // global_batch * global_batch
    assert set(seen) <= set(range(211))


def test_locations_name_existing_rows():
    reading = order()
    first_of_block = np.cumsum([0, *BLOCKS])
    for update in range(40):
        found = reading.locations(update, range(12))
        assert (found.row >= 0).all() and (found.row < np.array(BLOCKS)[found.block]).all()
        assert (found.index == first_of_block[found.block] + found.row).all()
        assert (found.epoch == update // 17).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_global_batch_does_not_depend_on_the_ranks(world_size, micro_batch):
    if 12 % (world_size * micro_batch):
        with pytest.raises(ConfigError, match=rf"global batch 12 .* micro-batch {micro_batch} x {world_size} ranks"):
            slots_of_rank(global_batch=12, micro_batch=micro_batch, rank=0, world_size=world_size)
        return
    whole = order()
    ranks = [order() for _ in range(world_size)]
    for update in range(2 * whole.updates_per_epoch[0] + 3):
        parts = []
        for rank, reading in enumerate(ranks):
            slots = slots_of_rank(global_batch=12, micro_batch=micro_batch, rank=rank, world_size=world_size)
            parts += indices(reading, update, slots)
        assert parts == indices(whole, update)


def test_a_seek_equals_walking_there():
    walked = order()
    batches = [indices(walked, update) for update in range(60)]
    for update in (59, 0, 33, 34, 16, 17, 18):
        assert indices(order(), update) == batches[update]
    assert indices(walked, 5) == batches[5]  # also backwards


def test_epochs_and_seeds_differ_in_order_and_in_what_they_leave_out():
    reading = order()
    steps = reading.updates_per_epoch[0]
    epochs = [[i for step in range(steps) for i in indices(reading, epoch * steps + step)] for epoch in range(6)]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    left_out = {frozenset(range(211)) - frozenset(epoch) for epoch in epochs}
    assert all(len(rest) == 211 - steps * 12 for rest in left_out) and len(left_out) > 1
    assert indices(order(seed=4), 0) != indices(order(seed=3), 0)


def test_the_order_is_pinned():
    """Golden values: a change of this list breaks the resume of every existing run."""
    assert indices(order(), 0) == PINNED


def test_the_example_in_the_docstring_is_true():
    reading = MixtureOrder([[2] * 6], seed=0, global_batch=3, window_blocks=3)
    for update in range(4):
        table = "".join(f"{index:<9}" for index in indices(reading, update)).rstrip()
        assert f"update {update}   {table}\n" in module.__doc__
    slot_by_slot = [indices(reading, update, [slot])[0] for slot in range(3) for update in range(4)]
    assert slot_by_slot == [2, 3, 7, 4, 6, 5, 11, 10, 0, 1, 9, 8]


def test_a_batch_mixes_the_whole_split():
    """Samples of one batch are far apart in the data set, although a slot reads one window after another."""
    reading = MixtureOrder([[256] * 400], seed=0, global_batch=64)
    for update in (0, 100, 1000):
        assert len(set(reading.locations(update, range(64)).block.tolist())) > 50


def test_a_slot_needs_few_blocks_at_a_time():
    reading = MixtureOrder([[256] * 4000], seed=0, global_batch=16, window_blocks=8)
    blocks = [int(reading.locations(update, [5]).block[0]) for update in range(8 * 256)]
    assert len(set(blocks)) <= 16  # at most two windows: a slot starts in the middle of a window
    every = {int(reading.locations(update, [5]).block[0]) for update in range(reading.updates_per_epoch[0])}
    assert len(every) <= reading.updates_per_epoch[0] / 256 + 2 * 8  # each block is read about once


def test_a_quarter_billion_samples_cost_two_integers_a_block():
    sizes = np.full(1_000_000, 256)

    def read() -> None:
        reading = MixtureOrder([sizes], seed=0, global_batch=1024)
        batch = indices(reading, 3 * reading.updates_per_epoch[0] + 123_456, range(512, 520))
        assert reading.updates_per_epoch == (250_000,) and len(set(batch)) == 8

    assert peak_of(read) < 100e6  # a list of all samples would take 2e9 bytes


def test_too_few_samples_are_refused():
    with pytest.raises(DataError, match="211 samples in 12 blocks .* global batch of 212"):
        order(global_batch=212)
    with pytest.raises(DataError, match="0 samples in 0 blocks"):
        MixtureOrder([[]], seed=0, global_batch=1)


@pytest.mark.parametrize("bad", [{"seed": -1}, {"global_batch": 0}, {"window_blocks": 0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError, match="expected a seed of at least 0"):
        order(**bad)


def test_impossible_ranks_are_refused():
    with pytest.raises(ConfigError, match="rank is 2, expected 0 to 1"):
        slots_of_rank(global_batch=12, micro_batch=1, rank=2, world_size=2)
