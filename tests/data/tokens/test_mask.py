"""Masked samples: readers skip them, and read the others as if they were the whole data set."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_ds.data.manifest import Split
from dalle_ds.data.tokens.batches import TokenBatch, TokenStream, validation_batches
from dalle_ds.data.tokens.dataset import TokenDataset, _count_masked
from dalle_ds.data.tokens.dataset_files import load_index, publish
from dalle_ds.data.tokens.index import TokenIndex
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.data.tokens.shards import read_block
from tests.data.token_sets import make_token_set
from tests.support.memory import peak_of

GLOBAL_BATCH = 12


def keys_of(root: str, split: Split) -> list[str]:
    parts = load_index(root)[1].parts(split)
    return [key for part in parts for block in part.blocks for key in read_block(root, part, block)[1]]


def mask(root: str, masked: dict[Split, set[int]]) -> None:
    manifest, index = load_index(root)
    flags = {split: np.isin(np.arange(len(keys_of(root, split))), list(rows)) for split, rows in masked.items()}
    publish(root, manifest, index.with_mask(flags))


def batches(root: str, n_updates: int, *, world_size: int = 1, start: int = 0) -> list[list[TokenBatch]]:
    """For each update, the samples of all ranks in their order, in micro-batches of 2."""
    settings = {"text_len": 24, "global_batch": GLOBAL_BATCH, "micro_batch": 2, "seed": 3, "bpe_dropout": 0.1}
    ranks = []
    for rank in range(world_size):
        mix = TokenMix([TokenDataset(root)])
        with TokenStream(mix, **settings, rank=rank, world_size=world_size, start_update=start) as stream:
            ranks.append(list(itertools.islice(stream, n_updates)))
    return [sum(of_update, []) for of_update in zip(*ranks, strict=True)]


def assert_same(ours: list[list[TokenBatch]], theirs: list[list[TokenBatch]]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(sum(ours, []), sum(theirs, []), strict=True):
        assert one.keys == other.keys and one.captions == other.captions
        assert torch.equal(one.text_BT, other.text_BT) and torch.equal(one.image_BN, other.image_BN)


@pytest.fixture(params=[1, 2], ids=["one crop", "two crops"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return make_token_set(tmp_path / "tokens", n_samples=150, n_validation=50, n_shards=3, crops=request.param)


def test_readers_skip_masked_samples_and_nothing_else(root: str) -> None:
    unmasked, of_train = batches(root, 12), keys_of(root, "train")
    before = TokenDataset(root).content_fingerprint
    mask(root, {"train": {}, "validation": {}})
    assert_same(batches(root, 12), unmasked)
    assert TokenDataset(root).content_fingerprint == before, "no masked sample: the data set is the same"

    rows = {0, 7, 8, 9, 149, *range(16, 32)}  # a whole block too
    mask(root, {"train": rows, "validation": {1}})
    dataset = TokenDataset(root)
    assert (dataset.n_samples, dataset.n_blocks) == (150 - len(rows), 12)
    assert dataset.content_fingerprint != before
    kept = {key for row, key in enumerate(of_train) if row not in rows}
    n_updates = len(kept) // GLOBAL_BATCH
    seen = [key for batch in sum(batches(root, n_updates), []) for key in batch.keys]
    assert len(seen) == len(set(seen)) == n_updates * GLOBAL_BATCH and set(seen) <= kept
    assert {key for batch in sum(batches(root, 4 * n_updates), []) for key in batch.keys} == kept
    stored = {key: (batch, i) for batch in sum(unmasked, []) for i, key in enumerate(batch.keys)}
    for batch in sum(batches(root, n_updates), []):
        for i, key in enumerate(batch.keys):
            if key in stored:  # one epoch skips a few samples
                other, j = stored[key]
                assert torch.equal(batch.image_BN[i], other.image_BN[j]) and batch.captions[i] == other.captions[j]
    validation = TokenMix([TokenDataset(root, "validation")])
    (batch,) = validation_batches(validation, text_len=24, batch=49, rank=0, world_size=1)
    assert sorted(batch.keys) == sorted(key for row, key in enumerate(keys_of(root, "validation")) if row != 1)


def test_masked_batches_are_the_same_on_any_number_of_ranks_and_after_a_resume(root: str) -> None:
    mask(root, {"train": {3, 4, 100, *range(48, 66)}})
    whole = batches(root, 25)  # over two epochs
    for world_size in (2, 3, 6):
        assert_same(batches(root, 25, world_size=world_size), whole)
    assert_same(batches(root, 14, world_size=3, start=11), whole[11:])


def test_a_mask_is_stored_in_the_index(root: str) -> None:
    _, index = load_index(root)
    flags = np.arange(150) % 10 == 0
    masked = index.with_mask({"train": flags})
    again = TokenIndex.unpack(masked.pack(), "here")
    assert again == masked != index
    assert np.unpackbits(again.masks["train"], count=150).astype(bool).tolist() == flags.tolist()
    assert again.with_mask({}) == index


def test_masked_samples_are_counted_in_little_memory() -> None:
    sizes = np.full(2**18, 255)
    is_masked = np.zeros(sizes.sum(), bool)
    is_masked[np.random.default_rng(0).integers(0, len(is_masked), 100_000)] = True
    expected, packed = is_masked.reshape(-1, 255).sum(1), np.packbits(is_masked)
    assert (_count_masked(packed, sizes) == expected).all()
    assert peak_of(lambda: _count_masked(packed, sizes)) < len(is_masked) / 3, "the mask is never unpacked as a whole"
