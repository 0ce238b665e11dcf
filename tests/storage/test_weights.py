"""Weights files are read back unchanged, and other files are refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.weights import PutPart, pour_weights, read_weights, verified_fingerprint, write_weights


def test_round_trip(any_root: str) -> None:
    shared = torch.randn(4, 4)
    state = {
        "a": shared,
        "tied": shared,
        "view": shared[1:],
        "half": torch.randn(3).half(),
        "bf": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(7),
    }
    mark = write_weights(f"{any_root}/w.safetensors", kind="dvae", config={"n": 1}, state=state, extra={"made": "here"})
    weights = read_weights(f"{any_root}/w.safetensors", "dvae")
    assert weights.fingerprint == mark
    assert (weights.config, weights.extra) == ({"n": 1}, {"made": "here"})
    assert weights.state.keys() == state.keys()
    for name, tensor in state.items():
        assert weights.state[name].dtype == tensor.dtype
        assert torch.equal(weights.state[name], tensor)


def test_files_are_what_the_library_reads_and_writes(tmp_path: Path) -> None:
    state = {
        "b": torch.randn(3, 2),
        "a": torch.randn(5).half(),
        "n": torch.tensor([1, 2]),
        "flag": torch.tensor([True]),
        "none": torch.empty(0, 3),
        "small": torch.randn(2).to(torch.float8_e5m2),
    }
    mark = write_weights(tmp_path / "ours", kind="dvae", config={"n": 1}, state=state)
    with safe_open(tmp_path / "ours", framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["fingerprint"] == mark
    found = load_file(tmp_path / "ours")
    assert found.keys() == state.keys() and all(found[n].view(-1).tolist() == state[n].view(-1).tolist() for n in state)
    save_file(state, tmp_path / "theirs", metadata=metadata)  # as in older versions
    assert read_weights(tmp_path / "theirs", "dvae").fingerprint == verified_fingerprint(tmp_path / "theirs", "dvae") == mark
    with pytest.raises(ValueError, match="c has dtype torch.complex64, which weights files do not support"):
        write_weights(tmp_path / "complex", kind="dvae", config={}, state={"c": torch.zeros(1, dtype=torch.complex64)})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours", "theirs"], "nothing is left of a failed write"


def test_several_files(any_root: str) -> None:
    url = f"{any_root}/model.safetensors"
    state = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    mark = write_weights(f"{any_root}/whole", kind="prior", config={}, state=state)
    progress: list[int] = []

    def pour(put: PutPart) -> None:  # in any order, in parts
        for name, tensor in reversed(state.items()):
            put(name, 3, tensor[3:])
            put(name, 0, tensor[:3])

    how = {"kind": "prior", "config": {}, "tensors": state, "max_file_bytes": 90}
    assert pour_weights(url, **how, pour=pour, hashed=progress.append) == mark
    assert progress == [40] * 5
    files = [f"{any_root}/model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert objects.list_files(any_root) == [*files, f"{url}.index.json", f"{any_root}/whole"]
    weights = read_weights(url, "prior")
    assert weights.fingerprint == mark and all(torch.equal(weights.state[name], state[name]) for name in state)

    data = bytearray(objects.read_bytes(files[2]))
    data[-1] ^= 1
    objects.write_bytes(files[2], bytes(data))
    with pytest.raises(DataError, match="damaged: its content has fingerprint"):
        read_weights(url, "prior")
    objects.write_bytes(files[2], objects.read_bytes(files[1]))
    with pytest.raises(DataError, match="its files lack t4, but the index names them"):
        read_weights(url, "prior")
    objects.delete(files[0])
    with pytest.raises(DataError, match="model-00001-of-00003.safetensors: no such file, but .*index.json names it"):
        read_weights(url, "prior")
    objects.write_bytes(f"{url}.index.json", b"{}")
    with pytest.raises(DataError, match="not an index of weights files"):
        read_weights(url, "prior")


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
    with pytest.raises(DataError, match="contains a prior, expected a dvae"):
        read_weights(file, "dvae")
    with pytest.raises(DataError, match="not a safetensors file|no such"):
        read_weights(tmp_path, "dvae")
