"""A token data set in a user's DataLoader: the order and resume of training, on any number of ranks."""

import itertools
import json

import pytest
import torch
from torch.utils.data import DataLoader

import dalle_ds
from dalle_ds.data.tokens.batches import TokenBatch, TokenStream, validation_batches
from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.errors import FingerprintMismatch
from tests.data.token_sets import make_token_set

SETTINGS = {"text_len": 24, "global_batch": 12, "micro_batch": 2, "seed": 5, "caption_dropout": 0.2}
N_UPDATES = 15  # an epoch has 12


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("set") / "tokens"
    return make_token_set(folder, n_samples=150, n_validation=50, block_samples=16, n_shards=3)


@pytest.fixture(scope="module")
def second(tmp_path_factory, root) -> str:
    return make_token_set(tmp_path_factory.mktemp("second") / "tokens", n_samples=64, n_validation=8, noise=0.5)


def of_training(mix: TokenMix, n_updates: int, **settings) -> list[TokenBatch]:
    """The micro-batches of a training rank."""
    ranks = {"rank": 0, "world_size": 1, "bpe_dropout": 0.1, **SETTINGS, **settings}
    with TokenStream(mix, **ranks) as stream:
        return [batch for update in itertools.islice(stream, n_updates) for batch in update]


def take(batches, n: int) -> list[TokenBatch]:
    return list(itertools.islice(DataLoader(batches, batch_size=None), n))


def assert_same(found: list[TokenBatch], expected: list[TokenBatch]) -> None:
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for batch, other in zip(found, expected, strict=True):
        assert torch.equal(batch.text_BT, other.text_BT) and torch.equal(batch.image_BN, other.image_BN)
        assert batch.captions == other.captions


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_are_those_of_a_training_rank(root, world_size):
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        expected = of_training(TokenMix([TokenDataset(root)]), N_UPDATES, **ranks)
        with dalle_ds.data.open(root, **SETTINGS, **ranks) as batches:
            assert batches.updates_per_epoch == 12 and batches.batches_per_update == 6 // world_size
            assert_same(take(batches, len(expected)), expected)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("n_given", [0, 4, 6, 73])  # an update has 6 micro-batches, or 2 on each of three ranks
def test_a_resumed_loop_goes_on_exactly(root, world_size, n_given):
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        expected = of_training(TokenMix([TokenDataset(root)]), 41, **ranks)[: n_given + 9]
        with dalle_ds.data.open(root, **SETTINGS, **ranks) as batches:
            assert_same(take(batches, n_given), expected[:n_given])
            state = json.loads(json.dumps(batches.state_dict()))
            assert (state["update"], state["given"]) == divmod(n_given, batches.batches_per_update)
            assert_same(take(batches, 9), expected[n_given:])  # a second loop continues
            batches.load_state_dict(state)
            assert_same(take(batches, 9), expected[n_given:])
        with dalle_ds.data.open(root, **SETTINGS, **ranks) as batches:
            batches.load_state_dict(state)
            assert batches.state_dict() == state
            assert_same(take(batches, 9), expected[n_given:])


def test_a_loop_that_starts_at_an_update(root):
    expected = of_training(TokenMix([TokenDataset(root)]), 9)
    with dalle_ds.data.open(root, start_update=7, **SETTINGS) as batches:
        assert_same(take(batches, 12), expected[42:])


def test_another_number_of_ranks_goes_on_after_an_update(root):
    with dalle_ds.data.open(root, **SETTINGS) as batches:
        take(batches, 18)
        state = batches.state_dict()
        take(batches, 1)
        inside = batches.state_dict()
    expected = of_training(TokenMix([TokenDataset(root)]), 6, start_update=3)
    found: list[list[TokenBatch]] = []
    for rank in range(3):
        with dalle_ds.data.open(root, rank=rank, world_size=3, **SETTINGS) as batches:
            with pytest.raises(dalle_ds.UserError, match="world_size is 3, expected the state's 1, inside update 3"):
                batches.load_state_dict(inside)
            batches.load_state_dict(state)
            found.append(take(batches, 12))
    together = [batch for update in range(6) for of_rank in found for batch in of_rank[2 * update : 2 * update + 2]]
    assert_same(together, expected)


