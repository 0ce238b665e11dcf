"""Any range of a parameter can be read from the files of any number of ranks."""

from pathlib import Path

import pytest
import torch

from dalle_ds.errors import DataError
from dalle_ds.parallel.checkpoint_tensors import AVERAGE, WEIGHTS, SavedState, StateParts

SHAPES = {"matrix": torch.Size([7, 5]), "gain": torch.Size([3])}
VALUES = {"matrix": torch.arange(35.0).view(7, 5), "gain": torch.tensor([1.5, 2.5, 3.5])}


def write(folder: Path, world_size: int, kinds: tuple[str, ...] = (WEIGHTS,)) -> None:
    """Shards like those of ZeRO-3: all have the same length, the last ones are padded."""
    folder.mkdir(exist_ok=True)
    for rank in range(world_size):
        parts = StateParts(SHAPES, steps={"matrix": 4.0, "gain": 4.0})
        for name, values in VALUES.items():
            n = -(-values.numel() // world_size)
            padded = torch.cat([values.flatten(), torch.full((n * world_size - values.numel(),), float("nan"))])
            for kind in kinds:
                parts.add(kind, name, rank * n, padded[rank * n : (rank + 1) * n])
        parts.write(folder, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_any_stretch_comes_back_whoever_wrote_it(tmp_path: Path, world_size: int) -> None:
    write(tmp_path, world_size, (WEIGHTS, AVERAGE))
    saved = SavedState(tmp_path)
    assert saved.shapes == SHAPES and saved.steps == {"matrix": 4.0, "gain": 4.0}
    assert sorted(saved.kinds("matrix")) == [AVERAGE, WEIGHTS]
    for name, values in VALUES.items():
        flat = values.flatten()
        assert torch.equal(saved.whole(WEIGHTS, name), values)
        for start in range(len(flat) + 2):
            for stop in range(start, len(flat) + 4):
                assert torch.equal(saved.read(AVERAGE, name, start, stop), flat[start:stop])


def test_optimizer_codes_keep_their_type(tmp_path: Path) -> None:
    parts = StateParts({"w": torch.Size([4])})
    parts.add("optimizer.exp_avg", "w", 0, torch.tensor([1, -2, 3, 4], dtype=torch.int16))
    parts.write(tmp_path, 0, 1)
    saved = SavedState(tmp_path)
    assert saved.dtype("optimizer.exp_avg", "w") is torch.int16
    assert saved.read("optimizer.exp_avg", "w", 1, 3).tolist() == [-2, 3]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 0 state-"):
        SavedState(tmp_path)
    write(tmp_path, 3)
    (tmp_path / "state-00001-of-00003.safetensors").unlink()
    with pytest.raises(DataError, match="holds 2 state-.*expected 3"):
        SavedState(tmp_path)


def test_a_part_that_nobody_wrote_is_found(tmp_path: Path) -> None:
    for rank, start in enumerate((0, 20)):
        parts = StateParts({"matrix": SHAPES["matrix"]})
        parts.add(WEIGHTS, "matrix", start, VALUES["matrix"].flatten()[start : start + 15])
        parts.write(tmp_path, rank, 2)
    with pytest.raises(DataError, match="weights of matrix ends at 15, expected 35 values"):
        SavedState(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    file = tmp_path / "state-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match="state-00000-of-00001.safetensors: not a safetensors file"):
        SavedState(tmp_path)
