"""A stream sanitizer without a GPU: finds accesses to memory that are not ordered after earlier accesses on other streams.

DeepSpeed's CPU accelerator gets streams and events that only hold vector clocks. A dispatch mode inspects every torch operator.
An operator accesses storages on the current stream; a collective accesses them on the stream of its process group, as with
NCCL. An access must happen after the last write of the storage, and a write after all reads since then. When a storage is
freed, the accesses of other streams must have happened before on the allocating stream, whose next allocation may reuse the
memory; with `record_stream` the allocator waits for them.

The sanitizer sees torch calls from Python. It does not see streams inside C++ and kernels, copies from pinned memory,
offloading, and host reads other than `item`, `tolist` and `cpu`. Accesses to different parts of one storage count as accesses
to the same.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

TORCH = str(Path(torch.__file__).parent)

Clock = dict[str, int]
"""Number of operations that have happened, by stream."""


def join(clock: Clock, other: Clock) -> None:
    for stream, n in other.items():
        clock[stream] = max(n, clock.get(stream, 0))


HOST: Clock = {}
"""Operations that the host has waited for. Everything that it launches from now on comes after them."""

WAITS: Counter[tuple[str, str]] = Counter()
"""Number of waits by (method, calling function)."""

without: set[tuple[str, str]] = set()
"""Keys of `WAITS` whose waits are removed, to test whether the sanitizer notices."""

WRAPPERS = ("/contextlib.py", "/deepspeed/utils/nvtx.py", "/deepspeed/comm/comm.py", "/deepspeed/comm/torch.py")


def _is_wrapper(frame: FrameType) -> bool:
    """Whether a frame only wraps the call of interest: it belongs to torch, to DeepSpeed's wrappers or to this file."""
    name = frame.f_code.co_filename
    return name == __file__ or name.startswith(TORCH) or name.endswith(WRAPPERS)


def _is_left_out(method: str) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_wrapper(frame):
        frame = frame.f_back
    assert frame is not None
    key = method, frame.f_code.co_name
    WAITS[key] += 1
    return key in without


class Stream:
    """Stand-in for `torch.cuda.Stream`."""

    n_made = 0

    def __init__(self, name: str | None = None, **_: Any) -> None:
        self.name = name or f"stream {Stream.n_made}"
        Stream.n_made += name is None
        self.clock: Clock = {}
        STREAMS.append(self)

    def wait_stream(self, other: "Stream") -> None:
        if not _is_left_out("wait_stream"):
            join(self.clock, other.clock)

    def wait_event(self, event: "Event") -> None:
        if not _is_left_out("wait_event"):
            join(self.clock, event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        if not _is_left_out("synchronize"):
            join(HOST, self.clock)

    def query(self) -> bool:
        return False


STREAMS: list[Stream] = []
DEFAULT = Stream("default")
_current = [DEFAULT]


def current(*_: Any) -> Stream:
    return _current[-1]


@contextlib.contextmanager
def on(stream: Stream | None) -> Iterator[None]:
    _current.append(stream or current())
    try:
        yield
    finally:
        _current.pop()


class Event:
    """Stand-in for `torch.cuda.Event`. `query` always returns False, since an order must not depend on the device's speed."""

    def __init__(self, **_: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or current()).clock)

    def wait(self, stream: Stream | None = None) -> None:
        if not _is_left_out("wait"):
            join((stream or current()).clock, self.clock)

    def synchronize(self) -> None:
        if not _is_left_out("synchronize"):
            join(HOST, self.clock)

    def query(self) -> bool:
        return False

    def elapsed_time(self, _: "Event") -> float:
        return 0.0


def synchronize(*_: Any) -> None:
    if not _is_left_out("synchronize"):
        for stream in STREAMS:
            join(HOST, stream.clock)


class Access(NamedTuple):
    stream: Stream
    tick: int
    operation: str
    where: str

    def is_before(self, clock: Clock) -> bool:
        return clock.get(self.stream.name, 0) >= self.tick

    def __str__(self) -> str:
        return f"{self.operation} on {self.stream.name} at {self.where}"


