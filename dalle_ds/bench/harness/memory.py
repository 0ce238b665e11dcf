"""Peak memory of a piece of work, above the memory that is allocated before it starts."""

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

P = ParamSpec("P")
R = TypeVar("R")


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call an importable function in a new interpreter, where the allocator holds no memory of earlier work."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Run `work` once. Returns its peak: allocated bytes on a GPU; on a CPU resident bytes, sampled every millisecond."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    process, done, highest = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(highest, process.memory_info().rss) - before


@dataclass
class PeakMemory(TorchDispatchMode):
    """While active, records the peak of live bytes allocated since activation, and the lines of code that allocated them.

    Counts the storages that torch's operators return. Workspaces inside kernels and the allocator's rounding aren't counted. On
    a CPU, fp16 matrix products use fp32 copies (`ops/fp16.py`), which a GPU doesn't have; `by_line` lists these separately.
    """

    peak_bytes: int = 0
    by_line: Counter[str] = field(default_factory=Counter)
    """Bytes at the peak by the innermost line of this project or of DeepSpeed."""

    def __post_init__(self) -> None:
        super().__init__()
        self._held: Counter[str] = Counter()
        self._known: dict[int, weakref.ref[Any]] = {}
        self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, n, line = storage._cdata, storage.nbytes(), calling_line()
        known = self._known.get(key)
        if known is not None and known() is storage:
            return

        def forget(_: Any) -> None:
            self._held[line] -= n
            self._now -= n
            if self._known.get(key) is reference:
                del self._known[key]

        reference = self._known[key] = weakref.ref(storage, forget)
        self._held[line] += n
        self._now += n
        if self._now > self.peak_bytes:
            self.peak_bytes, self.by_line = self._now, +self._held


def calling_line() -> str:
    """Returns the innermost running line of this project outside of `bench`, or of DeepSpeed, as "parallel/engine.py:210"."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for package in ("/dalle_ds/", "/deepspeed/"):
            if package in name and "/dalle_ds/bench/" not in name:
                return f"{name.rpartition(package)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
