"""What a data set publishes: sums and an index. They don't depend on the order of the shards, and are read by few requests."""

import itertools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dalle_ds.data.manifest import (
    BlockColumns,
    InputIdentity,
    Part,
    ShardDetails,
    ShardManifest,
    StoredFile,
    load_shard_manifests,
)
from dalle_ds.data.tokens.batches import TokenStream, validation_batches
from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.data.tokens.dataset_files import (
    DatasetFiles,
    DatasetManifest,
    load_current,
    load_index,
    load_manifest,
    merge,
    publish,
)
from dalle_ds.data.tokens.index import TokenIndex
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint
from tests.conftest import S3
from tests.data.manifests import INFO, details, shard, write
from tests.data.token_sets import make_token_set
from tests.support.memory import peak_of

THREE = [shard("b", 2, n_validation=1), shard("a", 3), shard("a-1", 0)]


def test_the_order_of_the_shards_does_not_matter() -> None:
    found = [merge(INFO, [(one, details(one.n_input)) for one in order]) for order in itertools.permutations(THREE)]
    manifest, index = found[0]
    assert all(each == found[0] for each in found)
    assert index.names == ["a", "a-1", "b"], "shards are sorted by their names, not by those of their files"
    assert [part.path for part in index.parts("train")] == ["data/a-train.tar", "data/b-train.tar"]
    assert manifest.n_samples == {"train": 5, "validation": 1}
    assert (manifest.n_shards, manifest.n_input, manifest.seconds, manifest.input_bytes) == (3, 9, 4.5, 3000)
    assert manifest.n_bytes == sum(part.bytes for one in THREE for part in one.parts)
    assert manifest.dropped == {"unreadable": 3}
    assert manifest.code_histogram == [9, 0, 3, 0] and manifest.caption_lengths == {3: 9}
    assert manifest.complete and not merge(INFO, [], ["c"])[0].complete


def test_the_index_holds_the_parts_as_they_were() -> None:
    index = TokenIndex.of(THREE)
    read = TokenIndex.unpack(index.pack(), "index")
    assert read == index and read.pack() == index.pack()
    for split in ("train", "validation"):
        expected = [one.splits[split] for one in sorted(THREE, key=lambda one: one.shard) if split in one.splits]
        assert list(read.parts(split)) == expected
        blocks = read.parts(split).blocks
        assert [blocks[i] for i in range(len(blocks))] == [block for part in expected for block in part.blocks]
    assert dict(read.inputs()) == {one.shard: one.input for one in THREE}
    empty = TokenIndex.unpack(TokenIndex.of([]).pack(), "index")
    assert len(empty.parts("train")) == len(empty.parts("train").blocks) == 0
    with pytest.raises(DataError, match="index: not an index of token shards"):
        TokenIndex.unpack(b"PK", "index")


def test_unfinished_data_sets_are_merged_from_their_shards(any_root: str) -> None:
    write(any_root, *THREE)
    manifest, index = load_index(any_root)
    assert (manifest.complete, manifest.n_samples["train"], manifest.missing) == (False, 5, [])
    assert index == TokenIndex.of(THREE)
    published = publish(any_root, *merge(INFO, [(one, details(1)) for one in THREE[:2]], ["a-1"]))
    assert load_manifest(any_root) == published and published.missing == ["a-1"]
    assert load_index(any_root) == (published, TokenIndex.of(THREE[:2]))


def test_a_copied_index_that_is_older_than_its_manifests_is_published_again(tmp_path: Path) -> None:
    root = str(tmp_path)
    write(root, *THREE)
    merged = merge(INFO, [(one, details(1)) for one in THREE])
    index = tmp_path / publish(root, *merged).index.path
    for file in tmp_path.rglob("*.json"):
        os.utime(file, (1, 1))
    os.utime(index, (0, 0))
    assert load_current(root, INFO) is None
    publish(root, *merged)
    assert load_current(root, INFO) is not None


@pytest.mark.s3
def test_ranks_of_a_thousand_send_few_requests(s3: S3, s3_requests: list[str]) -> None:
    """However many shards there are: ranks that read all manifests would send a hundred million requests."""
    world_size, n_shards = 1024, 8
    root = make_token_set(s3.url, n_samples=1100, n_validation=2100, n_shards=n_shards, grid=2, block_samples=22)
    s3_requests.clear()
    files = DatasetFiles.read(root)  # by the main rank, for all
    assert sorted(request.rpartition("/")[2] for request in s3_requests) == [
        files.manifest.index.path.rpartition("/")[2],
        *("dataset.json", "manifest.json", "tokenizer.model"),
    ]
    s3_requests.clear()
    received = pickle.loads(pickle.dumps(files))
    train, validation = (TokenMix([TokenDataset(received, split)]) for split in ("train", "validation"))
    assert not s3_requests, "a rank that was sent the files asks for none"
    rank = {"text_len": 16, "rank": 517, "world_size": world_size}
    assert len(validation_batches(validation, batch=1, **rank)) == 2
    validation_batches(validation, text_len=16, batch=4, rank=0, world_size=1, limit=4)  # the parity batch
    with TokenStream(train, global_batch=world_size, micro_batch=1, seed=0, bpe_dropout=0.1, prefetch=2, **rank) as stream:
        next(stream)
    assert {request.partition(" ")[0] for request in s3_requests} == {"GET"}
    assert len(s3_requests) <= 10
    alone = TokenDataset(root)
    assert train.content_fingerprint == alone.content_fingerprint != validation.content_fingerprint


