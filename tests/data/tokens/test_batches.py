"""Token batches: correct samples on any number of ranks, exact resume, refused incompatible settings, storage outages."""

import itertools
import logging
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_ds.data.manifest import load_dataset_info
from dalle_ds.data.tokenizer import train_tokenizer
from dalle_ds.data.tokens import dataset as dataset_module
from dalle_ds.data.tokens import prefetch, shards
from dalle_ds.data.tokens.batches import TokenBatch, TokenStream, validation_batches
from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.data.tokens.dataset_files import load_index
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.errors import ConfigError, DataError, FingerprintMismatch
from dalle_ds.padding import PAD
from dalle_ds.storage import objects
from tests.data.token_sets import make_token_set
from tests.support.sealed import edit_json

SIZES = {"n_samples": 150, "n_validation": 50, "block_samples": 16, "n_shards": 3}
SETTINGS = {"text_len": 24, "global_batch": 12, "micro_batch": 2, "rank": 0, "world_size": 1, "seed": 5, "bpe_dropout": 0.1}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return make_token_set(tmp_path_factory.mktemp("set") / "tokens", **SIZES)


@pytest.fixture
def own_root(tmp_path) -> str:
    return make_token_set(tmp_path / "tokens", **SIZES)


def read(dataset: TokenDataset, n_updates: int, **settings) -> list[list[TokenBatch]]:
    with TokenStream(TokenMix([dataset]), **(SETTINGS | settings)) as stream:
        return list(itertools.islice(stream, n_updates))


def joined(updates: list[list[TokenBatch]]) -> list[tuple[list[str], torch.Tensor, torch.Tensor]]:
    """For each update: keys, text tokens and image tokens of all micro-batches."""
    return [
        (
            [key for batch in update for key in batch.keys],
            torch.cat([batch.text_BT for batch in update]),
            torch.cat([batch.image_BN for batch in update]),
        )
        for update in updates
    ]


def assert_same(left, right) -> None:
    assert len(left) == len(right)
    for (keys, text, image), (other_keys, other_text, other_image) in zip(left, right, strict=True):
        assert keys == other_keys
        assert torch.equal(text, other_text) and torch.equal(image, other_image)


def test_data_set_says_what_it_is(root):
    dataset = TokenDataset(root)
    assert dataset.n_samples == 150 and TokenDataset(root, "validation").n_samples == 50
    assert dataset.info == load_dataset_info(root) and dataset.fingerprint == dataset.info.fingerprint
    assert dataset.tokenizer.fingerprint == dataset.info.tokenizer
    assert dataset.n_blocks == 12  # 3 shards of 50: 16 + 16 + 16 + 2
    assert dataset.content_fingerprint != TokenDataset(root, "validation").content_fingerprint


def test_batches_hold_the_samples_that_were_written(root):
    dataset = TokenDataset(root)
    written = {}
    for part in load_index(root)[1].parts("train"):
        for block in part.blocks:
            tokens_nN, keys, captions = shards.read_block(root, part, block)
            written |= {key: (row, caption, part.path) for row, key, caption in zip(tokens_nN, keys, captions, strict=True)}
    updates = read(dataset, 12, bpe_dropout=0.0)
    seen = [key for update in updates for batch in update for key in batch.keys]
    assert len(seen) == len(set(seen)) == 144  # one epoch, which skips six samples
    for update in updates:
        assert [len(batch) for batch in update] == [2] * 6
        for batch in update:
            assert batch.text_BT.shape == (2, 23) and batch.text_BT.dtype == torch.int64
            assert batch.image_BN.shape == (2, 16) and batch.image_BN.dtype == torch.int64
            for i, key in enumerate(batch.keys):
                row, caption, shard = written[key]
                assert batch.image_BN[i].tolist() == row.tolist()
                assert batch.captions[i] == caption and batch.shards[i] == shard
                ids = dataset.tokenizer.encode(caption)[:23]
                assert batch.text_BT[i].tolist() == ids + [PAD] * (23 - len(ids))


def tokens_by_crop(root: str, n_crops: int) -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = {}
    for crop in range(n_crops):
        for part in load_index(root)[1].parts("train", crop):
            for block in part.blocks:
                tokens_nN, keys, _ = shards.read_block(root, part, block)
                for key, row in zip(keys, tokens_nN.tolist(), strict=True):
                    found.setdefault(key, []).append(row)
    return found