def test_a_mix_has_the_order_of_training(root, second):
    expected = of_training(TokenMix([TokenDataset(root), TokenDataset(second)], [0.7, 0.3]), 8)
    with dalle_ds.data.open([(root, 0.7), (second, 0.3)], **SETTINGS) as batches:
        assert_same(take(batches, len(expected)), expected)
        assert {shard.rpartition("/data/")[0] for batch in expected for shard in batch.shards} == {root, second}


def test_without_a_micro_batch_an_update_is_one_batch(root):
    with dalle_ds.data.open(root, text_len=24, global_batch=12, rank=1, world_size=3) as batches:
        assert batches.batches_per_update == 1
        assert [len(batch) for batch in take(batches, 3)] == [4, 4, 4]


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_is_that_of_training(root, world_size):
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        mix = TokenMix([TokenDataset(root, "validation")])
        for limit in (None, 20):
            batches = dalle_ds.data.open(root, "validation", limit=limit, **SETTINGS, **ranks)
            loader = DataLoader(batches, batch_size=None)
            expected = validation_batches(mix, text_len=24, batch=2, limit=limit, **ranks)
            assert len(loader) == len(batches) == len(expected)
            for _ in range(2):
                assert_same(list(loader), expected)


# Incompatible settings are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_are_refused(root, split, start):
    loader = DataLoader(
        dalle_ds.data.open(root, split, **SETTINGS), batch_size=None, num_workers=2, multiprocessing_context=start
    )
    with pytest.raises(dalle_ds.UserError, match="num_workers is above 0, expected 0"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch": 10, "micro_batch": 4}, "global batch 10 is not a multiple of micro-batch 4 x 1 ranks"),
        ({"rank": 3, "world_size": 3}, "rank is 3, expected 0 to 2"),
        ({"world_size": 0}, "rank is 0, expected 0 to -1"),
        ({"text_len": 1}, "text_len is 1, expected at least 2"),
        ({"bpe_dropout": 2.0}, "bpe_dropout 2.0"),
        ({"caption_dropout": 1.0}, "caption_dropout 1.0"),
        ({"split": "test"}, "split 'test': expected one of train, validation"),
        ({"limit": 4}, "limit 4: expected None for split 'train'"),
        ({"split": "validation", "start_update": 3}, "start_update 3: expected 0 for split 'validation'"),
        ({"split": "validation", "world_size": 60}, "50 samples for validation .*expected at least 60"),
    ],
)
def test_a_mistake_is_an_error_when_the_set_is_opened(root, settings, message):
    with pytest.raises(dalle_ds.UserError, match=message):
        dalle_ds.data.open(root, **{**SETTINGS, **settings})


def test_data_that_is_not_there_is_refused(root, second, tmp_path):
    with pytest.raises(dalle_ds.UserError, match="nothing"):
        dalle_ds.data.open(tmp_path / "nothing", **SETTINGS)
    with pytest.raises(dalle_ds.UserError, match="weights .*: expected numbers above 0"):
        dalle_ds.data.open([(root, 1.0), (second, 0.0)], **SETTINGS)
    with pytest.raises(dalle_ds.UserError, match="0 data sets and 0 weights"):
        dalle_ds.data.open([], **SETTINGS)


def test_the_state_of_another_order_is_refused(root, second):
    with dalle_ds.data.open(root, **SETTINGS) as batches:
        state = batches.state_dict()
        with pytest.raises(dalle_ds.UserError, match="seed is 5, expected the state's 6"):
            batches.load_state_dict({**state, "seed": 6})
        with pytest.raises(dalle_ds.UserError, match="state lacks data"):
            batches.load_state_dict({key: value for key, value in state.items() if key != "data"})
    with dalle_ds.data.open(second, **SETTINGS) as batches, pytest.raises(FingerprintMismatch):
        batches.load_state_dict(state)