@dataclass
class Memory:
    """Accesses of one storage."""

    allocated_on: Stream | None
    """None if the storage was allocated before the sanitizer was active."""
    writer: Access | None = None
    readers: dict[str, Access] = field(default_factory=dict)
    """Last read of each stream since the last write."""
    users: dict[str, Access] = field(default_factory=dict)
    """Last access of each stream."""
    recorded: list[Stream] = field(default_factory=list)


class Work:
    """Work of an asynchronous collective. Like NCCL's, it holds its tensors until `wait`."""

    def __init__(self, work: Any, clock: Clock, tensors: list[Tensor]) -> None:
        self._work, self._clock, self._tensors = work, clock, tensors

    def wait(self, *args: Any) -> bool:
        if not _is_left_out("wait"):
            join(current().clock, self._clock)
        self._tensors = []
        return self._work.wait(*args)


WITHOUT_MEMORY = {"aten::record_stream", "aten::set_", "aten::is_pinned"}
FACTORIES = ("aten::empty", "aten::new_empty")
"""Operators that allocate memory without writing it."""


class StreamSanitizer(TorchDispatchMode):
    """While active, counts `races`, each described by both accesses, and `n`, the number of operators checked."""

    def __init__(self) -> None:
        super().__init__()
        self.races: Counter[str] = Counter()
        self.n = 0
        self._memories: dict[int, Memory] = {}
        self._of_groups: dict[str, Stream] = {}
        self._on_host: set[int] = set()
        self._last_work: tuple[Clock, list[Tensor]] = {}, []

    def __enter__(self) -> "StreamSanitizer":
        global _active
        _active = self
        return super().__enter__()

    # ---- operators --------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        before = {id_of(tensor) for tensor in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        if schema.name in WITHOUT_MEMORY:
            return out
        new = [tensor for tensor in _tensors(out) if id_of(tensor) not in before]
        for tensor in new:
            self._memory(tensor, allocated_on=current())
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        if schema.name.startswith("c10d::"):
            self._collective(schema, given)
            return out
        written = [
            t
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in _tensors(given.get(argument.name))
        ]
        is_view = not written and _tensors(out) and not new
        if is_view or schema.name.startswith(FACTORIES):
            return out
        read = _tensors((args, kwargs))
        if schema.name == "aten::lift_fresh" or (read and all(id_of(t) in self._on_host for t in read)):
            self._on_host |= {id_of(tensor) for tensor in [*written, *new]}
            return out
        self._on_host -= {id_of(tensor) for tensor in written}
        self._operate(current(), schema.name.partition("::")[2], read, [*written, *new])
        if schema.name == "aten::_local_scalar_dense":
            self.host_waits(read[0])
        return out

    def _collective(self, schema: Any, given: dict[str, Any]) -> None:
        arguments = [_tensors(given.get(argument.name)) for argument in schema.arguments]
        written = arguments[0] if schema.name != "c10d::barrier" else []
        group = dist.ProcessGroup.unbox(given["process_group"])
        stream = self._of_groups.get(group.group_name)
        if stream is None:
            stream = self._of_groups[group.group_name] = Stream(f"NCCL {len(self._of_groups)} ({group.size()} ranks)")
        join(stream.clock, current().clock)
        self._on_host -= {id_of(tensor) for tensor in written}
        self._operate(stream, schema.name.partition("::")[2], _tensors(given), written)
        self._last_work = dict(stream.clock), _tensors(given)
        if not given.get("async_op", True):
            join(current().clock, stream.clock)

    def _operate(self, stream: Stream, operation: str, read: list[Tensor], written: list[Tensor]) -> None:
        join(stream.clock, HOST)
        stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        access = Access(stream, stream.clock[stream.name], operation, calling_lines())
        self.n += 1
        memories = {id_of(t): self._memory(t) for t in read if t.numel() and id_of(t) not in self._on_host}
        targets = {id_of(t): self._memory(t) for t in written if t.numel()}
        for memory in [*memories.values(), *targets.values()]:
            self._check(access, "touches", memory.writer, "wrote")
        for memory in targets.values():
            for reader in memory.readers.values():
                self._check(access, "writes", reader, "reads")
        for memory in memories.values():
            memory.readers[stream.name] = memory.users[stream.name] = access
        for memory in targets.values():
            memory.writer, memory.readers, memory.users[stream.name] = access, {}, access

    def _check(self, access: Access, verb: str, earlier: Access | None, earlier_verb: str) -> None:
        if earlier is not None and not earlier.is_before(access.stream.clock):
            self.races[f"{access} {verb} what {earlier} {earlier_verb}"] += 1

    # ---- memory -----------------------------------------------------------------------------------------------------------

    def _memory(self, tensor: Tensor, allocated_on: Stream | None = None) -> Memory:
        key = id_of(tensor)
        memory = self._memories.get(key)
        if memory is None:
            memory = self._memories[key] = Memory(allocated_on)
            weakref.finalize(tensor.untyped_storage(), self._freed, key).atexit = False
        return memory

    def _freed(self, key: int) -> None:
        memory = self._memories.pop(key)
        self._on_host.discard(key)
        owner = memory.allocated_on
        if owner is None:
            return
        clock = dict(HOST)
        for stream in (owner, *memory.recorded):  # the allocator waits for all work launched on these streams so far
            join(clock, stream.clock)
        for access in memory.users.values():
            if access.stream is not owner and not access.is_before(clock):
                self.races[f"freed for {owner.name} at {calling_lines()}, used by {access}"] += 1

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        if not _is_left_out("record_stream"):
            self._memory(tensor).recorded.append(stream)

    # ---- the host ---------------------------------------------------------------------------------------------------------

    def on_host(self, tensors: Iterable[Tensor]) -> None:
        """Mark tensors as host tensors. Tensors computed only from host tensors are on the host too."""
        for tensor in tensors:
            self._memory(tensor)
            self._on_host.add(id_of(tensor))

    def host_waits(self, tensor: Tensor) -> None:
        """The host reads values, and so waits for all earlier work on the current stream."""
        if id_of(tensor) not in self._on_host and not _is_left_out("read"):
            join(HOST, current().clock)

    def work(self, work: Any) -> Work | None:
        return work if work is None or isinstance(work, Work) else Work(work, *self._last_work)


