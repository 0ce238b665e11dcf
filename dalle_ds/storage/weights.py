"""Weights files: safetensors that carry their config and their fingerprint, in one file or, above a size, in several.

    model.safetensors                     one file; its metadata say what it holds
    model-00001-of-00003.safetensors ...  several, and
    model.safetensors.index.json          which tensor is where (the layout of Hugging Face), with the same metadata

Either is read and written one tensor at a time.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dalle_ds.errors import DataError
from dalle_ds.recipes import canonical_json
from dalle_ds.storage import objects
from dalle_ds.storage.buckets import in_buckets
from dalle_ds.storage.fingerprint import LENGTH, FingerprintHasher
from dalle_ds.storage.safetensors_writer import SafetensorsWriter
from dalle_ds.storage.stored_tensors import StoredTensor, read_layout

Kind = Literal["dvae", "prior"]


@dataclass(frozen=True)
class Weights:
    """The content of a weights file; `fingerprint` was checked against it."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    fingerprint: str
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredWeights:
    """Weights that lie in their files; `fingerprint` is what they claim to have."""

    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    fingerprint: str
    extra: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_weights(
    url: str | Path,
    *,
    kind: Kind,
    config: dict[str, Any],
    state: Mapping[str, Tensor | StoredTensor],
    extra: Mapping[str, str] | None = None,
    max_file_bytes: int | None = None,
    wrote: Callable[[int], object] = lambda n: None,
) -> str:
    """Write weights and return their fingerprint. Each file appears whole or not at all.

    Args:
        url: of the single file; several are named after it.
        state: tensors, or where they lie: those are in memory one at a time.
        extra: kept, but no part of the fingerprint.
        max_file_bytes: write several files rather than one above this; None: always one.
        wrote: called with the bytes of each tensor that was written.
    """
    # Names in order are what the fingerprint is over. It is known after the last byte, so the header has a placeholder of its
    # length, filled in before the file gets its name: a second pass would read a large checkpoint from its disks again.
    parts = in_buckets(sorted(state), lambda name: state[name].nbytes, max_file_bytes or math.inf)
    before = _files_of_index(url)
    hasher = FingerprintHasher(_identity(kind, config))
    metadata = {
        "format": "pt",
        "kind": kind,
        "config": canonical_json(config),
        "fingerprint": "0" * LENGTH,
        "extra": canonical_json(dict(extra or {})),
    }
    if len(parts) == 1:
        with objects.atomic_object(url) as file, SafetensorsWriter(file, state, metadata) as writer:
            _pour(parts[0], state, writer, hasher, wrote)
            writer.replace_metadata({**metadata, "fingerprint": hasher.value()})
        objects.delete(_index_url(url))
        files = []
    else:
        files = [_part_url(url, number, len(parts)) for number in range(1, len(parts) + 1)]
        for part_url, names in zip(files, parts, strict=True):
            part, about = {name: state[name] for name in names}, {"format": "pt", "kind": kind}
            with objects.atomic_object(part_url) as file, SafetensorsWriter(file, part, about) as writer:
                _pour(names, state, writer, hasher, wrote)
        index = {
            "metadata": {
                "total_size": sum(tensor.nbytes for tensor in state.values()),
                **metadata,
                "fingerprint": hasher.value(),
            },
            "weight_map": {name: _name(file) for file, names in zip(files, parts, strict=True) for name in names},
        }
        objects.write_bytes(_index_url(url), json.dumps(index, indent=1).encode())
        objects.delete(url)
    for stale in set(before) - set(files):  # of a model that was here
        objects.delete(stale)
    return hasher.value()


def _pour(
    names: list[str],
    state: Mapping[str, Tensor | StoredTensor],
    writer: SafetensorsWriter,
    hasher: FingerprintHasher,
    wrote: Callable[[int], object],
) -> None:
    def one(name: str) -> int:  # a function of its own: its tensor is gone before the next is read
        source = state[name]
        tensor = source.read() if isinstance(source, StoredTensor) else source.detach().cpu().contiguous()
        writer.put(name, tensor)
        hasher.add(name, tensor)
        return tensor.nbytes

    for name in names:
        wrote(one(name))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def open_weights(url: str | Path, kind: Kind) -> StoredWeights:
    """What weights say of themselves, and where their tensors lie; nothing else is read, nor checked.

    Raises:
        DataError: no such file, no weights file, cut short, or of another kind.
    """
    try:
        metadata, tensors = read_layout(url)
    except FileNotFoundError:
        found = _read_parts(url)
        if found is None:
            raise DataError(f"{url}: no such {kind} weights file") from None
        metadata, tensors = found
    missing = {"kind", "config", "fingerprint"} - metadata.keys()
    if missing:
        raise DataError(f"{url}: a safetensors file, but not one of ours: its metadata lacks {', '.join(sorted(missing))}")
    if metadata["kind"] != kind:
        raise DataError(f"{url}: holds a {metadata['kind']}, expected a {kind}")
    extra = json.loads(metadata.get("extra", "{}"))
    return StoredWeights(json.loads(metadata["config"]), tensors, metadata["fingerprint"], extra)


