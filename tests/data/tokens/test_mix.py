"""Mix of token data sets: samples by weight, complete epochs of each, equal on any number of ranks, exact resume."""

import itertools
from collections import Counter

import pytest
import torch

from dalle_ds.data.tokens.batches import TokenStream, validation_batches
from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.errors import ConfigError, FingerprintMismatch
from tests.data.token_sets import make_token_set

SETTINGS = {"text_len": 24, "global_batch": 12, "micro_batch": 2, "seed": 5, "bpe_dropout": 0.1, "caption_dropout": 0.2}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("mix")
    return [
        make_token_set(folder / "a", n_samples=90, n_validation=20, block_samples=8),
        make_token_set(folder / "b", n_samples=150, n_validation=30, block_samples=16, seed=1, noise=0.5),
    ]


def mix(roots: list[str], weights=(0.65, 0.35), split="train") -> TokenMix:
    sets = [TokenDataset(root, split) for root in roots]
    for dataset in sets:  # the data sets' dVAEs depend on their seeds
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
    assert max(map(len, texts.values())) > 1  # the data set has its own epochs, with other dropout draws


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
    assert mix(roots, (0.65, 0.35000001)).fingerprint != mix(roots, (0.65, 0.35)).fingerprint  # quotas differ at large batches
    batches = validation_batches(both, text_len=24, batch=5, rank=0, world_size=1)
    shards = [shard for batch in batches for shard in batch.shards]
    assert Counter(shard.partition("/data/")[0] for shard in shards) == {roots[0]: 20, roots[1]: 30}
