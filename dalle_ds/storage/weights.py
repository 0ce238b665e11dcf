"""Weights files: safetensors with config and fingerprint, in one file or, above a size limit, in several files.

    model.safetensors                     a single file, with config and fingerprint in its metadata
    model-00001-of-00003.safetensors ...  several files, and
    model.safetensors.index.json          their index (tensor name -> file, in Hugging Face's layout) with the same metadata

Both layouts are read and written one tensor at a time.
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
    """The content of a weights file. `fingerprint` is verified."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    fingerprint: str
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredWeights:
    """Weights whose tensors are still in their files. `fingerprint` comes from the metadata and is not verified."""

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
    """Write weights and return their fingerprint. Each file is written atomically.

    Args:
        url: URL of the single file. Several files are named after it.
        config: the model's config, part of the fingerprint.
        state: tensors, or stored tensors. Only one stored tensor is in memory at a time.
        extra: additional metadata, not part of the fingerprint.
        max_file_bytes: maximum size of the tensors in one file; larger weights are written to several files. None: one file.
        wrote: called after each tensor with its size in bytes.
    """
    # The fingerprint covers the tensors in name order and is known only after the last tensor. So the header first has a
    # placeholder of the same length, which is replaced before the file is renamed. A second pass would read a large checkpoint
    # from disk again.
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
    for stale in set(before) - set(files):  # files of a previous model
        objects.delete(stale)
    return hasher.value()


def _pour(
    names: list[str],
    state: Mapping[str, Tensor | StoredTensor],
    writer: SafetensorsWriter,
    hasher: FingerprintHasher,
    wrote: Callable[[int], object],
) -> None:
    def one(name: str) -> int:  # a separate function, so that its tensor is freed before the next is read
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
    """Read only the metadata of weights and the locations of their tensors. Does not verify the fingerprint.

    Raises:
        DataError: the file does not exist, is not a weights file, is truncated, or has another kind.
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
        raise DataError(f"{url}: not a weights file of dalle_ds: its metadata lacks {', '.join(sorted(missing))}")
    if metadata["kind"] != kind:
        raise DataError(f"{url}: contains a {metadata['kind']}, expected a {kind}")
    extra = json.loads(metadata.get("extra", "{}"))
    return StoredWeights(json.loads(metadata["config"]), tensors, metadata["fingerprint"], extra)


def read_weights(url: str | Path, kind: Kind, device: str | torch.device = "cpu") -> Weights:
    """Read weights, moving each tensor directly to `device`, and verify the fingerprint.

    Raises:
        DataError: the file does not exist, is not a weights file, is damaged, or has another kind.
    """
    opened = open_weights(url, kind)
    state = {name: tensor.to(device) for name, tensor in _checked(url, kind, opened)}
    return Weights(opened.config, state, opened.fingerprint, opened.extra)


def fetch_weights(name: str, fetch: Callable[[str], Path]) -> None:
    """Copy the single weights file, or the index and all files that it names.

    Args:
        name: name of the single file.
        fetch: copies the file with a given name and returns the copy's path. Raises FileNotFoundError if it does not exist.

    Raises:
        FileNotFoundError: neither the single file nor the index exists.
        DataError: the index is damaged.
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
    """Verify weights like `read_weights`, without keeping them in memory. Returns their fingerprint.

    Raises:
        DataError: as `read_weights`.
    """
    opened = open_weights(url, kind)
    for _ in _checked(url, kind, opened):
        pass
    return opened.fingerprint


def _checked(url: str | Path, kind: Kind, opened: StoredWeights) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors, sorted by name. After the last one, raises DataError if the fingerprint does not match."""
    hasher = FingerprintHasher(_identity(kind, opened.config))
    try:
        # Tensors with adjacent names are in the same file, so each file is downloaded once.
        for file, stored in itertools.groupby(sorted(opened.tensors.items()), lambda item: item[1].pieces[0].url):
            with objects.local_copy(file) as local:
                for name, tensor in stored:
                    value = tensor.in_file(local).read()
                    hasher.add(name, value)
                    yield name, value
    except FileNotFoundError as error:
        raise DataError(f"{url}: {error}") from None
    if hasher.value() != opened.fingerprint:
        raise DataError(
            f"{url}: damaged: its content has fingerprint {hasher.value()}, expected {opened.fingerprint} as in its metadata"
        )


def _read_parts(url: str | Path) -> tuple[dict[str, str], dict[str, StoredTensor]] | None:
    """Metadata and stored tensors of weights in several files. None if there is no index."""
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
            raise DataError(f"{_beside(url, file)}: no such file, but {_index_url(url)} names it") from None
        tensors |= {name: tensor for name, tensor in found.items() if weight_map.get(name) == file}
    missing = weight_map.keys() - tensors.keys()
    if missing:
        raise DataError(f"{url}: its files lack {', '.join(sorted(missing)[:5])}, but the index names them")
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
    # Use only the name: an index must not refer to files outside its folder.
    folder, slash, _ = str(url).rpartition("/")
    return f"{folder}{slash}{_name(name)}"