def test_the_content_fingerprint_is_that_of_the_manifests(tmp_path) -> None:
    """Checkpoints have it: with another one no run of an earlier version could go on."""
    root = make_token_set(tmp_path, n_samples=90, n_validation=30, n_shards=3, crops=2)
    shards = load_shard_manifests(root, ShardManifest)
    parts = [shard.splits["train"] for shard in shards] + [shard.more_crops[0] for shard in shards]
    sizes = np.array([block.n_samples for shard in shards for block in shard.splits["train"].blocks])
    expected = fingerprint({"parts": [[part.path, part.checksum] for part in parts]}, {"block_sizes": sizes})
    assert TokenDataset(root).content_fingerprint == expected


def test_data_sets_of_earlier_versions_are_read(tmp_path) -> None:
    """Their manifests have the details, manifest.json has the manifests, and some have no digest."""
    root = str(tmp_path)
    inline = {"code_histogram": [1, 0, 0, 2], "caption_lengths": {3: 2}, "dropped_samples": [("k", "unreadable")]}
    old = [one.model_copy(update=inline) for one in THREE]
    write(root, *old)
    for file in tmp_path.rglob("*.json"):
        tree = json.loads(file.read_text())
        del tree["digest"]
        file.write_text(json.dumps(tree))
    assert [one.read_details(root).code_histogram for one in load_shard_manifests(root, ShardManifest)] == [[1, 0, 0, 2]] * 3
    expected = merge(INFO, [(one, one.read_details(root)) for one in old])
    assert load_manifest(root) == expected[0].model_copy(update={"complete": False})
    merged = {name: getattr(expected[0], name) for name in ("n_samples", "dropped", "code_histogram", "caption_lengths")}
    slim = [one.model_copy(update={"code_histogram": [], "caption_lengths": {}, "dropped_samples": []}) for one in old]
    manifest = DatasetManifest(fingerprint=INFO.fingerprint, complete=True, shards=slim, **merged)
    objects.write_bytes(objects.join(root, "manifest.json"), manifest.to_json())
    assert load_index(root) == expected
    assert load_manifest(root).n_input == expected[0].n_input


def _full_size(number: int) -> tuple[ShardManifest, ShardDetails]:
    """A shard of 10,000 images as the paper's data would have, with 900 dropped ones."""
    rng, name = np.random.default_rng(number), f"{number:05d}"

    def part(split: str, sizes: list[int]) -> Part:
        n, n_samples = len(sizes), np.array(sizes)
        blocks = n_samples * 2160 + rng.integers(4096, size=n), n_samples, rng.integers(2**32, size=n)
        path, columns = f"data/{name}-{rng.bytes(6).hex()}-{split}.tar", BlockColumns.of_arrays(name, *blocks)
        return Part(path=path, bytes=2**24, checksum=rng.bytes(32).hex(), n_samples=sum(sizes), blocks=columns)

    packed = ShardDetails(
        code_histogram=rng.integers(3000, size=INFO.n_codes).tolist(),
        caption_lengths=dict.fromkeys(range(90), 100),
        dropped_samples=[(f"{name}/{key:09d}", "near duplicate") for key in range(900)],
    )
    manifest = ShardManifest(
        shard=name,
        attempt=rng.bytes(6).hex(),
        input=InputIdentity(path=f"s3://bucket/raw/data/{name}-{'a' * 12}.tar", bytes=2**29, checksum=rng.bytes(32).hex()),
        splits={"train": part("train", [256] * 35 + [117]), "validation": part("validation", [23])},
        n_input=10_000,
        dropped={"near duplicate": 900},
        details=StoredFile.of(f"details/{name}-{rng.bytes(6).hex()}.json.gz", packed.pack()),
        fingerprint=INFO.fingerprint,
        seconds=80.123,
        finished=1.8e9,
    )
    return manifest, packed


def test_a_shard_takes_kilobytes_in_its_manifest_in_the_driver_and_in_the_index() -> None:
    """With codes and dropped keys in it, a manifest took 108 KB on disk and 387 KB in memory: 10 GB for 25,000 shards."""
    assert max(len(_full_size(number)[0].to_json()) for number in range(5)) < 4096
    peaks = {n: peak_of(lambda n=n: merge(INFO, map(_full_size, range(n)))) for n in (20, 80)}
    assert (peaks[80] - peaks[20]) / 60 < 5000
    _, index = merge(INFO, map(_full_size, range(80)))
    assert len(index.pack()) / 80 < 500
