"""Comparison of hashes: equal to a plain comparison of all images, in bounded memory, also where hashes crowd."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from preprocessing.filters.perceptual_hash import NOT_COMPARED
from preprocessing.metadata import compare_hashes, near_pairs
from preprocessing.metadata.compare_hashes import Found, HashComparison


def plain_twin(hashes: list[int], n_first: int, kept: str, max_distance: int) -> list[int]:
    """The definition: compare each image with the kept images before it. -1: the image stays."""
    earlier = [-1] * len(hashes)

    def find(i: int, candidates: range) -> int:
        near = (j for j in candidates if NOT_COMPARED not in (hashes[i], hashes[j]))
        return next((j for j in near if (hashes[i] ^ hashes[j]).bit_count() <= max_distance), -1)

    def stays(j: int) -> bool:
        return earlier[j] < 0

    for i in range(len(hashes)):
        if kept == "all first" and i >= n_first:
            earlier[i] = find(i, range(n_first))
        elif kept == "all first" or i >= n_first:
            earlier[i] = find(i, [j for j in range(i) if stays(j)])  # type: ignore[arg-type]
    return earlier


def compared(folder: Path, hashes: np.ndarray, n_first: int, kept: str, max_distance: int) -> tuple[list[int], Found]:
    folder.mkdir()
    earlier = np.full(len(hashes), -1)
    with HashComparison(folder, 1 << 30, 1) as comparison:
        for part in np.array_split(hashes, 3):
            comparison.add(part)
        found = comparison.find(max_distance, n_first, kept)  # type: ignore[arg-type]
        for pairs in comparison.duplicates():
            earlier[pairs[:, 0]] = pairs[:, 1]
        for image, other, distance in comparison.most_distant(5):
            assert earlier[image] == other and (int(hashes[image]) ^ int(hashes[other])).bit_count() == distance
    return earlier.tolist(), found


def crowded(n: int, seed: int, n_centres: int = 30) -> np.ndarray:
    """Copies of a few hashes at different distances, and some images with too little contrast."""
    rng = np.random.default_rng(seed)
    hashes = rng.choice(rng.integers(1, 2**64, n_centres, dtype=np.uint64), n)
    for i in range(n):
        for bit in rng.integers(0, 64, rng.integers(0, 8)):
            hashes[i] ^= np.uint64(1 << int(bit))
    hashes[::17] = NOT_COMPARED
    return hashes


@pytest.mark.parametrize(("gib", "wanted", "given"), [(1.25, 64, 4), (1.25, 3, 3), (4.0, 64, 26), (0.5, 64, 2)])
def test_there_are_as_many_threads_as_memory_for_them(gib: float, wanted: int, given: int, tmp_path: Path) -> None:
    with HashComparison(tmp_path, int(gib * 2**30), wanted) as comparison:
        assert comparison._number("SELECT current_setting('threads')") == given


@pytest.mark.parametrize("max_distance", [0, 2, 7])
@pytest.mark.parametrize(("n_first", "kept"), [(0, "first"), (40, "first"), (200, "all first")])
def test_it_finds_what_a_plain_comparison_finds(max_distance: int, n_first: int, kept: str, tmp_path: Path) -> None:
    hashes = crowded(300, max_distance)
    earlier, found = compared(tmp_path / "mike's [a-z] db", hashes, n_first, kept, max_distance)
    expected = plain_twin(hashes.tolist(), n_first, kept, max_distance)
    # If an image resembles several of the first, which always stay, any of them may be named.
    assert [j >= 0 for j in earlier] == [j >= 0 for j in expected]
    assert [0 <= j < n_first for j in earlier] == [0 <= j < n_first for j in expected]
    dropped = [(i, j) for i, j in enumerate(earlier) if j >= 0]
    assert all(earlier[j] < 0 or (kept == "all first" and j < n_first <= i) for i, j in dropped)
    distances = [(int(hashes[i]) ^ int(hashes[j])).bit_count() for i, j in dropped]
    assert max(distances) <= max_distance and len(dropped) > 3
    assert found.by_distance == {distance: distances.count(distance) for distance in sorted(set(distances))}
    assert (found.n_groups, found.n_plain, found.n_capped) == (len({j for _, j in dropped}), 18, 0)


def test_large_buckets_are_split_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All hashes agree in two of three bands; rows arrive in steps smaller than the bucket.
    rng = np.random.default_rng(0)
    hashes = (rng.integers(0, 2**21, 1500, dtype=np.uint64) << np.uint64(43)) | np.uint64(0x5A5A5A5A5A)
    monkeypatch.setattr(compare_hashes, "ROWS", 256)
    monkeypatch.setattr(near_pairs, "SPLIT", 8)
    earlier, found = compared(tmp_path / "db", hashes, 0, "first", 2)
    assert earlier == plain_twin(hashes.tolist(), 0, "first", 2)
    assert found.n_capped == 0 < found.n_groups


def test_buckets_that_cannot_be_split_are_capped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.random.default_rng(0).permutation(np.arange(1, 257, dtype=np.uint64) << np.uint64(20))  # 8 bits differ
    monkeypatch.setattr(near_pairs, "MAX_COMPARED", 10)
    monkeypatch.setattr(near_pairs, "SPLIT", 256)
    earlier, found = compared(tmp_path / "db", hashes, 0, "first", 2)
    exact = plain_twin(hashes.tolist(), 0, "first", 2)
    assert found.n_capped > 0
    assert all(j < 0 or (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 2 for i, j in enumerate(earlier))
    assert 0 < sum(j >= 0 for j in earlier) < sum(j >= 0 for j in exact)
    monkeypatch.undo()
    monkeypatch.setattr(compare_hashes, "MAX_BUCKET", 20)
    monkeypatch.setattr(compare_hashes, "ROWS", 16)
    assert compared(tmp_path / "db2", hashes, 0, "first", 2)[1].n_capped == 256 - 20 + 2 * (128 - 20), "one bucket, two buckets"


SCRIPT = """
import json, resource, sys
from pathlib import Path
import numpy as np
from preprocessing.metadata import compare_hashes
from preprocessing.metadata.compare_hashes import HashComparison
n, limit = int(sys.argv[2]), int(sys.argv[3])
compare_hashes.OWN_BYTES = 0
rng = np.random.default_rng(0)
with HashComparison(Path(sys.argv[1]), limit, 1) as comparison:
    comparison.add(np.ones(1, np.uint64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(0, n, 1 << 18):
        hashes = rng.integers(1, 2**64, 1 << 18, dtype=np.uint64)
        hashes[::5] = hashes[::5] >> np.uint64(21) << np.uint64(21) | np.uint64(5)  # a fifth of all in one bucket of a band
        hashes[1::10] = hashes[::10] ^ np.uint64(1 << 40)
        comparison.add(hashes)
    found = comparison.find(2, 0, "first")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([found.by_distance[1], found.n_capped, before, peak]))
"""


def test_a_million_hashes_with_a_crowded_bucket_take_bounded_memory(tmp_path: Path) -> None:
    n = 1 << 20
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), str(n), str(256 << 20)], capture_output=True, check=True)
    n_near, n_capped, before, after = json.loads(run.stdout)
    assert n_near >= n // 10 * 0.999 and n_capped == 0
    assert after - before < 700 << 10, "kilobytes: DuckDB's 256 MiB, and the rows of one step"
