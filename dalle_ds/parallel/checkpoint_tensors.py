"""Tensor files of a checkpoint: parts of flat parameters, written by any number of ranks and read by any other number.

Each rank writes one safetensors file. Every tensor in it is a part of one flattened parameter: of its weights, of one entry of
its optimizer state, or of its EMA. The file's metadata holds the start of each part, so a reader reads only the range that it
needs, at any ZeRO stage and number of ranks of the writer.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.safetensors_writer import SafetensorsWriter
from dalle_ds.storage.stored_tensors import StoredTensor, cut, read_layout

STATE_FILE = re.compile(r"/state-\d+-of-(\d+)\.safetensors$")

WEIGHTS, AVERAGE, OPTIMIZER = "weights", "average", "optimizer"
ENGINE_FILE = "engine.json"
"""File of a checkpoint that holds everything except tensors."""


@dataclass
class StateParts:
    """The parts of parameters that one rank holds."""

    shapes: dict[str, torch.Size]
    """Shapes of all parameters of the model, by name."""
    tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """Flat values by (kind, parameter). Kinds are "weights", "average", "optimizer.KEY" and "error.REPLICA"."""
    starts: dict[tuple[str, str], int] = field(default_factory=dict)
    """Index in the flat parameter at which the values begin, by (kind, parameter)."""
    steps: dict[str, float] = field(default_factory=dict)
    """The optimizer's step count, by parameter."""

    def add(self, kind: str, name: str, start: int, values: Tensor) -> None:
        """Add flat values that begin at index `start` of the parameter.
        ZeRO's padding beyond the parameter's end is dropped, and so are empty parts."""
        values = values.detach().flatten()[: max(0, self.shapes[name].numel() - start)]
        if values.numel():
            self.tensors[kind, name], self.starts[kind, name] = values, start

    def copied(self) -> "StateParts":
        """Copy the tensors to CPU memory, so that later updates do not change them."""
        tensors = {at: values.to("cpu", copy=True) for at, values in self.tensors.items()}
        return StateParts(self.shapes, tensors, self.starts, self.steps)

    def write(self, folder: Path, rank: int, world_size: int) -> None:
        """Write this rank's state file into `folder`. Raises OSError if the file can't be written."""
        metadata = {
            "shapes": json.dumps({name: list(shape) for name, shape in self.shapes.items()}),
            "starts": json.dumps({_key(*at): start for at, start in self.starts.items()}),
            "steps": json.dumps(self.steps),
        }
        file = folder / f"state-{rank:05d}-of-{world_size:05d}.safetensors"
        with SafetensorsWriter(file, {_key(*at): values for at, values in self.tensors.items()}, metadata) as writer:
            for at, values in self.tensors.items():
                writer.put(_key(*at), values.contiguous().cpu())


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint. It can be written without communication between ranks."""

    parts: StateParts
    other_tensors: Mapping[str, dict[str, Tensor]]
    """Tensors that only this rank can use, by file name."""
    state: dict[str, Any] | None
    """Everything except tensors, on the main rank. None on the other ranks."""
    rank: int
    world_size: int

    def write(self, folder: Path) -> None:
        """Write this rank's files into `folder`. Raises OSError if a file can't be written."""
        folder.mkdir(parents=True, exist_ok=True)
        self.parts.write(folder, self.rank, self.world_size)
        for name, tensors in self.other_tensors.items():
            save_file(tensors, folder / name)
        if self.state is not None:
            (folder / ENGINE_FILE).write_text(json.dumps(self.state, indent=1))


class SavedState:
    """Reader of the state files that all ranks wrote into a folder. Values are read lazily."""

    def __init__(self, url: str | Path) -> None:
        """Read the metadata of all state files in the folder `url`.

        Raises:
            DataError: files are missing or damaged, or do not cover a parameter completely.
        """
        self.url = str(url)
        self.shapes: dict[str, torch.Size] = {}
        """Shapes of all parameters, by name."""
        self.steps: dict[str, float] = {}
        """The optimizer's step count, by parameter."""
        files = [file for file in objects.list_files(url, ".safetensors") if STATE_FILE.search(file)]
        expected = int(STATE_FILE.search(files[0])[1]) if files else 1  # type: ignore[index]
        if len(files) != expected:
            raise DataError(f"{url} holds {len(files)} state-*.safetensors files, expected {expected}")
        parts: dict[tuple[str, str], list[tuple[int, StoredTensor]]] = {}
        for file in files:
            metadata, tensors = read_layout(file)
            self.shapes |= {name: torch.Size(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            self.steps |= json.loads(metadata["steps"])
            for key, start in json.loads(metadata["starts"]).items():
                kind, name = key.split("/", 1)
                parts.setdefault((kind, name), []).append((start, tensors[key]))
        self._tensors = {at: self._joined(*at, found) for at, found in parts.items()}

    def kinds(self, name: str) -> list[str]:
        """Kinds of the values that are saved for a parameter."""
        return [kind for kind, of in self._tensors if of == name]

    def of_kind(self, kind: str) -> dict[str, StoredTensor]:
        """All whole parameters of this kind, by name. Their values are not read yet."""
        return {name: tensor for (of, name), tensor in self._tensors.items() if of == kind}

    def dtype(self, kind: str, name: str) -> torch.dtype:
        return self._tensors[kind, name].dtype

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Read the values from `start` to `stop` of a flat parameter. `stop` may lie beyond the parameter's end."""
        tensor = self._tensors[kind, name]
        stop = min(stop, tensor.shape.numel())
        n, size = max(0, stop - start), tensor.dtype.itemsize
        return StoredTensor(tensor.dtype, torch.Size([n]), cut(tensor.pieces, start * size, n * size) if n else ()).read()

    def whole(self, kind: str, name: str) -> Tensor:
        """Read a whole parameter, in its shape."""
        return self._tensors[kind, name].read()

    def _joined(self, kind: str, name: str, parts: list[tuple[int, StoredTensor]]) -> StoredTensor:
        end, pieces, shape = 0, [], self.shapes[name]
        for start, part in sorted(parts, key=lambda part: part[0]):
            if start != end:
                break
            end += part.shape.numel()
            pieces.extend(part.pieces)
        if end != shape.numel():
            raise DataError(f"{self.url}: {kind} of {name} ends at {end}, expected {shape.numel()} values")
        return StoredTensor(parts[0][1].dtype, shape, tuple(pieces))


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"
