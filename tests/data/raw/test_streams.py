"""The order of training images: the same batches at any number of ranks, every image once an epoch, resume from cursors."""

import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dalle_ds.data.raw import streams
from dalle_ds.data.raw.sample import RawSample
from dalle_ds.data.raw.shards import RawShard, list_raw_shards, read_raw_shard
from dalle_ds.data.raw.streams import BatchOrder, Cursor, PartStreams, Reading, WholeSet
from dalle_ds.errors import DataError

N_SHARDS, N_PARTS, PART_SIZE = 5, 6, 2
BAD = {"003", "110"}  # unusable
NO_IMAGE = {"005", "210", "211"}  # damaged samples


def make_raw(root: Path, image: int = 3000) -> Path:
    """Shards of different sizes: shard s has 30 + s samples, whose images are their keys."""
    for shard in range(N_SHARDS):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for n in range(30 + shard):
                key = f"{shard}{n:02d}"
                about = json.dumps({"caption": key, "group": "held out" if n % 7 == 0 else key}).encode()
                for name, data in ((f"{key}.png", key.encode().ljust(image)), (f"{key}.json", about)):
                    if name.endswith(".json") or key not in NO_IMAGE:
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[RawShard]:
    return list_raw_shards(make_raw(tmp_path_factory.mktemp("raw")))


@pytest.fixture(params=["counted", "not counted"])
def any_shards(shards: list[RawShard], request: pytest.FixtureRequest) -> list[RawShard]:
    """With manifests, which have the numbers of samples, and without."""
    counts = [sum(1 for _ in read_raw_shard(shard)) for shard in shards]
    return shards if request.param == "not counted" else [replace(s, n_samples=n) for s, n in zip(shards, counts, strict=True)]


def reading(shards: list[RawShard], **changes: Any) -> Reading:
    settings: dict[str, Any] = {
        "n_parts": N_PARTS,
        "part_size": PART_SIZE,
        "window_bytes": 2**18,  # of 900 kB: each part has four windows
        "seed": 7,
        "keeps": lambda sample: sample.group != "held out",
        "problem_of": lambda sample: "bad" if sample.key in BAD else None,
    }
    return Reading(shards, **{**settings, **changes})


def training_keys(shards: list[RawShard]) -> set[str]:
    found = [sample for shard in shards for sample in read_raw_shard(shard)]
    return {sample.key for sample in found if isinstance(sample, RawSample) and sample.group != "held out"}


def batches(order: BatchOrder, n: int) -> list[tuple[list[tuple[str, tuple[int, ...]]], int]]:
    """(key and seed of each place, unusable so far) of the next `n` batches."""
    found = []
    for _ in range(n):
        places = order.next_batch()
        found.append(([(next(place.candidates()).key, place.seed) for place in places], order.unusable.total()))
    return found


@pytest.mark.parametrize("window_bytes", [2**18, 2**30])
@pytest.mark.parametrize("splits", [[3], [2, 4], [1, 2, 3, 4, 5]], ids=["2 ranks", "3 ranks", "6 ranks"])
def test_any_number_of_ranks_makes_the_same_batches(shards: list[RawShard], window_bytes: int, splits: list[int]) -> None:
    plan = reading(shards, window_bytes=window_bytes)
    limits = [0, *splits, N_PARTS]
    of_ranks = [range(*pair) for pair in zip(limits, limits[1:], strict=False)]
    with closing(plan.start(range(N_PARTS))) as order:
        expected = batches(order, 40)  # more than two epochs
        cursors = order.cursors
    found, all_cursors = [], {}
    for parts in of_ranks:
        with closing(plan.start(parts)) as order:
            found.append(batches(order, 40))
            all_cursors |= order.cursors
    for number, (places, n_unusable) in enumerate(expected):
        assert [place for of_rank in found for place in of_rank[number][0]] == places
        assert sum(of_rank[number][1] for of_rank in found) == n_unusable
    assert all_cursors == cursors and expected[-1][1] >= 3


