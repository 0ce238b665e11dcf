"""Counts of work: collectives, operators, function calls and live objects. Other load on the machine doesn't change them."""

import gc
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Traffic:
    """Collectives of one kind: number of calls, and bytes of the whole tensors that the group gathers or reduces."""

    calls: int = 0
    bytes: int = 0


_COLLECTIVES = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "barrier": "barrier",
}
"""Usual names of torch's c10d operators. An operator that is missing here counts under its own name."""


class Sent(TorchDispatchMode):
    """While active, counts `traffic` by (collective, dtype, group size), and `dispatches` of torch operators by name.

    Operators inside a collective of the fake group aren't counted: a real collective has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[tuple[str, str, int], Traffic] = defaultdict(Traffic)
        self.dispatches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "c10d":
            self.dispatches[name] += 1
        else:
            # in a gather or a scatter, the larger side is the whole tensor
            sides = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args]
            whole = max(sides, key=_nbytes)
            group = next(
                dist.ProcessGroup.unbox(arg)
                for arg in args
                if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            )
            dtype = str(whole[0].dtype).removeprefix("torch.") if whole else ""
            entry = self.traffic[_COLLECTIVES.get(name, name), dtype, group.size()]
            entry.calls, entry.bytes = entry.calls + 1, entry.bytes + _nbytes(whole)
        return func(*args, **(kwargs or {}))


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def python_calls(work: Callable[[], object]) -> int:
    """Returns how many functions `work` calls, Python and C functions: a measure of host time that other load can't change."""
    n = 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal n
        n += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return n


@dataclass(frozen=True)
class Alive:
    """Memory that this process holds: Python objects by type; entries of all lists, dictionaries, sets and deques; bytes of all
    storages behind Python tensors. Entries are counted because a growing list creates no new object."""

    objects: Counter[str]
    entries: int
    tensor_bytes: int

    def grown_since(self, before: "Alive") -> dict[str, int]:
        """Returns the types whose number of objects has grown, with the increase."""
        return dict(self.objects - before.objects)


def alive() -> Alive:
    """Returns the live objects after a garbage collection."""
    gc.collect()
    things = gc.get_objects()
    tensors = [thing for thing in things if isinstance(thing, Tensor) and thing.layout is torch.strided]
    # read storages before objects are counted: the first access creates a storage's Python object
    storages = {storage._cdata: storage.nbytes() for storage in map(Tensor.untyped_storage, tensors)}
    objects: Counter[str] = Counter()
    entries = 0
    for thing in gc.get_objects():
        kind = type(thing)
        objects[f"{kind.__module__}.{kind.__qualname__}"] += 1
        is_ours = thing is things or thing is tensors or kind is Counter  # Counters belong to earlier results
        if issubclass(kind, list | dict | set | deque) and not is_ours:
            entries += len(thing)
    return Alive(objects, entries, sum(storages.values()))