def read_weights(url: str | Path, kind: Kind, device: str | torch.device = "cpu") -> Weights:
    """Read weights, each tensor straight to `device`, and check that the content has the fingerprint it claims.

    Raises:
        DataError: no such file, no weights file, damaged, or of another kind.
    """
    opened = open_weights(url, kind)
    state = {name: tensor.to(device) for name, tensor in _checked(url, kind, opened)}
    return Weights(opened.config, state, opened.fingerprint, opened.extra)


def fetch_weights(name: str, fetch: Callable[[str], Path]) -> None:
    """Copy the one file of weights, or its index and all parts that the index names.

    Args:
        name: of the single file.
        fetch: copies a file of that name and returns the copy; raises FileNotFoundError where there is none.

    Raises:
        FileNotFoundError: neither is there. DataError: the index is damaged.
    """
    try:
        fetch(name)
        return
    except FileNotFoundError:
        index = fetch(_index_url(name))
    try:
        files = {_name(file) for file in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{_index_url(name)}: not an index of weights files ({error!r})") from None
    for file in sorted(files):
        fetch(file)


def verified_fingerprint(url: str | Path, kind: Kind) -> str:
    """The fingerprint of weights, checked like `read_weights` without keeping them. Raises DataError as that does."""
    opened = open_weights(url, kind)
    for _ in _checked(url, kind, opened):
        pass
    return opened.fingerprint


def _checked(url: str | Path, kind: Kind, opened: StoredWeights) -> Iterator[tuple[str, Tensor]]:
    """All tensors in the order of their names; at the end a DataError, if they are not what they claim to be."""
    hasher = FingerprintHasher(_identity(kind, opened.config))
    try:
        # neighbours by name are in the same file: each is downloaded once
        for file, stored in itertools.groupby(sorted(opened.tensors.items()), lambda item: item[1].pieces[0].url):
            with objects.local_copy(file) as local:
                for name, tensor in stored:
                    value = tensor.in_file(local).read()
                    hasher.add(name, value)
                    yield name, value
    except FileNotFoundError as error:
        raise DataError(f"{url}: {error}") from None
    if hasher.value() != opened.fingerprint:
        raise DataError(f"{url}: damaged: its content has fingerprint {hasher.value()}, its header says {opened.fingerprint}")


def _read_parts(url: str | Path) -> tuple[dict[str, str], dict[str, StoredTensor]] | None:
    """Metadata and tensors of weights in several files; None where there is no index."""
    try:
        index = json.loads(objects.read_bytes(_index_url(url)))
        metadata, weight_map = index["metadata"], index["weight_map"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{_index_url(url)}: not an index of weights files ({error!r})") from None
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        try:
            _, found = read_layout(_beside(url, file))
        except FileNotFoundError:
            raise DataError(f"{_beside(url, file)}: no such file, though {_index_url(url)} names it") from None
        tensors |= {name: tensor for name, tensor in found.items() if weight_map.get(name) == file}
    missing = weight_map.keys() - tensors.keys()
    if missing:
        raise DataError(f"{url}: its files lack {', '.join(sorted(missing)[:5])}, which the index names")
    return metadata, tensors


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def _identity(kind: Kind, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "config": dict(config)}


def _index_url(url: str | Path) -> str:
    return f"{url}.index.json"


def _part_url(url: str | Path, number: int, n_parts: int) -> str:
    return f"{str(url).removesuffix('.safetensors')}-{number:05d}-of-{n_parts:05d}.safetensors"


def _files_of_index(url: str | Path) -> list[str]:
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        index = json.loads(objects.read_bytes(_index_url(url)))
        return [_beside(url, file) for file in set(index["weight_map"].values())]
    return []


def _name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _beside(url: str | Path, name: str) -> str:
    # a name, not a path: an index cannot point out of its folder
    folder, slash, _ = str(url).rpartition("/")
    return f"{folder}{slash}{_name(name)}"
