"""The tensors of a checkpoint, as parts of flat parameters: written by any number of ranks, read by any other number.

One safetensors file a rank. Every tensor in it is a part of one flattened parameter: its weights, one entry of its optimizer
state, or its average. Where a part begins stands in the file's metadata, so that a reader takes just the stretch that it needs,
whatever the ZeRO stage and the number of ranks of the writer.
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
"""In a checkpoint: all that is not a tensor."""


@dataclass
class StateParts:
    """What one rank holds."""

    shapes: dict[str, torch.Size]
    """Of all parameters of the model, by name."""
    tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(kind, parameter) -> values, flat. Kinds: "weights", "average", "optimizer.KEY"."""
    starts: dict[tuple[str, str], int] = field(default_factory=dict)
    """(kind, parameter) -> where the values begin in the flat parameter."""
    steps: dict[str, float] = field(default_factory=dict)
    """Parameter -> the optimizer's count of steps."""

    def add(self, kind: str, name: str, start: int, values: Tensor) -> None:
        """Values behind the parameter's end (ZeRO pads its last shards) are left out, empty parts too."""
        values = values.detach().flatten()[: max(0, self.shapes[name].numel() - start)]
        if values.numel():
            self.tensors[kind, name], self.starts[kind, name] = values, start

    def copied(self) -> "StateParts":
        """The same in CPU memory of its own, which later updates do not change."""
        tensors = {at: values.to("cpu", copy=True) for at, values in self.tensors.items()}
        return StateParts(self.shapes, tensors, self.starts, self.steps)

    def write(self, folder: Path, rank: int, world_size: int) -> None:
        """Raises OSError where the file can't be written."""
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
    """A rank's part of a checkpoint: writing it needs no other rank."""

    parts: StateParts
    other_tensors: Mapping[str, dict[str, Tensor]]
    """File name -> what only this rank can use."""
    state: dict[str, Any] | None
    """What is not a tensor, from the main rank."""
    rank: int
    world_size: int

    def write(self, folder: Path) -> None:
        """Raises OSError where a file can't be written."""
        folder.mkdir(parents=True, exist_ok=True)
        self.parts.write(folder, self.rank, self.world_size)
        for name, tensors in self.other_tensors.items():
            save_file(tensors, folder / name)
        if self.state is not None:
            (folder / ENGINE_FILE).write_text(json.dumps(self.state, indent=1))


class SavedState:
    """Reads what `StateParts` of all ranks wrote into a folder; nothing is loaded before it is asked for."""

    def __init__(self, url: str | Path) -> None:
        """`url` of the folder. Raises DataError: files are missing or damaged, or leave out a part of a tensor."""
        self.url = str(url)
        self.shapes: dict[str, torch.Size] = {}
        """Of all parameters, by name."""
        self.steps: dict[str, float] = {}
        """The optimizer's count of steps, by parameter."""
        files = [file for file in objects.list_files(url, ".safetensors") if STATE_FILE.search(file)]
        expected = int(STATE_FILE.search(files[0])[1]) if files else 1  # type: ignore[index]
        if len(files) != expected:
            raise DataError(f"{url} holds {len(files)} state-*.safetensors, expected {expected}")
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
        """What is known of a parameter."""
        return [kind for kind, of in self._tensors if of == name]

    def of_kind(self, kind: str) -> dict[str, StoredTensor]:
        """Where whole parameters lie, by name."""
        return {name: tensor for (of, name), tensor in self._tensors.items() if of == kind}

    def dtype(self, kind: str, name: str) -> torch.dtype:
        return self._tensors[kind, name].dtype

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """The values from `start` to `stop` of a flat parameter, as far as it goes."""
        tensor = self._tensors[kind, name]
        stop = min(stop, tensor.shape.numel())
        n, size = max(0, stop - start), tensor.dtype.itemsize
        return StoredTensor(tensor.dtype, torch.Size([n]), cut(tensor.pieces, start * size, n * size) if n else ()).read()

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter in its own shape."""
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