def test_each_epoch_reads_the_next_crop(root, tmp_path):
    cropped = make_token_set(tmp_path / "tokens", **SIZES, crops=3)
    written = tokens_by_crop(cropped, 3)
    assert sum(a == b for a, b, _ in written.values()) < 10
    dataset = TokenDataset(cropped)
    assert (dataset.n_samples, dataset.n_blocks, dataset.n_stored_blocks) == (150, 12, 36)
    updates = read(dataset, 4 * 12)
    for number, update in enumerate(updates):
        for batch in update:
            for key, image_N, shard in zip(batch.keys, batch.image_BN.tolist(), batch.shards, strict=True):
                crop = number // 12 % 3
                assert image_N == written[key][crop]
                assert shard.endswith(f"train-crop{crop}.tar" if crop else "train.tar")
    of_one = read(TokenDataset(root), 4 * 12)
    for ours, theirs in zip(joined(updates), joined(of_one), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]), "the order and the captions are those of one crop"
    assert_same(joined(updates[:12]), joined(of_one[:12]))
    assert_same(joined(read(TokenDataset(cropped), 19, start_update=20)), joined(updates[20:39]))
    (batch,) = validation_batches(TokenMix([TokenDataset(cropped, "validation")]), text_len=24, batch=50, rank=0, world_size=1)
    (other,) = validation_batches(TokenMix([TokenDataset(root, "validation")]), text_len=24, batch=50, rank=0, world_size=1)
    assert torch.equal(batch.image_BN, other.image_BN)
    assert dataset.content_fingerprint != TokenDataset(root).content_fingerprint


def test_in_a_mix_each_data_set_reads_its_own_crops(tmp_path):
    roots = [make_token_set(tmp_path / f"{n}", **SIZES | {"n_samples": 60 * n}, crops=n) for n in (2, 1, 3)]
    written = [tokens_by_crop(root, n) for root, n in zip(roots, (2, 1, 3), strict=True)]
    mix = TokenMix([TokenDataset(root) for root in roots], [0.5, 0.2, 0.3])
    seen: list[dict[str, list[int]]] = [{}, {}, {}]  # for each data set: the crops that its samples were read with
    with TokenStream(mix, **SETTINGS) as stream:
        for update in itertools.islice(stream, 120):
            for batch in update:
                for key, image_N, shard in zip(batch.keys, batch.image_BN.tolist(), batch.shards, strict=True):
                    (number,) = (number for number, root in enumerate(roots) if shard.startswith(f"{root}/"))
                    crop = int(shard.removesuffix(".tar").rpartition("-crop")[2]) if "-crop" in shard else 0
                    assert image_N == written[number][key][crop]
                    seen[number].setdefault(key, []).append(crop)
    for n_crops, crops in zip((2, 1, 3), seen, strict=True):
        assert {crop for of_key in crops.values() for crop in of_key} == set(range(n_crops))


def test_a_data_set_of_one_crop_is_stored_as_before(root):
    assert b"crop" not in objects.read_bytes(f"{root}/manifest.json") + objects.read_bytes(f"{root}/manifests/00000.json")
    assert b'"crops"' not in objects.read_bytes(f"{root}/dataset.json")
    assert TokenDataset(root).n_crops == 1


def test_a_shard_that_lacks_a_crop_is_named(tmp_path):
    root = make_token_set(tmp_path / "tokens", **SIZES, crops=3)
    edit_json(f"{root}/manifests/00001.json", lambda manifest: manifest["more_crops"].pop())
    objects.delete(f"{root}/manifest.json")
    with pytest.raises(DataError, match="shard 00001 of .*: 2 crops of each training image, expected 3 as in dataset.json"):
        TokenDataset(root)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(root, world_size):
    alone = joined(read(TokenDataset(root), 30))
    ranks = [joined(read(TokenDataset(root), 30, rank=rank, world_size=world_size)) for rank in range(world_size)]
    together = [
        (
            [key for keys, _, _ in parts for key in keys],
            torch.cat([text for _, text, _ in parts]),
            torch.cat([image for _, _, image in parts]),
        )
        for parts in zip(*ranks, strict=True)
    ]
    assert_same(together, alone)  # including dropout draws


