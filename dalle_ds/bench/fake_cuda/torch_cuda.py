"""Stand-ins for `torch.cuda` while its one device is fake: the device is available, streams are empty, waits are counted."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

NAME, CAPABILITY, MEMORY = "fake CUDA", (9, 0), 80 * 2**30
"""Properties of a GPU that supports every option of this project."""


class Stream:
    """A stream whose work is complete as soon as it is launched, in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _host_waits("stream.synchronize")


class Event:
    """An event. The elapsed time between two events is always 0."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 0.0

    def synchronize(self) -> None:
        _host_waits("event.synchronize")


class CUDAGraph:
    """Captures nothing. The stand-in for `torch.cuda.graph` runs the step once, and raises if the host waits meanwhile."""

    def replay(self) -> None:
        pass


_STREAM = Stream()
_DO_NOTHING = (
    "set_device",
    "_lazy_init",
    "manual_seed",
    "manual_seed_all",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
)
_GIVE_BYTES = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "memory_cached",
    "max_memory_cached",
)
_waiting: list[Callable[[str], None]] = []


def _host_waits(what: str) -> None:
    _waiting[-1](what)


@contextmanager
def one_fake_device(
    host_waits: Callable[[str], None], recording: Callable[[], AbstractContextManager[None]], live_bytes: Callable[[], int]
) -> Iterator[None]:
    """Replace functions of `torch.cuda` by stand-ins for the duration of the context.

    Args:
        host_waits: called with the function's name whenever the host would wait for the device.
        recording: returns the context in which a CUDA graph is captured.
        live_bytes: returns the number of allocated bytes.
    """
    major, minor = CAPABILITY
    properties = SimpleNamespace(name=NAME, major=major, minor=minor, total_memory=MEMORY, multi_processor_count=132)
    stand_ins: dict[str, Any] = {
        "is_available": _giving(True),
        "is_initialized": _giving(True),
        "is_bf16_supported": _giving(True),
        "device_count": _giving(1),
        "current_device": _giving(0),
        "get_device_name": _giving(NAME),
        "get_device_capability": _giving(CAPABILITY),
        "get_device_properties": _giving(properties),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": lambda *_, **__: recording(),
        "current_stream": _giving(_STREAM),
        "default_stream": _giving(_STREAM),
        "stream": lambda *_: nullcontext(),
        "is_current_stream_capturing": _giving(False),
        "memory_stats": _giving({}),
        "mem_get_info": lambda *_: (MEMORY - live_bytes(), MEMORY),
        "synchronize": lambda *_: host_waits("synchronize"),
        "empty_cache": lambda: host_waits("empty_cache"),
    }
    # one function object per name: torch's compiler, which DeepSpeed imports, rejects a function that has two names
    stand_ins |= {name: _giving(None) for name in _DO_NOTHING} | {name: lambda *_: live_bytes() for name in _GIVE_BYTES}
    with ExitStack() as stack:
        _waiting.append(host_waits)
        stack.callback(_waiting.pop)
        for name, stand_in in stand_ins.items():
            stack.enter_context(replaced(torch.cuda, name, stand_in))
        for name in ("range_push", "range_pop", "mark"):
            stack.enter_context(replaced(torch.cuda.nvtx, name, _giving(0)))
        stack.enter_context(replaced(torch.Tensor, "record_stream", _giving(None)))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the duration of the context, then restore it."""
    missing = object()
    before = getattr(owner, name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _giving(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
