"""Decoded batches: processes make what a thread makes, unusable images are replaced, a process that dies is replaced."""

import os
import signal
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from dalle_ds.data.raw.decoded_batches import DecodedBatches
from dalle_ds.data.raw.decoders import Decoders
from dalle_ds.data.raw.sample import RawSample
from dalle_ds.data.raw.streams import BatchOrder, Cursor, Place
from dalle_ds.errors import DataError, UserError
from tests.data.raw.preparations import Numbers


class InOrder(BatchOrder):
    """Batches of four images, in stored order, over and over."""

    def __init__(self, images: list[bytes]) -> None:
        self.samples = [RawSample(f"k{n}", f"k{n}", "", image, "png") for n, image in enumerate(images)]
        self.cursors, self.unusable = {0: Cursor()}, Counter()
        self.n = 0

    def next_batch(self) -> list[Place]:
        order = np.arange(len(self.samples))
        self.n += 4
        self.cursors = {0: Cursor(0, 0, self.n)}
        return [Place(self.samples, order, n % len(order), (5, n)) for n in range(self.n - 4, self.n)]


IMAGES = [b"10", b"11", b"bad", b"bad", b"14", b"15", b"16", b"bad"]


@pytest.mark.parametrize("n_processes, decoded_bytes", [(0, 0), (0, 100), (2, 0), (2, 20)])
def test_batches_are_the_same_in_a_thread_and_in_processes(n_processes: int, decoded_bytes: int) -> None:
    settings = {"n_processes": n_processes, "n_ahead": 3, "decoded_bytes": decoded_bytes}
    with closing(DecodedBatches(InOrder(IMAGES), Numbers(), **settings)) as found:
        batches = [next(found) for _ in range(4)]
    assert batches[0].pixels_SHWC.tolist() == [[10, 5, 0], [11, 5, 1], [14, 5, 2], [14, 5, 3]]
    assert batches[1].pixels_SHWC.tolist() == [[14, 5, 4], [15, 5, 5], [16, 5, 6], [10, 5, 7]]
    assert [sample.key for sample in batches[1].samples] == ["k4", "k5", "k6", "k0"]
    assert [batch.n_unusable for batch in batches] == [2, 3, 5, 6], "a substitute is counted at its own place only"
    assert [batch.cursors[0].offset for batch in batches] == [4, 8, 12, 16], "not those of the batches made ahead"


def test_a_process_that_dies_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [b"1", b"kill", b"2", b"3"]
    with closing(DecodedBatches(InOrder(images), Numbers(tmp_path / "killed"), n_processes=2, n_ahead=2)) as found:
        for n in range(0, 12, 4):
            assert next(found).pixels_SHWC.tolist() == [[1, 5, n], [0, 5, n + 1], [2, 5, n + 2], [3, 5, n + 3]]
    assert sum("another one takes its place" in record.message for record in caplog.records) == 1


def test_a_process_that_dies_between_batches_is_replaced() -> None:
    with closing(Decoders(Numbers(), 1)) as decoders:
        decoders.result(decoders.start([b"1"], [(2,)]))
        pool = decoders._pool
        (process,) = pool._processes.values()
        process.kill()
        pool._executor_manager_thread.join()  # it has seen the death: the pool takes no more tasks
        assert [pixels.tolist() for pixels in decoders.result(decoders.start([b"3"], [(4,)]))] == [[3, 4]]


def test_an_image_that_kills_every_process_ends_the_run() -> None:
    with closing(Decoders(Numbers(), 1)) as decoders, pytest.raises(UserError, match=r"3 processes.*data.decoders=0"):
        decoders.result(decoders.start([b"kill"], [(0,)]))


def test_processes_outlive_the_signals_that_stop_a_job() -> None:
    with closing(Decoders(Numbers(), 1)) as decoders:
        assert [pixels.tolist() for pixels in decoders.result(decoders.start([b"1"], [(2,)]))] == [[1, 2]]
        (process,) = decoders._pool._processes
        for stop in (signal.SIGTERM, signal.SIGINT):
            os.kill(process, stop)
        decoders.result(decoders.start([b"1"], [(2,)]))
        assert list(decoders._pool._processes) == [process]


def test_nothing_usable_is_an_error() -> None:
    batches = DecodedBatches(InOrder([b"bad"] * 4), Numbers(), n_processes=0, n_ahead=1)
    with closing(batches), pytest.raises(DataError, match=r"none of 4 images is usable.*'bad': 1"):
        next(batches)
