"""Exports that are damaged or crafted are refused with one message: no traceback, no images of NaN weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dalle_ds.errors import UserError
from dalle_ds.sampling.export import load_export
from dalle_ds.storage.weights import read_weights, write_weights
from tests.sampling.exports import edit_config, make_export

DEEP = pytest.param("[" * 100_000, id="deep")


HEADERS = [DEEP, "[]", "{", '{"a": 1}', '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}']
INDICES = ["[]", "{}", DEEP, '{"metadata": [], "weight_map": {}}', '{"metadata": {}, "weight_map": {"a": 1}}']
FILES = [("model.safetensors", "prior", "fingerprint"), ("dvae.safetensors", "dvae", "dvae")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    export = make_export(tmp_path_factory.mktemp("whole"))
    load_export(export)
    return export


@pytest.fixture
def export(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "export"))


def with_metadata(file: Path, **changes: object) -> None:
    """Change the metadata in the header of a safetensors file."""
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header["__metadata__"].update(changes)
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + n :])


@pytest.mark.parametrize("text", ["", "[]", "null", "1", "{", "{}", DEEP, '{"format": 2}', '{"format": [2]}'])
def test_a_record_that_is_none(export: Path, text: str) -> None:
    (export / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        load_export(export)


@pytest.mark.parametrize(
    "name, value", [("mlflow", "text"), ("mlflow", [1]), ("data_urls", []), ("update", "x"), ("dvae", None)]
)
def test_a_field_of_another_type(export: Path, name: str, value: object) -> None:
    edit_config(export, **{name: value})
    with pytest.raises(UserError, match=name):
        load_export(export)


@pytest.mark.parametrize("file", ["model.safetensors", "dvae.safetensors"])
@pytest.mark.parametrize(
    "changes",
    [
        {"config": "[]"},
        {"config": "{"},
        pytest.param({"config": "[" * 100_000}, id="deep config"),
        {"config": "null"},
        {"config": 3},
        {"extra": "[]"},
        pytest.param({"extra": "[" * 100_000}, id="deep extra"),
        {"kind": ["prior"]},
        {"fingerprint": None},
    ],
)
def test_metadata_of_another_type(export: Path, file: str, changes: dict[str, object]) -> None:
    with_metadata(export / file, **changes)
    with pytest.raises(UserError, match=file):
        load_export(export)


@pytest.mark.parametrize("value", ['"low"', '"nan"', "[]", '"1e999"'])
def test_additional_metadata_that_is_no_number(export: Path, value: str) -> None:
    with_metadata(export / "dvae.safetensors", extra=f'{{"ln_b_min": {value}}}')
    with pytest.raises(UserError, match=r"dvae\.safetensors: ln_b_min in its metadata is .*, expected a number"):
        load_export(export)


@pytest.mark.parametrize("file", ["model.safetensors", "dvae.safetensors"])
@pytest.mark.parametrize(
    "header", [DEEP, "[]", "{", '{"a": 1}', '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}']
)
def test_headers_that_are_none(export: Path, file: str, header: str) -> None:
    (export / file).write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(UserError, match=f"{file}: not a safetensors file"):
        load_export(export)


@pytest.mark.parametrize(
    "text", ["[]", "{}", DEEP, '{"metadata": [], "weight_map": {}}', '{"metadata": {}, "weight_map": {"a": 1}}']
)
def test_indices_that_are_none(export: Path, text: str) -> None:
    (export / "model.safetensors").unlink()
    (export / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="model.safetensors"):
        load_export(export)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_layers": "three"}, "n_layers = 'three': expected an integer"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"n_layers": 4}, "do not fit the config"),
        ({"n_layers": 2}, "do not fit the config"),
        ({"d_head": 4}, "do not fit the config"),
        *(({name: 10**12}, f"{name} = 1000000000000: expected .* most") for name in ("n_layers", "d_head", "grid", "n_codes")),
    ],
)
def test_signed_weights_with_another_config(export: Path, change: dict[str, object], message: str) -> None:
    weights = read_weights(export / "model.safetensors", "prior")
    mark = write_weights(export / "model.safetensors", kind="prior", config={**weights.config, **change}, state=weights.state)
    edit_config(export, fingerprint=mark)
    with pytest.raises(UserError, match=message):
        load_export(export)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "file, kind, field", [("model.safetensors", "prior", "fingerprint"), ("dvae.safetensors", "dvae", "dvae")]
)
def test_weights_that_are_no_numbers(export: Path, file: str, kind: str, field: str, value: float) -> None:
    weights = read_weights(export / file, kind)
    name = next(name for name, tensor in weights.state.items() if tensor.is_floating_point())
    state = {**weights.state, name: torch.full_like(weights.state[name], value)}
    edit_config(export, **{field: write_weights(export / file, kind=kind, config=weights.config, state=state)})
    with pytest.raises(UserError, match=f"{file}: {name} has NaN or Inf"):
        load_export(export)
