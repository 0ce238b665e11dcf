"""Reader of a checkpoint's tensor files: each rank opens only the files that hold its ranges, and reads each of them once.

Any number of ranks, at any ZeRO stage, may have written the files. The layout in engine.json says which files hold a range.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from dalle_ds.errors import Damaged
from dalle_ds.parallel.checkpoint_layout import AVERAGE, WEIGHTS, Layout, family_of
from dalle_ds.parallel.checkpoint_tensors import ENGINE_FILE, STARTS, state_file
from dalle_ds.storage import objects
from dalle_ds.storage.record import OtherFormat
from dalle_ds.storage.stored_tensors import StoredTensor, Wanted, read_through
from dalle_ds.storage.verified_files import CommittedFile, pieces, verified_pieces

Ranges = Mapping[str, Mapping[str, tuple[int, int]]]
"""Start and end in the flat parameter, by name, by family of kinds, or for errors by kind."""
Put = Callable[[int, Tensor], object]
"""Called with the index in the flat parameter of the first of some values, and these values, flat. They are only valid during
the call."""
Take = Callable[[str, str, torch.dtype], Put]
"""Called with kind, parameter and dtype of stored values, before they are read."""

THREADS = 2
"""Files that a rank reads at the same time. On s3:// each takes up to 200 MB of memory."""
BEGIN_BYTES, FEW_VALUES = 2 << 20, 50_000
"""Of a file that holds at most this number of wanted values, the first bytes are read first: gains and biases may be all that
is wanted, and at 1,024 ranks and 12 billion parameters the header and all of them take 0.7 MB."""


