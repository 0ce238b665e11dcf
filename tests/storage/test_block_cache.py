"""The block cache keeps the most recently used blocks within its capacity."""

import threading
from dataclasses import dataclass

import pytest

from dalle_ds.storage.block_cache import BlockCache


@dataclass
class Item:
    number: int
    nbytes: int = 10


def test_a_held_block_is_not_loaded_again_and_the_oldest_goes_first():
    loads = []
    cache = BlockCache(lambda number: loads.append(number) or Item(number), capacity=30)
    for number in (0, 1, 2, 0, 3, 0, 1):  # 3 evicts 1, the least recently used; 1 then evicts 2
        assert cache.get([number])[number].number == number
    assert loads == [0, 1, 2, 3, 1]
    assert cache.nbytes == 30 and cache.n_loads == 5


def test_a_request_larger_than_the_capacity_is_served_whole():
    cache = BlockCache(Item, capacity=25)
    found = cache.get([5, 6, 7, 8, 5])
    assert sorted(found) == [5, 6, 7, 8]
    assert cache.nbytes <= 25


def test_missing_blocks_are_loaded_side_by_side():
    together = threading.Barrier(4, timeout=30)  # passes only if four loads wait at the same time

    def load(number: int) -> Item:
        together.wait()
        return Item(number)

    assert sorted(BlockCache(load, capacity=100).get(range(4))) == [0, 1, 2, 3]


def test_an_error_of_one_block_reaches_the_caller_and_nothing_wrong_is_kept():
    broken = {2}

    def load(number: int) -> Item:
        if number in broken:
            raise OSError(f"block {number}")
        return Item(number)

    cache = BlockCache(load, capacity=100)
    with pytest.raises(OSError, match="block 2"):
        cache.get([1, 2, 3])
    broken.clear()
    assert sorted(cache.get([1, 2, 3])) == [1, 2, 3]


def test_threads_share_it():
    cache = BlockCache(Item, capacity=100)
    wrong = []

    def read(seed: int) -> None:
        for i in range(300):
            wanted = [(seed * 7 + i * 3 + j) % 20 for j in range(4)]
            found = cache.get(wanted)
            if any(found[number].number != number for number in wanted):
                wrong.append(wanted)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert wrong == [] and cache.nbytes <= 100