_active = StreamSanitizer()
"""The sanitizer that was activated last."""


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def calling_lines(n: int = 3) -> str:
    """Returns the innermost `n` running lines of this project and of DeepSpeed."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < n:
        name = frame.f_code.co_filename
        for package in ("/dalle_ds/", "/deepspeed/"):
            if package in name and not _is_wrapper(frame):
                found.append(f"{package[1:]}{name.rpartition(package)[2]}:{frame.f_lineno} ({frame.f_code.co_name})")
        frame = frame.f_back
    return " < ".join(found)


ASYNCHRONOUS = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


def install() -> None:
    """Give DeepSpeed streams, permanently. Call after joining the process group, before building the engine."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm import comm

    accelerator = get_accelerator()
    assert accelerator.device_name() == "cpu"
    if accelerator.current_stream is current:
        return
    for name in ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"):
        setattr(accelerator, name, lambda: False)  # as on CUDA
    type(accelerator).Stream, type(accelerator).Event = Stream, Event
    accelerator.stream, accelerator.current_stream, accelerator.synchronize = on, current, synchronize
    accelerator.default_stream = lambda *_: DEFAULT

    to_list, append = torch.Tensor.tolist, dist.distributed_c10d._CoalescingManager.append

    def tolist(tensor: Tensor) -> Any:
        _active.host_waits(tensor)
        return to_list(tensor)

    def to_cpu(tensor: Tensor, *_: Any) -> Tensor:
        _active.host_waits(tensor)
        with _disable_current_modes():
            copy = tensor.detach().clone()
        _active.on_host([copy])
        return copy

    torch.Tensor.tolist, torch.Tensor.cpu = tolist, to_cpu
    torch.Tensor.record_stream = lambda tensor, stream: _active.record_stream(tensor, stream)
    dist.distributed_c10d._CoalescingManager.append = lambda self, work=None: append(self, _active.work(work))

    def watched(collective: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: _active.work(collective(*args, **kwargs))

    # only in the package `torch.distributed`: its module distributed_c10d compares its functions by identity
    for name in ASYNCHRONOUS:
        if hasattr(dist, name):
            setattr(dist, name, watched(getattr(dist, name)))
    comm.cdb.all_gather_function, comm.cdb.reduce_scatter_function = dist.all_gather_into_tensor, dist.reduce_scatter_tensor
