"""A mix of token data sets: shares by weight, whole epochs of each, the same on any number of ranks, resumed exactly."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from dalle_ds.data.reading_order import ReadingOrder, rank_lanes
from dalle_ds.data.token_dataset import TokenDataset
from dalle_ds.data.token_mix import TokenMix
from dalle_ds.data.tokens import TokenStream, validation_batches
from dalle_ds.errors import ConfigError, DataError, FingerprintMismatch
from tests.data.token_sets import make_token_set

BLOCKS = [[7] * 60, [16, 3, 9] * 30, [5] * 200]  # 420, 840 and 1000 samples
PINNED = [359, 684, 12, 1453, 159, 773, 1649, 47, 179, 18, 757, 62]  # update 5
SETTINGS = {"text_len": 24, "global_batch": 12, "micro_batch": 2, "seed": 5, "bpe_dropout": 0.1, "caption_dropout": 0.2}


def order(weights=(0.55, 0.3, 0.15), global_batch=12, **settings) -> ReadingOrder:
    return ReadingOrder(BLOCKS[: len(weights)], weights, **({"seed": 3, "global_batch": global_batch} | settings))


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
        places = reading.places(update, range(global_batch))
        number = sets_of(places.block)
        for k in range(len(weights)):
            seen[k].update(zip(places.epoch[number == k].tolist(), places.index[number == k].tolist(), strict=True))
        given += np.bincount(number, minlength=len(weights))
        assert reading.n_drawn(update + 1) == given.tolist()
        assert np.abs(given - (update + 1) * global_batch * shares).max() <= len(weights) / 2 + 1 + (update + 1) / 1000
    first_index = np.cumsum([0, *(sum(blocks) for blocks in BLOCKS)])
    for k, (share, steps) in enumerate(zip(shares, reading.steps_per_epoch, strict=True)):
        n_samples = sum(BLOCKS[k])
        assert max(seen[k].values()) == 1
        assert all(first_index[k] <= index < first_index[k + 1] for _, index in seen[k])
        for epoch in range(n_updates // steps):
            n_seen = sum(1 for e, _ in seen[k] if e == epoch)
            assert n_samples - n_seen < share * global_batch + 2 * len(weights) + 4


@pytest.mark.parametrize("world_size", [2, 4, 12])
def test_ranks_and_seeks_give_the_same_places(world_size):
    whole = order()
    ranks = [order() for _ in range(world_size)]
    for update in [*range(40), 999, 1000, 1001, 123_456]:
        of_ranks = [
            reading.places(update, rank_lanes(global_batch=12, micro_batch=1, rank=rank, world_size=world_size))
            for rank, reading in enumerate(ranks)
        ]
        for field in ("block", "row", "index", "epoch"):
            expected = getattr(whole.places(update, range(12)), field)
            assert np.array_equal(np.concatenate([getattr(places, field) for places in of_ranks]), expected)
            assert np.array_equal(getattr(order().places(update, range(12)), field), expected)


def test_a_set_keeps_its_lanes_and_walks_through_its_windows():
    """Each slot but the shared ones reads one set for good; a lane reads a window to its end before the next."""
    reading = ReadingOrder([[256] * 400, [256] * 400], (0.7, 0.3), seed=0, global_batch=8)
    blocks = [reading.places(update, range(8)).block for update in range(600)]
    of_slot = np.array(blocks) // 400
    is_fixed = (of_slot == of_slot[0]).all(0)
    assert is_fixed.sum() == 7  # 5 and 2; the remainders 0.6 and 0.4 share a slot
    for slot in np.flatnonzero(is_fixed):
        assert len({of_update[slot] for of_update in blocks}) <= 16
    for number in (0, 1):
        shared = np.array(blocks)[of_slot[:, ~is_fixed][:, 0] == number, ~is_fixed]
        assert len(set(shared.tolist())) <= 16


def test_mixes_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="expected numbers above 0"):
        order((1.0, 0.0))
    with pytest.raises(ConfigError, match="less than one sample in 1000 global batches"):
        order((1.0, 1e-9))
    with pytest.raises(DataError, match="420 samples in 60 blocks of set 1 do not fill its share of 990 samples"):
        order((0.99, 0.01), global_batch=1000)


# Streams of real sets ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("mix")
    return [
        make_token_set(folder / "a", n_samples=90, n_validation=20, block_samples=8),
        make_token_set(folder / "b", n_samples=150, n_validation=30, block_samples=16, seed=1, noise=0.5),
    ]


def mix(roots: list[str], weights=(0.65, 0.35), split="train") -> TokenMix:
    sets = [TokenDataset(root, split) for root in roots]
    for dataset in sets:  # the sets' dVAEs are drawn by their seeds
        dataset.info = dataset.info.model_copy(update={"dvae": "same"})
    return TokenMix(sets, weights)


def read(source: TokenMix, n_updates: int, start: int = 0, rank: int = 0, world_size: int = 1) -> list[tuple]:
    with TokenStream(source, **SETTINGS, start_update=start, rank=rank, world_size=world_size) as stream:
        return [
            (
                [key for batch in update for key in batch.keys],
                torch.cat([batch.text_BT for batch in update]).tolist(),
                torch.cat([batch.image_BN for batch in update]).tolist(),
                [shard for batch in update for shard in batch.shards],
            )
            for update in itertools.islice(stream, n_updates)
        ]


def test_a_stream_of_a_mix_resumes_exactly_at_another_world_size(roots):
    whole = read(mix(roots), 40)
    ranks = [read(mix(roots), 17, start=23, rank=rank, world_size=3) for rank in range(3)]
    for update, parts in enumerate(zip(*ranks, strict=True), start=23):
        assert tuple([x for part in field for x in part] for field in zip(*parts, strict=True)) == whole[update]
    shares = Counter(shard.partition("/data/")[0] for _, _, _, shards in whole for shard in shards)
    assert shares == {roots[0]: 312, roots[1]: 168}  # 40 * 12 * 0.65
    texts: dict[str, set] = {}
    for keys, rows, _, shards in whole:
        for key, row, shard in zip(keys, rows, shards, strict=True):
            texts.setdefault(shard + key, set()).add(tuple(row))
    assert max(map(len, texts.values())) > 1  # epochs of its own, with other draws


def test_the_order_of_a_mix_is_pinned():
    """Golden: a change of this list breaks the resume of every mixed run that is under way."""
    assert order().places(5, range(12)).index.tolist() == PINNED


def test_sets_that_differ_are_refused_with_both_names(roots):
    a, b = (TokenDataset(root) for root in roots)
    with pytest.raises(FingerprintMismatch, match=rf"dvae of data set {roots[1]}(.|\n)*mixed with {roots[0]}"):
        TokenMix([a, b], [1, 1])
    with pytest.raises(ConfigError, match="the same samples"):
        TokenMix([a, a], [1, 1])
    with pytest.raises(ConfigError, match="2 data sets and 1 weights"):
        TokenMix([a, b], [1])


def test_a_mix_is_named_by_its_sets_and_weights_and_validates_on_all(roots):
    both = mix(roots, (0.65, 0.35), "validation")
    assert both.root_url == f"0.65 * {roots[0]} + 0.35 * {roots[1]}"
    for name in ("fingerprint", "content_fingerprint"):
        assert getattr(both, name) == " + ".join(
            f"{weight} * {getattr(dataset, name)}" for dataset, weight in zip(both.sets, (0.65, 0.35), strict=True)
        )
    assert mix(roots, (0.65, 0.35000001)).fingerprint != mix(roots, (0.65, 0.35)).fingerprint  # other quotas at large batches
    batches = validation_batches(both, text_len=24, batch=5, rank=0, world_size=1)
    shards = [shard for batch in batches for shard in batch.shards]
    assert Counter(shard.partition("/data/")[0] for shard in shards) == {roots[0]: 20, roots[1]: 30}
