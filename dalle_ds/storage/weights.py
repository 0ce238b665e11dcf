"""Weights files: safetensors with config and fingerprint, in one file or, above a size limit, in several files.

    model.safetensors                     a single file, with config and fingerprint in its metadata
    model-00001-of-00003.safetensors ...  several files, and
    model.safetensors.index.json          their index (tensor name -> file, in Hugging Face's layout) with the same metadata

Both layouts are read one tensor at a time, and written in parts of tensors.
"""

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
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
from dalle_ds.storage.text import parse_json

Kind = Literal["dvae", "prior"]
PutPart = Callable[[str, int, Tensor], object]
"""Called with the name of a tensor, a flat index, and contiguous values from there on."""


@dataclass(frozen=True)
class Weights:
    """The content of a weights file. `fingerprint` is verified."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    fingerprint: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredWeights:
    """Weights whose tensors are still in their files. `fingerprint` comes from the metadata and is not verified."""

    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    fingerprint: str
    extra: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_weights(
    url: str | Path,
    *,
    kind: Kind,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    extra: Mapping[str, str] | None = None,
    max_file_bytes: int | None = None,
) -> str:
    """Write weights and return their fingerprint. See `pour_weights`."""

    def pour(put: PutPart) -> None:
        for name, tensor in state.items():
            put(name, 0, tensor.detach().cpu().contiguous())

    return pour_weights(url, kind=kind, config=config, tensors=state, pour=pour, extra=extra, max_file_bytes=max_file_bytes)


def pour_weights(
    url: str | Path,
    *,
    kind: Kind,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    pour: Callable[[PutPart], object],
    extra: Mapping[str, str] | None = None,
    max_file_bytes: int | None = None,
    hashed: Callable[[int], object] = lambda n: None,
) -> str:
    """Write weights whose values come in any order, and return their fingerprint.

    Each file is written atomically, after `pour`. Files for s3:// are first written below TMPDIR.

    Args:
        url: URL of the single file. Several files are named after it.
        config: the model's config, part of the fingerprint.
        tensors: only their dtypes and shapes are used.
        pour: called with what writes values of a tensor, from a flat index on; it may be used from several threads. Must write
            all values. If it raises, no file is written.
        extra: additional metadata, not part of the fingerprint.
        max_file_bytes: maximum size of the tensors in one file; larger weights are written to several files. None: one file.
        hashed: called with the bytes of each tensor after `pour`, when the tensor was read again for the fingerprint.

    Raises:
        DataError: the disk is too small.
    """
    parts = in_buckets(sorted(tensors), lambda name: tensors[name].nbytes, max_file_bytes or math.inf)
    before, is_single = _files_of_index(url), len(parts) == 1
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    objects.check_disk_space(tempfile.gettempdir() if objects.is_s3(url) else url, n_bytes, "the weights")
    # The fingerprint covers the tensors in name order. The header of a single file first has a placeholder of the same length.
    hasher = FingerprintHasher(_identity(kind, config))
    metadata = {
        "format": "pt",
        "kind": kind,
        "config": canonical_json(config),
        "fingerprint": "0" * LENGTH,
        "extra": canonical_json(dict(extra or {})),
    }
    files = [str(url)] if is_single else [_part_url(url, number, len(parts)) for number in range(1, len(parts) + 1)]
    with ExitStack() as stack:
        writers: dict[str, SafetensorsWriter] = {}
        for file, names in zip(files, parts, strict=True):
            path = stack.enter_context(objects.atomic_object(file))
            about = metadata if is_single else {"format": "pt", "kind": kind}
            writer = stack.enter_context(SafetensorsWriter(path, {name: tensors[name] for name in names}, about))
            writers |= dict.fromkeys(names, writer)
        pour(lambda name, at, values: writers[name].put(name, values, at))
        for name, writer in writers.items():
            hasher.add(name, writer.read(name))
            hashed(tensors[name].nbytes)
        metadata["fingerprint"] = hasher.value()
        if is_single:
            writer.replace_metadata(metadata)
    if is_single:
        objects.delete(_index_url(url))
    else:
        index = {
            "metadata": {"total_size": n_bytes, **metadata},
            "weight_map": {name: _name(file) for file, names in zip(files, parts, strict=True) for name in names},
        }
        objects.write_bytes(_index_url(url), json.dumps(index, indent=1).encode())
        objects.delete(url)
    for stale in set(before) - set(files):  # files of a previous model
        objects.delete(stale)
    return hasher.value()


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
    config, extra = (_mapping(url, metadata.get(name, "{}"), name) for name in ("config", "extra"))
    return StoredWeights(config, tensors, metadata["fingerprint"], extra)


def _mapping(url: str | Path, text: str, name: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise DataError(f"{url}: the {name} in its metadata is damaged: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{url}: the {name} in its metadata is a {type(found).__name__}, expected a mapping")
    return found


def number_of(extra: Mapping[str, Any], name: str, url: str | Path) -> float | None:
    """A number in the additional metadata of weights, None if it is not there. Nothing verifies this metadata.

    Raises:
        DataError: it is not a finite number.
    """
    text = extra.get(name)
    try:
        number = None if text is None else float(text)
    except (TypeError, ValueError):
        number = math.nan
    if number is not None and not math.isfinite(number):
        raise DataError(f"{url}: {name} in its metadata is {str(text)[:80]!r}, expected a number")
    return number


def read_weights(
    url: str | Path,
    kind: Kind,
    device: str | torch.device = "cpu",
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
) -> Weights:
    """Read weights, moving each tensor directly to `device`, and verify the fingerprint.

    Args:
        dtype_of: returns the dtype that a tensor is rounded to after its bytes are verified, by its name. None: as stored.

    Raises:
        DataError: the file does not exist, is not a weights file, is damaged, or has another kind.
    """
    opened = open_weights(url, kind)
    state = {name: tensor.to(device, dtype_of(name)) for name, tensor in _checked(url, kind, opened)}
    return Weights(opened.config, state, opened.fingerprint, opened.extra)


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
        for file, stored in itertools.groupby(sorted(opened.tensors.items()), lambda item: item[1].url):
            with objects.local_copy(file) as local:
                for name, tensor in stored:
                    value = tensor.in_file(local).read()
                    if value.is_floating_point() and not torch.isfinite(value).all():
                        raise DataError(f"{url}: {name} has NaN or Inf: the weights are of a run that has diverged, or damaged")
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
        index = parse_json(objects.read_bytes(_index_url(url)))
        metadata, weight_map = index["metadata"], index["weight_map"]
        texts = [metadata.get(name, "") for name in ("kind", "config", "fingerprint", "extra")]
        if not all(isinstance(text, str) for text in (*texts, *weight_map.values())):
            raise ValueError("expected texts in metadata and weight_map")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
        index = parse_json(objects.read_bytes(_index_url(url)))
        return [_beside(url, file) for file in set(index["weight_map"].values())]
    return []


def _name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _beside(url: str | Path, name: str) -> str:
    # Use only the name: an index must not refer to files outside its folder.
    folder, slash, _ = str(url).rpartition("/")
    return f"{folder}{slash}{_name(name)}"