def test_a_resumed_stream_continues_exactly(root):
    whole = joined(read(TokenDataset(root), 31))
    for start in (1, 12, 29):  # 12: the first update of the second epoch
        assert_same(joined(read(TokenDataset(root), 31 - start, start_update=start)), whole[start:])


def test_the_stream_knows_where_it_is(root):
    with TokenStream(TokenMix([TokenDataset(root)]), start_update=7, **SETTINGS) as stream:
        assert stream.updates_per_epoch == 12 and stream.n_drawn == [84] and stream.next_update == 7
        next(stream)
        assert stream.next_update == 8


def test_dropout_changes_from_epoch_to_epoch_but_not_the_images(root):
    dataset = TokenDataset(root)
    of_key: dict[str, list[tuple]] = {}
    for update in read(dataset, 48, bpe_dropout=0.3):
        for batch in update:
            for i, key in enumerate(batch.keys):
                of_key.setdefault(key, []).append((tuple(batch.text_BT[i].tolist()), tuple(batch.image_BN[i].tolist())))
    often = [versions for versions in of_key.values() if len(versions) == 4]
    assert len(often) > 50
    assert all(len({image for _, image in versions}) == 1 for versions in often)
    assert np.mean([len({text for text, _ in versions}) for versions in often]) > 2


def test_long_captions_are_cut_and_counted(root):
    dataset = TokenDataset(root)
    with TokenStream(TokenMix([dataset]), **(SETTINGS | {"text_len": 9, "bpe_dropout": 0.0})) as stream:
        updates = [next(stream) for _ in range(stream.updates_per_epoch)]
        captions = [caption for update in updates for batch in update for caption in batch.captions]
        n_long = sum(len(dataset.tokenizer.encode(caption)) > 8 for caption in captions)
        assert stream.n_truncated == n_long > 0
    assert all(batch.text_BT.shape == (2, 8) and (batch.text_BT[0] >= 0).all() for batch in updates[0])


def test_a_small_cache_gives_the_same_and_says_so(root, caplog):
    with caplog.at_level(logging.WARNING):
        small = joined(read(TokenDataset(root, cache_bytes=1), 13))
    assert "blocks will be read repeatedly" in caplog.text
    assert_same(small, joined(read(TokenDataset(root), 13)))


