"""Where each whole parameter lies in a checkpoint of many ranks: nothing is loaded, no engine is started."""

import json
from pathlib import Path

import torch

from dalle_ds.data.stored_tensors import Piece, StoredTensor, cut, read_layout
from dalle_ds.errors import DataError
from dalle_ds.parallel.zero_checkpoint import zero_weights


def trained_weights(checkpoint: Path) -> dict[str, StoredTensor]:
    """Name -> fp32 parameter: the weights themselves, not their average. Raises DataError where files or parts are missing."""
    return _from_parts(checkpoint, "weights") or zero_weights(checkpoint)


def averaged_weights(checkpoint: Path, shapes: dict[str, torch.Size]) -> dict[str, StoredTensor]:
    """Name -> averaged parameter, of the whole `shapes`. Raises DataError where files or parts are missing."""
    return _from_parts(checkpoint, "average") or _from_shards(checkpoint, shapes)


def _from_parts(checkpoint: Path, kind: str) -> dict[str, StoredTensor]:
    """Of state-*.safetensors: stretches of flat parameters, named KIND/PARAMETER, that say where they begin."""
    parts: dict[str, list[tuple[int, StoredTensor]]] = {}
    shapes: dict[str, torch.Size] = {}
    for file in _files_of_ranks(checkpoint, "state"):
        metadata, tensors = read_layout(file)
        shapes |= {name: torch.Size(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        for key, start in json.loads(metadata["starts"]).items():
            of, name = key.split("/", 1)
            if of == kind:
                parts.setdefault(name, []).append((start, tensors[key]))
    if not parts:
        return {}
    places = {}
    for name, shape in shapes.items():
        end, pieces = 0, []
        for start, tensor in sorted(parts.get(name, ()), key=lambda part: part[0]):
            if start != end:
                break
            end += tensor.shape.numel()
            pieces.extend(tensor.pieces)
        if end != shape.numel():
            raise DataError(f"{checkpoint}: {kind} of {name} ends at {end}, expected {shape.numel()} values")
        places[name] = StoredTensor(parts[name][0][1].dtype, shape, tuple(pieces))
    return places


def _from_shards(checkpoint: Path, shapes: dict[str, torch.Size]) -> dict[str, StoredTensor]:
    """Of average-*.safetensors, which runs wrote before: in rank order the shards of ZeRO-3, the last ones padded so that all
    have one length; below stage 3 each is the whole."""
    files = _files_of_ranks(checkpoint, "average")
    if not files:
        raise DataError(f"{checkpoint} holds no averaged weights: neither in state-*.safetensors nor in average-*.safetensors")
    ranks = [read_layout(file)[1] for file in files]
    places = {}
    for name, shape in shapes.items():
        if any(name not in shards for shards in ranks):
            raise DataError(f"{checkpoint}: its averaged weights lack {name}")
        pieces: list[Piece] = [piece for shards in ranks for piece in shards[name].pieces]
        dtype = ranks[0][name].dtype
        try:
            places[name] = StoredTensor(dtype, shape, cut(pieces, 0, shape.numel() * dtype.itemsize))
        except ValueError as error:
            raise DataError(f"{checkpoint}: averaged {name} of shape {tuple(shape)}: {error}") from None
    return places


def _files_of_ranks(checkpoint: Path, stem: str) -> list[Path]:
    files = sorted(checkpoint.glob(f"{stem}-*-of-*.safetensors"))
    expected = int(files[0].stem.rsplit("-", 1)[1]) if files else 0
    if len(files) != expected:
        raise DataError(f"{checkpoint} holds {len(files)} {stem}-*.safetensors, expected {expected}")
    return files
