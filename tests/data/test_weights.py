"""Weights files: what was written comes back, and what was not is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dalle_ds.data.weights import read_weights, write_weights
from dalle_ds.errors import DataError


def test_round_trip(any_root: str) -> None:
    shared = torch.randn(4, 4)
    state = {"a": shared, "tied": shared, "view": shared[1:], "half": torch.randn(3).half(), "bf": torch.randn(3).bfloat16(),
             "scalar": torch.tensor(7)}
    mark = write_weights(f"{any_root}/w.safetensors", kind="dvae", config={"n": 1}, state=state, extra={"made": "here"})
    weights = read_weights(f"{any_root}/w.safetensors", "dvae")
    assert weights.fingerprint == mark
    assert (weights.config, weights.extra) == ({"n": 1}, {"made": "here"})
    assert weights.state.keys() == state.keys()
    for name, tensor in state.items():
        assert weights.state[name].dtype == tensor.dtype
        assert torch.equal(weights.state[name], tensor)


def test_extra_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    first = write_weights(tmp_path / "1", kind="dvae", config={}, state=state, extra={"when": "today"})
    assert first == write_weights(tmp_path / "2", kind="dvae", config={}, state=state)
    assert first != write_weights(tmp_path / "3", kind="prior", config={}, state=state)
    assert first != write_weights(tmp_path / "4", kind="dvae", config={"x": 1}, state=state)


def test_damage_is_found(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    write_weights(file, kind="dvae", config={}, state={"a": torch.zeros(1000)})
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="damaged: its content has fingerprint"):
        read_weights(file, "dvae")
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="not a safetensors file"):
        read_weights(file, "dvae")


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    with pytest.raises(DataError, match="no such dvae weights file"):
        read_weights(file, "dvae")
    file.write_text("this is no tensor")
    with pytest.raises(DataError, match="not a safetensors file"):
        read_weights(file, "dvae")
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(DataError, match="lacks config, fingerprint, kind"):
        read_weights(file, "dvae")
    write_weights(file, kind="prior", config={}, state={"a": torch.ones(1)})
    with pytest.raises(DataError, match="holds a prior, expected a dvae"):
        read_weights(file, "dvae")
    with pytest.raises(DataError, match="not a safetensors file|no such"):
        read_weights(tmp_path, "dvae")
