"""Tensor files of a checkpoint: parts of flat parameters, as each rank writes them.

Each rank writes one safetensors file. Every tensor in it is a part of one flattened parameter: of its weights, of one entry of
its optimizer state, or of its EMA. The file's metadata holds the start of each part. Everything else is in engine.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_ds.storage.safetensors_writer import SafetensorsWriter

ENGINE_FILE = "engine.json"
"""File of a checkpoint that holds everything except tensors."""
STARTS = "starts"
"""Key of a state file's metadata: JSON of the index in the flat parameter at which each tensor begins."""


def state_file(rank: int, world_size: int) -> str:
    """Name of the state file of a rank."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


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
    """The optimizer's step count, by parameter. The main rank knows those of all parameters."""

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
        metadata = {STARTS: json.dumps({_key(*at): start for at, start in self.starts.items()})}
        file = folder / state_file(rank, world_size)
        # Small parts first: ranks that need only these, since other numbers of ranks round them to other sizes, read only the
        # beginning of the file.
        tensors = {_key(*at): values for at, values in self.tensors.items()}
        with SafetensorsWriter(file, tensors, metadata, small_first=True) as writer:
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


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"