@dataclass(frozen=True)
class SavedState:
    """A checkpoint whose engine.json was read, and whose tensors were not."""

    url: str
    state: Mapping[str, Any]
    """Content of engine.json."""
    layout: Layout
    shapes: Mapping[str, torch.Size]
    """Shapes of all parameters, by name."""
    files: Mapping[str, CommittedFile] | None
    """What the commit says of the files in the folder `url`, by name. None if they were not committed: then they are not
    verified."""

    @property
    def steps(self) -> Mapping[str, float]:
        """The optimizer's step count, by parameter."""
        return self.state["steps"]

    def files_with(self, ranges: Ranges) -> dict[str, int]:
        """Names of the files that hold any value of these ranges, with the number of these values."""
        return {state_file(rank, self.state["world_size"]): n for rank, n in self.layout.writers(ranges).items()}

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Read all parameters of one kind, in their shapes. Raises Damaged like `pour`."""
        found: dict[str, Tensor] = {}

        def take(of: str, name: str, dtype: torch.dtype) -> Put | None:
            if of != kind:
                return None
            flat = found.setdefault(name, torch.empty(self.shapes[name], dtype=dtype)).view(-1)
            return lambda at, values: flat[at : at + len(values)].copy_(values)

        everything = {name: (0, shape.numel()) for name, shape in self.shapes.items()}
        self.pour({kind if kind in self.layout.errors else family_of(kind): everything}, take)
        return found

    def pour(
        self,
        ranges: Ranges,
        take: Callable[[str, str, torch.dtype], Put | None],
        threads: int = THREADS,
        read: Callable[[int], object] = lambda n_bytes: None,
    ) -> list[str]:
        """Read the files that hold `ranges`, each once, and hand out the values in these ranges as they arrive.

        Values are handed out before their file is verified. Returns the names of the files that were read to their end, and so
        were verified.

        Args:
            take: called for each part of a parameter that a file holds. Returns what gets its values, or None.
                Never called by two threads at a time, but `Put` is.
            threads: number of files to read at the same time.
            read: called with the size of each file after it was read.

        Raises:
            Damaged: a file is missing or has changed, or the files do not hold all values of the ranges.
            DataError: storage was unreachable for DALLE_DS_RETRY_SECONDS.
        """
        n_values = self.files_with(ranges)
        found: Counter[tuple[str, str]] = Counter()
        lock = Lock()

        def read_one(name: str) -> tuple[str, int, bool]:
            def wanted(metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> Iterator[Wanted]:
                parts = _parts(metadata, tensors, name)
                with lock:
                    for kind, parameter, start, tensor in parts:
                        of_kind = ranges.get(kind) or ranges.get(family_of(kind)) or {}
                        begin, end = of_kind.get(parameter, (0, 0))
                        first, last = max(begin, start), min(end, start + tensor.shape.numel())
                        put = take(kind, parameter, tensor.dtype) if first < last else None
                        if put is not None:
                            found[kind, parameter] += last - first
                            offset = tensor.offset + (first - start) * tensor.dtype.itemsize
                            yield Wanted(offset, last - first, tensor.dtype, _shifted(put, first))

            return name, *self._read_through(name, wanted, n_values[name] <= FEW_VALUES)

        verified = []
        with ThreadPoolExecutor(threads, "state files") as pool:
            for name, n_bytes, is_whole in pool.map(read_one, n_values) if len(n_values) > 1 else map(read_one, n_values):
                verified += [name] if is_whole else []
                read(n_bytes)
        self._require_all(ranges, found)
        return verified

    def _read_through(self, name: str, wanted: Callable[..., Iterator[Wanted]], may_stop: bool) -> tuple[int, bool]:
        """Read one file and verify it. Returns its size, and whether it was read to its end: it may be enough not to."""
        url = objects.join(self.url, name)
        try:
            if self.files is None:
                size = objects.size(url)
            elif name in self.files:
                size = self.files[name].bytes
            else:
                raise Damaged(f"{url} is not among the files of the commit")
            may_stop = may_stop and size > BEGIN_BYTES
            first = BEGIN_BYTES if may_stop else 0
            content = pieces(url, size, first) if self.files is None else verified_pieces(url, self.files[name], first)
            return size, read_through(url, size, content, wanted, to_end=not may_stop)
        except FileNotFoundError:
            raise Damaged(f"{url} is missing") from None

    def _require_all(self, ranges: Ranges, found: Mapping[tuple[str, str], int]) -> None:
        needed = [
            (kind, name) for kind in (WEIGHTS, AVERAGE) for name, (start, end) in ranges.get(kind, {}).items() if start < end
        ]
        for kind, name in {*found, *needed}:
            start, end = (ranges.get(kind) or ranges[family_of(kind)])[name]
            n = found.get((kind, name), 0)
            if n != end - start:
                raise Damaged(f"{self.url}: its files hold {n} values of {kind} of {name}, expected {end - start}")


def open_state(url: str | Path, files: Mapping[str, CommittedFile] | None = None) -> SavedState:
    """Read the engine.json of a checkpoint: one request.

    Raises:
        Damaged: it is missing, or makes no sense.
        OtherFormat: it is of an earlier version.
    """
    at = objects.join(url, ENGINE_FILE)
    try:
        state = json.loads(objects.read_bytes(at))
        if "layout" not in state:
            raise OtherFormat(
                f"{at} was written by an earlier version of dalle_ds, without the layout of the state files: go on with the "
                "version that wrote it, or start a new run in another folder"
            )
        shapes = {name: torch.Size(shape) for name, shape in state["shapes"].items()}
        return SavedState(str(url), state, Layout.model_validate(state["layout"]), shapes, files)
    except FileNotFoundError:
        raise Damaged(f"{at} is missing") from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise Damaged(f"{at} is not the state of an engine: {error!r}") from None


def _parts(
    metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor], file: str
) -> list[tuple[str, str, int, StoredTensor]]:
    """Kind, parameter, start and content of the tensors in a state file."""
    try:
        starts = json.loads(metadata[STARTS])
        return [(*key.split("/", 1), starts[key], tensor) for key, tensor in tensors.items()]  # type: ignore[misc]
    except (ValueError, LookupError, TypeError) as error:
        raise Damaged(f"{file} is not a state file: {error!r}") from None


def _shifted(put: Put, first: int) -> Put:
    return lambda at, values: put(first + at, values)