def test_an_epoch_reads_each_block_once_where_the_cache_holds_them(root):
    dataset = TokenDataset(root)
    read(dataset, 24)
    assert dataset._cache.n_loads == dataset.n_blocks


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"global_batch": 10, "micro_batch": 4}, ConfigError, "global batch 10 is not a multiple of micro-batch 4 x 1 ranks"),
        ({"world_size": 5}, ConfigError, "global batch 12 .* x 5 ranks = 10"),
        ({"global_batch": 152}, DataError, "150 samples in 12 blocks do not fill one global batch of 152"),
        ({"bpe_dropout": 1.2}, ConfigError, "bpe_dropout 1.2"),
        ({"caption_dropout": 1.0}, ConfigError, "caption_dropout 1.0: expected a probability of at least 0 and below 1"),
        ({"caption_dropout": -0.1}, ConfigError, "caption_dropout -0.1"),
        ({"caption_dropout": float("nan")}, ConfigError, "caption_dropout nan"),
        ({"start_update": -1}, ConfigError, "start_update -1"),
        ({"text_len": 1}, ConfigError, "text_len is 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_birth(root, settings, error, message):
    with pytest.raises(error, match=message):
        TokenStream(TokenMix([TokenDataset(root)]), **(SETTINGS | settings))


def test_a_closed_stream_leaves_no_thread(root):
    stream = TokenStream(TokenMix([TokenDataset(root)]), **(SETTINGS | {"rank": 3, "world_size": 6}))
    next(stream)
    assert any(thread.name == "token-stream-3" for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name == "token-stream-3" for thread in threading.enumerate())


# Caption dropout ----------------------------------------------------------------------------------------------------------


def texts_by_sample(updates: list[list[TokenBatch]], updates_per_epoch: int = 12) -> dict[tuple[int, str], list[int]]:
    """{(epoch, key): row of text tokens}."""
    return {
        (number // updates_per_epoch, key): row
        for number, update in enumerate(updates)
        for batch in update
        for key, row in zip(batch.keys, batch.text_BT.tolist(), strict=True)
    }


def test_dropped_captions_are_all_pad_and_kept_ones_have_the_same_pieces(root):
    dataset = TokenDataset(root)
    full, some = read(dataset, 36), read(dataset, 36, caption_dropout=0.4)
    before, after = texts_by_sample(full), texts_by_sample(some)
    assert before.keys() == after.keys() and len(before) == 3 * 144
    assert all(row[0] != PAD for row in before.values())
    dropped = {sample for sample, row in after.items() if row == [PAD] * 23}
    assert 130 < len(dropped) < 216  # 432 * 0.4 = 173; four standard deviations are 41
    assert all(after[sample] == before[sample] for sample in before.keys() - dropped)  # including the draws of BPE dropout
    for update, other in zip(full, some, strict=True):
        for batch, twin in zip(update, other, strict=True):
            assert torch.equal(batch.image_BN, twin.image_BN) and batch.captions == twin.captions


def test_the_share_of_dropped_captions_is_the_chance(tmp_path):
    dataset = TokenDataset(make_token_set(tmp_path / "tokens", n_samples=4000, n_validation=16, block_samples=500))
    updates = read(dataset, 8, global_batch=1000, micro_batch=1000, caption_dropout=0.1)
    text = torch.cat([batch.text_BT for update in updates for batch in update])
    n_dropped = int((text == PAD).all(1).sum())
    assert abs(n_dropped - 800) < 4 * (8000 * 0.1 * 0.9) ** 0.5  # standard deviation 27


def test_which_captions_are_dropped_has_nothing_to_do_with_which_merges_are(tmp_path):
    dataset = TokenDataset(make_token_set(tmp_path / "tokens", n_samples=4000, n_validation=16, block_samples=500))
    settings = {"global_batch": 1000, "micro_batch": 1000, "bpe_dropout": 0.02}
    kept, some = (sum(read(dataset, 4, **settings, caption_dropout=chance), []) for chance in (0.0, 0.02))
    whole = []
    for batch, twin in zip(kept, some, strict=True):
        for number in (twin.text_BT == PAD).all(1).nonzero().flatten().tolist():
            pieces = [piece for piece in batch.text_BT[number].tolist() if piece != PAD]
            whole.append(pieces == dataset.tokenizer.encode(batch.captions[number])[:23])
    assert len(whole) > 40
    assert sum(whole) > len(whole) / 2  # with the same draws for both dropouts, each of them would have lost a merge


def test_other_captions_are_dropped_in_another_epoch_or_run(root):
    def dropped(epoch: int, chance: float = 0.5, **settings) -> set[str]:
        texts = texts_by_sample(read(TokenDataset(root), 24, caption_dropout=chance, **settings))
        return {key for (e, key), row in texts.items() if e == epoch and row[0] == PAD}

    first = dropped(0)
    # Two independent halves of 150 samples share a quarter, 37; four standard deviations are 21.
    assert len(first & dropped(1)) < 58 and len(first & dropped(0, seed=6)) < 58 < len(first)
    assert set() < dropped(0, chance=0.2) < first  # a smaller probability drops a subset of the same captions


@pytest.mark.parametrize("world_size", [2, 6])
def test_dropped_captions_are_the_same_on_any_number_of_ranks_and_after_a_resume(root, world_size):
    alone = joined(read(TokenDataset(root), 14, caption_dropout=0.3))
    ranks = [
        joined(read(TokenDataset(root), 9, rank=rank, world_size=world_size, caption_dropout=0.3, start_update=5))
        for rank in range(world_size)
    ]
    together = [
        (
            [key for keys, _, _ in parts for key in keys],
            torch.cat([text for _, text, _ in parts]),
            torch.cat([image for _, _, image in parts]),
        )
        for parts in zip(*ranks, strict=True)
    ]
    assert_same(together, alone[5:])  # the second epoch starts at update 12
    assert any((text == PAD).all(1).any() for _, text, _ in alone[5:])


def test_dropped_captions_are_not_counted_as_cut(root):
    dataset = TokenDataset(root)
    with TokenStream(TokenMix([dataset]), **(SETTINGS | {"text_len": 9, "bpe_dropout": 0.0}), caption_dropout=0.5) as stream:
        batches = [batch for _ in range(12) for batch in next(stream)]
        is_kept = [row[0] != PAD for batch in batches for row in batch.text_BT.tolist()]
        is_long = [len(dataset.tokenizer.encode(caption)) > 8 for batch in batches for caption in batch.captions]
        assert sum(is_long) > stream.n_truncated == sum(np.logical_and(is_kept, is_long)) > 0


def test_validation_drops_no_caption(root):
    dataset = TokenDataset(root, "validation")
    # As training data, the same samples would lose captions.
    assert any((text == PAD).all(1).any() for _, text, _ in joined(read(dataset, 4, caption_dropout=0.5)))
    for batch in validation_batches(TokenMix([dataset]), text_len=24, batch=5, rank=0, world_size=1):
        for caption, row in zip(batch.captions, batch.text_BT.tolist(), strict=True):
            ids = dataset.tokenizer.encode(caption)[:23]
            assert row == ids + [PAD] * (23 - len(ids))


# Incompatible settings are refused ----------------------------------------------------------------------------------------


def test_missing_data_set(tmp_path):
    with pytest.raises(DataError, match="no token data set"):
        TokenDataset(tmp_path)


def test_shard_of_another_data_set(own_root):
    edit_json(f"{own_root}/manifests/00001.json", fingerprint="00000000000000000000")
    objects.delete(f"{own_root}/manifest.json")
    with pytest.raises(FingerprintMismatch, match="00001.*00000000000000000000"):
        TokenDataset(own_root)


def test_manifest_of_another_data_set(own_root):
    edit_json(f"{own_root}/manifest.json", fingerprint="ffff")
    with pytest.raises(FingerprintMismatch, match="manifest.json.*found ffff"):
        TokenDataset(own_root)


def test_a_damaged_or_missing_index_is_named(own_root):
    (index,) = Path(own_root, "index").iterdir()
    whole = index.read_bytes()
    index.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"{index.name}: {len(whole) - 1} bytes with SHA-256 .*, expected {len(whole)} with"):
        TokenDataset(own_root)
    index.unlink()
    with pytest.raises(DataError, match=f"{index.name}: manifest.json names this index, but it does not exist"):
        TokenDataset(own_root)


def test_another_tokenizer(own_root):
    train_tokenizer(["quite other words", "than those of the set"], 400, f"{own_root}/tokenizer.model")
    expected = load_dataset_info(own_root).tokenizer
    with pytest.raises(FingerprintMismatch, match=f"tokenizer .*expected fingerprint {expected}"):
        TokenDataset(own_root)


def test_edited_data_set_description(own_root):
    edit_json(f"{own_root}/dataset.json", grid=8)
    with pytest.raises(FingerprintMismatch, match="was edited"):
        TokenDataset(own_root)


def test_empty_split(tmp_path):
    root = make_token_set(tmp_path / "tokens", n_samples=20, n_validation=0)
    with pytest.raises(DataError, match="no samples in split 'validation', 20 samples in all splits"):
        TokenDataset(root, "validation")


def test_unfinished_encoding_is_read_with_a_warning(tmp_path, caplog):
    root = make_token_set(tmp_path / "tokens", **SIZES, complete=False)
    dataset = TokenDataset(root)
    assert dataset.n_samples == 150 and not dataset.complete and "encoding is not finished" in caplog.text


def test_a_damaged_block_is_named_to_the_consumer(own_root):
    part = load_index(own_root)[1].parts("train")[1]
    url = f"{own_root}/{part.path}"
    data = bytearray(objects.read_bytes(url))
    data[part.blocks[0].offset + 700] ^= 1
    objects.write_bytes(url, bytes(data))
    with pytest.raises(DataError, match=rf"{part.path}, block {part.blocks[0].name}"):
        read(TokenDataset(own_root), 12)


def test_a_lost_shard_is_named_to_the_consumer(own_root):
    part = load_index(own_root)[1].parts("train")[2]
    objects.delete(f"{own_root}/{part.path}")
    with pytest.raises(DataError, match=part.path):
        read(TokenDataset(own_root), 12)


def test_any_other_fault_of_reading_is_named_too(root, monkeypatch):
    def refuse(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(objects, "read_range", refuse)
    with pytest.raises(DataError, match=r"data/0000\d-test-train.tar, block .*PermissionError: not yours"):
        read(TokenDataset(root), 1)


def test_a_read_that_stands_still_is_named_again_and_again(root, monkeypatch, caplog):
    monkeypatch.setattr(prefetch, "WARN_AFTER_S", 0.1)
    read_block = dataset_module.read_block

    def slow(*args):
        while caplog.text.count("no item for") < 3:
            time.sleep(0.01)
        return read_block(*args)

    monkeypatch.setattr(dataset_module, "read_block", slow)
    with caplog.at_level(logging.WARNING):
        read(TokenDataset(root), 1)
    for seconds in ("0.1", "0.2", "0.4"):
        assert re.search(rf"token-stream-0: no item for {seconds} s, waiting for .*.tar, block .* others", caplog.text)


def test_codes_beyond_the_codebook_and_grids_of_another_size(root, monkeypatch):
    def wrong(tokens_nN):
        monkeypatch.setattr("dalle_ds.data.tokens.dataset.read_block", lambda *_: (tokens_nN, ["k"] * 16, ["c"] * 16))

    wrong(np.full((16, 16), 32, dtype=np.uint16))
    with pytest.raises(DataError, match="image token 32, expected codes below 32"):
        read(TokenDataset(root), 1)
    wrong(np.zeros((16, 64), dtype=np.uint16))
    with pytest.raises(DataError, match=r"shape \(16, 64\), expected 16 per sample \(grid 4x4\)"):
        read(TokenDataset(root), 1)


# Validation ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 4, 60])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 49])
def test_validation_has_each_sample_once_at_any_number_of_ranks(root, batch, world_size):
    mix = TokenMix([TokenDataset(root, "validation")])
    ranks = [validation_batches(mix, text_len=24, batch=batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "collectives: as many on every rank"
    sizes = [len(of_rank) for batches in ranks for of_rank in batches]
    assert max(sizes) <= max(batch, 2) and max(sizes) - min(sizes) <= 1
    (whole,) = validation_batches(mix, text_len=24, batch=50, rank=0, world_size=1)
    assert [key for batches in ranks for of_rank in batches for key in of_rank.keys] == list(whole.keys) and len(whole) == 50
    again = validation_batches(mix, text_len=24, batch=batch, rank=0, world_size=world_size)
    assert all(torch.equal(a.text_BT, b.text_BT) and a.keys == b.keys for a, b in zip(ranks[0], again, strict=True))


def test_validation_samples_of_a_rank_are_neighbours(root):
    mix = TokenMix([TokenDataset(root, "validation")])
    for rank in range(5):
        own = validation_batches(mix, text_len=24, batch=1, rank=rank, world_size=5)
        assert len(own) == 10 and len({shard for batch in own for shard in batch.shards}) <= 2, "of 3 shards"


def test_validation_limit_spreads_over_the_shards(root):
    mix = TokenMix([TokenDataset(root, "validation")])
    batches = validation_batches(mix, text_len=24, batch=5, rank=0, world_size=1, limit=34)
    assert sorted(len(batch) for batch in batches) == [4, 5, 5, 5, 5, 5, 5]
    assert len({shard for batch in batches for shard in batch.shards}) > 1
    everything = validation_batches(mix, text_len=24, batch=5, rank=0, world_size=1, limit=10**6)
    assert sum(map(len, everything)) == 50


def test_too_few_samples_to_validate_on(root):
    mix = TokenMix([TokenDataset(root, "validation")])
    for limit, told in (
        (None, r"50 samples for validation \(split 'validation' has 50\), .* at least 51: one on each of 51 ranks"),
        (7, "has 50, at most 7"),
    ):
        with pytest.raises(DataError, match=told):
            validation_batches(mix, text_len=24, batch=30, rank=0, world_size=51, limit=limit)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        validation_batches(TokenMix([TokenDataset(root, "validation")]), text_len=24, batch=1, rank=2, world_size=2)


# Object storage -----------------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_s3_gives_the_same_and_survives_a_lost_server(root, s3, monkeypatch):
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", "60")
    remote = make_token_set(s3.url, **SIZES)
    expected = joined(read(TokenDataset(root), 12))
    with TokenStream(TokenMix([TokenDataset(remote, cache_bytes=1)]), prefetch=1, **SETTINGS) as stream:
        updates = [next(stream) for _ in range(3)]
        s3.server.kill()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", s3.server.ports["s3.port"]))
        threading.Timer(1.0, s3.server.start).start()
        updates += [next(stream) for _ in range(9)]
    assert_same(joined(updates), expected)
