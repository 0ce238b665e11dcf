"""Weights files: one safetensors file that carries its config and its fingerprint."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dalle_ds.data import storage
from dalle_ds.data.fingerprint import fingerprint
from dalle_ds.errors import DataError
from dalle_ds.recipes import canonical_json

Kind = Literal["dvae", "prior"]


@dataclass(frozen=True)
class Weights:
    """The content of a weights file; `fingerprint` was checked against it."""

    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    fingerprint: str
    extra: dict[str, str] = field(default_factory=dict)


def weights_fingerprint(kind: Kind, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> str:
    """The fingerprint of a model: its kind, its config and its weights."""
    return fingerprint({"kind": kind, "config": dict(config)}, state)


def write_weights(url: str | Path, *, kind: Kind, config: dict[str, Any], state: Mapping[str, torch.Tensor],
                  extra: Mapping[str, str] | None = None) -> str:
    """Write one weights file, atomically, and return its fingerprint. `extra` is kept but is no part of the fingerprint."""
    tensors = _unshared(state)
    mark = weights_fingerprint(kind, config, tensors)
    metadata = {"format": "pt", "kind": kind, "config": canonical_json(config), "fingerprint": mark,
                "extra": canonical_json(dict(extra or {}))}
    with tempfile.TemporaryDirectory(prefix="dalle-ds-") as folder:
        file = Path(folder) / "weights.safetensors"
        save_file(tensors, file, metadata=metadata)
        storage.put_file(file, url)
    return mark


def read_weights(url: str | Path, kind: Kind) -> Weights:
    """Read a weights file and check that its content has the fingerprint it claims.

    Raises:
        DataError: no such file, no weights file, damaged, or of another kind.
    """
    try:
        with storage.local_copy(url) as file, safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise DataError(f"{url}: no such {kind} weights file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{url}: not a safetensors file ({error})") from None
    missing = {"kind", "config", "fingerprint"} - metadata.keys()
    if missing:
        raise DataError(f"{url}: a safetensors file, but not one of ours: its metadata lacks {', '.join(sorted(missing))}")
    if metadata["kind"] != kind:
        raise DataError(f"{url}: holds a {metadata['kind']}, expected a {kind}")
    config = json.loads(metadata["config"])
    found = weights_fingerprint(kind, config, state)
    if found != metadata["fingerprint"]:
        raise DataError(f"{url}: damaged: its content has fingerprint {found}, its header says {metadata['fingerprint']}")
    return Weights(config, state, found, json.loads(metadata.get("extra", "{}")))


def _unshared(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # safetensors refuses tensors that share memory (tied weights, views); it wants each on its own.
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in seen or own.untyped_storage().nbytes() != own.nbytes:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        tensors[name] = own
    return tensors
