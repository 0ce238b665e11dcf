"""The disk cache keeps recently used pieces within its capacity, survives damage and bad disks, and saves storage reads."""

import fcntl
import logging
import multiprocessing
import os
import shutil
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest

from dalle_ds.data.tokens.batches import TokenStream
from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.data.tokens.dataset_files import load_index
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.data.tokens.shards import read_block
from dalle_ds.storage import disk_cache, s3_requests
from dalle_ds.storage.disk_cache import DiskCache
from tests.data.token_sets import make_token_set

SETTINGS = {"text_len": 24, "global_batch": 12, "micro_batch": 2, "rank": 0, "world_size": 1, "seed": 5, "bpe_dropout": 0.1}


def size(folder: Path) -> int:
    total = 0
    for path in folder.glob("??/*"):
        with suppress(FileNotFoundError):  # renamed or removed after it was listed
            total += path.stat().st_size
    return total


def make_older(cache: DiskCache, name: str, seconds: int) -> None:
    os.utime(cache._path(name), (time.time() - seconds,) * 2)


def test_the_least_recently_used_goes_when_there_is_no_room(tmp_path):
    cache = DiskCache(tmp_path, 40)
    for number in range(4):
        cache.put(f"{number}", bytes([number]) * 10)
        make_older(cache, f"{number}", 100 - number)
    assert cache.get("0") == bytes(10) and cache.get("9") is None
    cache.put("4", b"4" * 10)
    kept = [name for name in map(str, range(5)) if cache.get(name) is not None]
    assert kept == ["0", "3", "4"] and size(tmp_path) == 30  # eviction keeps at most 38 bytes
    cache.put("large", bytes(41))
    assert cache.get("large") is None and size(tmp_path) == 30
    assert DiskCache(tmp_path, 40).get("4") == b"4" * 10  # as another process


def test_what_killed_processes_left_is_counted_anew_and_removed(tmp_path):
    cache = DiskCache(tmp_path, 100)
    for number in range(4):
        cache.put(f"{number}", bytes(20))
    (tmp_path / ".lock").write_text("")  # a process was killed between its two writes
    old, young = (cache._path("0").with_name(f"x{n}.part") for n in range(2))
    for path in (old, young):
        path.write_bytes(bytes(10))
    os.utime(old, (time.time() - disk_cache.ABANDONED_SECONDS - 60,) * 2)
    cache.put("4", bytes(20))
    cache.put("5", bytes(20))
    assert not old.exists() and young.exists() and size(tmp_path) - 10 <= 100
    assert cache.get("5") is not None


def _fill(folder: Path, worker: int) -> None:
    cache = DiskCache(folder, 50_000)
    for i in range(60):
        cache.put(f"{worker % 2} {i}", bytes(1000))


def test_processes_share_a_folder_inside_its_bound(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    largest = 0
    while any(worker.is_alive() for worker in workers):
        with (tmp_path / ".lock").open("a") as lock:  # no piece is added or removed while the sizes are summed
            fcntl.flock(lock, fcntl.LOCK_EX)
            largest = max(largest, sum(path.stat().st_size for path in tmp_path.glob("??/*") if not path.suffix))
    assert all(worker.exitcode == 0 for worker in workers)
    assert 0 < largest <= 50_000 and size(tmp_path) == int((tmp_path / ".lock").read_text()) <= 50_000


@pytest.mark.parametrize("fault", ["full", "folder is a file"])
def test_a_bad_disk_is_told_once_and_nothing_is_lost(tmp_path, monkeypatch, caplog, fault):
    folder = tmp_path / "cache"
    if fault == "full":

        def write(path, _):
            path.touch()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write)
    else:
        folder.write_text("")
    cache = DiskCache(folder, 1000)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            cache.put("a", bytes(10))
            assert cache.get("a") is None
    assert not list(folder.glob("??/*"))
    assert len(caplog.records) == 1 and "read from storage" in caplog.text


def test_a_second_epoch_from_the_cache_makes_no_request(tmp_path, s3, monkeypatch, caplog):
    remote = make_token_set(f"{s3.url}/tokens", n_samples=150, block_samples=16)
    ranges = []
    get = s3_requests.read_range
    monkeypatch.setattr(s3_requests, "read_range", lambda *args: ranges.append(args) or get(*args))

    def read(disk: DiskCache | None) -> list[list[str]]:
        with TokenStream(TokenMix([TokenDataset(remote, disk=disk, cache_bytes=1)]), **SETTINGS) as stream:
            return [[key for batch in update for key in batch.keys] for update in islice(stream, 24)]

    expected = read(None)
    ranges.clear()
    assert read(DiskCache(tmp_path / "cache", 10**7)) == expected
    assert len(ranges) == len(set(ranges)) == 10  # each block is read once in two epochs
    ranges.clear()
    assert read(DiskCache(tmp_path / "cache", 10**7)) == expected and not ranges  # as another process on the machine
    (damaged, *_) = (tmp_path / "cache").glob("??/*")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert read(DiskCache(tmp_path / "cache", 10**7)) == expected
    assert len(ranges) == 1 and "damaged" in caplog.text


def test_a_set_made_anew_in_the_same_place_is_not_taken_for_the_one_before(tmp_path, caplog):
    root, disk = str(tmp_path / "tokens"), DiskCache(tmp_path / "cache", 10**7)
    for seed in (0, 1):
        make_token_set(root, n_samples=32, block_samples=16, seed=seed)
        for part in load_index(root)[1].parts("train"):
            for block in part.blocks:
                expected, found = read_block(root, part, block), read_block(root, part, block, disk)
                assert (found[0] == expected[0]).all() and found[1:] == expected[1:]
        shutil.rmtree(root)
    assert "damaged" not in caplog.text
