"""Token shards: one ranged read returns a block, files are reproducible byte for byte, and webdataset reads them too."""

from pathlib import Path

import numpy as np
import pytest
import webdataset

from dalle_ds.data.manifest import Part
from dalle_ds.data.tokens.shards import PartWriter, read_block, unbatch
from dalle_ds.errors import DataError
from dalle_ds.storage import objects

N = 16


def sample(i: int) -> tuple[np.ndarray, str, str, str]:
    return np.random.default_rng(i).integers(0, 2**16, N), f"key-{i}", f"caption {i} \u2013 \U0001f600", f"group-{i // 2}"


def write_part(root: str, folder: Path, n_samples: int = 23, block_samples: int = 10) -> Part:
    folder.mkdir(exist_ok=True)
    with PartWriter(folder / "part.tar", "00007", N, block_samples) as writer:
        for i in range(n_samples):
            writer.add(*sample(i))
        assert writer.n_samples == n_samples
        part = writer.finish("data/part.tar")
    objects.put_file(folder / "part.tar", objects.join(root, part.path))
    return part


def test_blocks_come_back(any_root: str, tmp_path: Path) -> None:
    part = write_part(any_root, tmp_path)
    assert [block.n_samples for block in part.blocks] == [10, 10, 3]
    assert part.n_samples == 23
    i = 0
    for block in part.blocks:
        tokens_nN, keys, captions = read_block(any_root, part, block)
        assert tokens_nN.dtype == np.uint16
        for row, key, caption in zip(tokens_nN, keys, captions, strict=True):
            codes, expected_key, expected_caption, _ = sample(i)
            assert np.array_equal(row, codes)
            assert (key, caption) == (expected_key, expected_caption)
            i += 1
    assert i == 23


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write_part(str(tmp_path / name), tmp_path / f"work-{name}") for name in "ab")
    assert first == second


def test_webdataset_reads_it_with_one_stage(tmp_path: Path) -> None:
    part = write_part(str(tmp_path), tmp_path)
    found = list(webdataset.WebDataset(str(tmp_path / part.path), shardshuffle=False).compose(unbatch))
    assert len(found) == 23
    for i, record in enumerate(found):
        codes, key, caption, group = sample(i)
        assert (record["__key__"], record["caption"], record["group"]) == (key, caption, group)
        assert np.array_equal(record["tokens"], codes)


def test_a_block_costs_little_more_than_its_codes(tmp_path: Path) -> None:
    with PartWriter(tmp_path / "part.tar", "00000", 1024) as writer:
        for i in range(512):
            writer.add(np.zeros(1024, dtype=np.int64), f"{i:09d}", "a caption of forty-two characters, or so..", f"{i:09d}")
        part = writer.finish("part.tar")
    assert part.bytes / part.n_samples < 2200  # DESIGN: 1.7 to 2.1 kB of codes; a tar of single samples takes 3.6 kB


def test_damage_is_found(tmp_path: Path) -> None:
    part = write_part(str(tmp_path), tmp_path)
    file = tmp_path / part.path
    data = bytearray(file.read_bytes())
    data[part.blocks[1].offset + 700] ^= 1
    file.write_bytes(data)
    read_block(str(tmp_path), part, part.blocks[0])
    with pytest.raises(DataError, match="block 00007-00001: CRC-32 .* damaged"):
        read_block(str(tmp_path), part, part.blocks[1])
    file.write_bytes(data[: part.blocks[2].offset + 100])
    with pytest.raises(DataError, match="truncated"):
        read_block(str(tmp_path), part, part.blocks[2])
    file.unlink()
    with pytest.raises(DataError, match="it does not exist"):
        read_block(str(tmp_path), part, part.blocks[0])


@pytest.mark.parametrize("tokens", [np.zeros(N - 1, dtype=np.int64), np.full(N, 2**16), np.full(N, -1)])
def test_tokens_that_do_not_fit_are_refused(tmp_path: Path, tokens: np.ndarray) -> None:
    with PartWriter(tmp_path / "part.tar", "0", N) as writer, pytest.raises(ValueError, match="tokens of k"):
        writer.add(tokens, "k", "c", "g")