def test_an_epoch_reads_every_image_once_and_every_tar_once_and_the_seams(
    any_shards: list[RawShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    fetched = streams.fetched

    @contextmanager
    def counting(shard: RawShard) -> Iterator[Path]:
        opened.append(shard.name)
        with fetched(shard) as file:
            yield file

    monkeypatch.setattr(streams, "fetched", counting)
    plan = reading(any_shards)
    orders = []
    for epoch in range(2):
        first_epoch: Counter[str] = Counter()
        for part in range(N_PARTS):
            with closing(plan.start(range(part, part + 1), dict.fromkeys(range(N_PARTS), Cursor(epoch)))) as order:
                while order.cursors[part].epoch == epoch:
                    places = order.next_batch()
                    first_epoch.update(next(p.candidates()).key for p in places if p.seed[1] == epoch)
        assert first_epoch == Counter(training_keys(any_shards)), epoch
        orders.append(list(first_epoch))
    assert orders[0] != orders[1]

    opened.clear()
    of_one_epoch = [list(_first_epoch(plan, part)) for part in range(N_PARTS)]
    assert set(opened) == {shard.name for shard in any_shards}
    assert len(opened) <= N_SHARDS + N_PARTS - 1, opened
    n_windows = {len({window for window, _ in part}) for part in of_one_epoch}
    assert n_windows <= {3, 4}
    sizes = Counter((part, window) for part, found in enumerate(of_one_epoch) for window, _ in found)
    assert max(sizes.values()) <= 2 * 2**18 / N_PARTS / 4096, "images in a window of a part"


def _first_epoch(plan: Reading, part: int) -> Iterator[tuple[int, str]]:
    """(window, key) of each image of a part's first epoch, without threads."""
    start = Cursor()
    shards = streams._fetch(plan, part, start)
    shards = (shard for shard in _until_last(shards))
    for epoch, window, sample in streams._members(plan, part, shards, start):
        assert epoch == 0
        if isinstance(sample, RawSample):
            yield window, sample.key


def _until_last(shards: Iterator[Any]) -> Iterator[Any]:
    for shard in shards:
        yield shard
        if shard.is_last:
            return


@pytest.mark.parametrize("window_bytes", [2**18, 2**30])
def test_it_goes_on_from_any_cursors(shards: list[RawShard], window_bytes: int) -> None:
    plan = reading(shards, window_bytes=window_bytes)
    expected, cursors = [], []
    with closing(plan.start(range(N_PARTS))) as order:
        assert isinstance(order, PartStreams if window_bytes == 2**18 else WholeSet)
        for _ in range(30):
            expected.append(batches(order, 1)[0][0])
            cursors.append(order.cursors)
    for at in (0, 3, 11, 24):
        with closing(plan.start(range(N_PARTS), cursors[at])) as order:
            assert order.cursors == cursors[at]
            assert [places for places, _ in batches(order, 4)] == expected[at + 1 : at + 5]


def test_a_set_that_fits_is_one_permutation_an_epoch(shards: list[RawShard]) -> None:
    n_places = N_PARTS * PART_SIZE
    keys = training_keys(shards)
    order = reading(shards, window_bytes=2**30).start(range(N_PARTS))
    found = [key for places, _ in batches(order, 2 * len(keys) // n_places) for key, _ in places]
    assert set(found[: len(keys)]) == keys and len(set(found[: len(keys)])) == len(keys)
    of_shard = [key[0] for key in found[:n_places]]
    assert len(set(of_shard)) >= 3, "a batch mixes all shards"
    assert found[: len(keys)] != found[len(keys) : 2 * len(keys)]


def test_the_next_window_is_read_while_this_one_is_used_and_no_more(
    shards: list[RawShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, window_read, window = [], threading.Semaphore(0), streams._Window

    def recording(*fields: Any) -> Any:
        made.append(len(fields[2]))
        window_read.release()
        return window(*fields)

    monkeypatch.setattr(streams, "_Window", recording)
    with closing(reading(shards).start(range(1))) as order:
        order.next_batch()
        assert window_read.acquire(timeout=30) and window_read.acquire(timeout=30), "the second was not asked for"
        assert not window_read.acquire(timeout=0.3) and len(made) == 2
        for _ in range(made[0] // PART_SIZE):
            order.next_batch()
        assert window_read.acquire(timeout=30)


def test_a_window_without_a_usable_image_is_passed_over(shards: list[RawShard], caplog: pytest.LogCaptureFixture) -> None:
    plan = reading(shards, problem_of=lambda sample: "bad" if sample.key.startswith("2") else None)
    with closing(plan.start(range(N_PARTS))) as order:
        found = batches(order, 40)
    assert any("none of the" in record.message for record in caplog.records)
    assert found[-1][1] > 10, "its images are counted"
    assert {key[0] for places, _ in found for key, _ in places} >= {"0", "1", "3", "4"}


def test_nothing_usable_is_an_error(shards: list[RawShard]) -> None:
    order = reading(shards, problem_of=lambda _: "bad").start(range(1))
    with closing(order), pytest.raises(DataError, match="no usable image in the training split of 5 raw shards.*'bad': "):
        order.next_batch()
    whole = reading(shards, window_bytes=2**30, keeps=lambda _: False).start(range(1))
    with pytest.raises(DataError, match=r"no usable image in the training split.*'no image': 3"):
        whole.next_batch()
    intact = [shard for shard in shards if all(isinstance(sample, RawSample) for sample in read_raw_shard(shard))]
    empty = reading(intact, keeps=lambda _: False).start(range(1))
    with closing(empty), pytest.raises(DataError, match="the training split of . raw shards .* is empty"):
        empty.next_batch()


def test_cursors_of_another_version_or_batch_are_refused(shards: list[RawShard]) -> None:
    with pytest.raises(DataError, match="positions of 1 streams of images, expected 6"):
        reading(shards).start(range(N_PARTS), {0: Cursor(1, 2, 3)})
    with pytest.raises(DataError, match="positions of 6 streams of images, expected 1: .*window"):
        reading(shards, window_bytes=2**30).start(range(N_PARTS), dict.fromkeys(range(N_PARTS), Cursor(1, 2, 3)))
