"""Prefetch yields every item, passes errors on, and ends its thread."""

import gc
import itertools
import threading
import weakref

import pytest

from dalle_ds.data.tokens.prefetch import Prefetch


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_items_come_in_order_and_then_the_end():
    ahead = Prefetch(iter(range(50)), 3, "order")
    assert list(ahead) == list(range(50))
    assert list(ahead) == []  # an exhausted iterator stays exhausted
    ahead.close()


def test_at_most_depth_items_are_made_ahead():
    made = []
    may_go = threading.Semaphore(0)

    def source():
        for i in itertools.count():
            made.append(i)
            may_go.release()
            yield i

    ahead = Prefetch(source(), 2, "ahead")
    for _ in range(2):
        may_go.acquire()
    assert not may_go.acquire(timeout=0.3), "no third item is held by the thread: items may be as large as a window of images"
    assert next(ahead) == 0
    may_go.acquire()
    assert not may_go.acquire(timeout=0.3) and made == [0, 1, 2]
    ahead.close()


def test_an_error_comes_after_the_items_before_it_and_stays():
    def source():
        yield 1
        raise OSError("shard 7")

    ahead = Prefetch(source(), 2, "error")
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="shard 7"):
            next(ahead)
    ahead.close()


def test_close_ends_the_thread_even_where_the_queue_is_full():
    ahead = Prefetch(itertools.count(), 1, "close-me")
    assert next(ahead) == 0 and threads("close-me")
    ahead.close()
    assert not threads("close-me")
    with pytest.raises(RuntimeError, match="close-me is closed"):
        next(ahead)


def test_close_wakes_a_consumer_on_another_thread():
    release, told = threading.Event(), []

    def source():
        release.wait()
        yield 0

    def consume():
        try:
            next(ahead)
        except RuntimeError as error:
            told.append(str(error))

    ahead = Prefetch(source(), 1, "slow")
    consumer = threading.Thread(target=consume)
    consumer.start()
    ahead.close(timeout=0)
    consumer.join(timeout=10)
    release.set()
    assert told == ["slow is closed"]


def test_a_forgotten_consumer_is_collected_and_its_thread_ends():
    ahead = Prefetch(itertools.count(), 1, "forgotten")
    gone, thread = weakref.ref(ahead), threads("forgotten")[0]
    del ahead
    gc.collect()
    thread.join(timeout=10)
    assert gone() is None and not thread.is_alive()


def test_waiting_is_counted():
    release = threading.Event()

    def source():
        yield 0
        release.wait()
        yield 1

    ahead = Prefetch(source(), 1, "wait")
    next(ahead)
    before = ahead.wait_seconds
    threading.Timer(0.2, release.set).start()
    next(ahead)
    assert ahead.wait_seconds - before > 0.1
    ahead.close()


def test_depth_zero_is_refused():
    with pytest.raises(ValueError, match="depth is 0"):
        Prefetch(iter([]), 0, "zero")
