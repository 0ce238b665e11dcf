"""A fake CUDA device without values: tensors on it are fake, CPU tensors are real, and `torch.cuda` reports one device.

Code runs as it would on a GPU, except for values: shapes, devices, dtypes, autograd, hooks and streams are those of the CUDA
path. A value that the host reads from the device is zero, unless the host wrote it and no operator has changed it since.
"""

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from dalle_ds.bench.fake_cuda import stub
from dalle_ds.bench.fake_cuda.counts import Counts, Site
from dalle_ds.bench.fake_cuda.torch_cuda import one_fake_device, replaced

NO_KERNEL = frozenset(
    {
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "set_",
        "resize_",
        "_unsafe_view",
        "lift_fresh",
        "record_stream",
        "is_pinned",
        "is_same_size",
        "_assert_tensor_metadata",
        "_local_scalar_dense",
    }
)
"""Operators other than views that neither compute nor copy."""
ONLY_WRITES = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "exponential_", "bernoulli_"})
"""In-place operators that don't read the tensor that they overwrite."""
PICKS = frozenset({"embedding", "index_select", "gather", "index"})
"""Operators that read as many elements of their first argument as they write."""
PUTS = frozenset({"index_copy_", "index_put_", "_index_put_impl_", "index_add_", "scatter_", "scatter_add_"})
"""Operators that write as many elements of their first argument as their last argument has."""
SAME_DTYPES = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
"""Arguments of matrix products that must have the same dtype: CUDA raises otherwise, fake tensors don't."""
DRAWS = frozenset({"normal_", "uniform_", "random_"})
REMEMBERED = 2**16
"""Maximum number of elements of a tensor whose values are remembered when the host writes them to the device."""
ALLOCATION = 512
"""CUDA's caching allocator rounds allocations up to a multiple of this number of bytes."""

COMPOSITE = "CompositeImplicitAutograd"
READ_BY_HOST = frozenset({"_local_scalar_dense", "nonzero"})
COPIES = frozenset({"_to_copy", "copy_"})
_PACKAGES = tuple(f"/{package}/" for package in ("dalle_ds", "preprocessing", "deepspeed"))
_PLUMBING = (
    "/dalle_ds/bench/fake_cuda/",
    "/dalle_ds/ops/fused.py",
    "/deepspeed/accelerator/",
    "/deepspeed/utils/nvtx.py",
    "/deepspeed/comm/",
)
"""Stack frames to skip when an operator is attributed to a line of code."""


@contextmanager
def fake_cuda() -> Iterator["FakeGPU"]:
    """Install the fake device for the duration of the context, and yield it.

    Raises:
        ConfigError: fake CUDA can't run on this machine, see `stub_problem`.
        RuntimeError: autograd already ran in this process. Use a new one (`bench.harness.memory.in_fresh_process`).
    """
    stub.install()
    try:
        gpu = FakeGPU()
        with ExitStack() as stack:
            stack.enter_context(one_fake_device(gpu.host_waits, gpu.recording, lambda: gpu.live_bytes))
            stack.enter_context(replaced(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()))
            stack.enter_context(_FakeMode(allow_non_fake_inputs=True))
            stack.enter_context(gpu)
            yield gpu
    finally:
        stub.remove()


class _FakeMode(FakeTensorMode):
    # FakeTensorMode checks torch.cuda.is_available(), and would then create real tensors on the device
    avoid_device_init = True


class FakeGPU(TorchDispatchMode):
    """The fake device. Every operator is dispatched through it."""

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._counts: list[Counts] = []
        self._compiled = self._is_recording = False
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._pinned: dict[int, Tensor] = {}

    # ---- interface -------------------------------------------------------------------------------------------------------

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Count the work in the context."""
        counts = Counts()
        self._counts.append(counts)
        try:
            yield counts
        finally:
            self._counts.remove(counts)

    @contextmanager
    def measuring_peak(self) -> Iterator[Callable[[], int]]:
        """Yields a function that returns the peak of allocated bytes since the context began."""
        self.peak_bytes = self.live_bytes
        yield lambda: self.peak_bytes

    @contextmanager
    def compiled(self, name: str, n_kernels: int, reads: Sequence[Tensor], writes: list[Tensor]) -> Iterator[None]:
        """Count the context as one compiled function: `n_kernels` kernels, which together read and write these tensors once.

        `writes` may be filled in the context.
        """
        if self._compiled:
            yield
            return
        site, self._compiled = self._site(name), True
        try:
            yield
        finally:
            self._compiled = False
        self._count_kernel(site, n_kernels, sum(map(_n_bytes, reads)), sum(map(_n_bytes, writes)))
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def host_waits(self, what: str) -> None:
        """Count one host synchronisation: the host waits for all launched work."""
        if self._is_recording:
            raise RuntimeError(f"{what}: the host waits for the device, which is not permitted while a CUDA graph is captured")
        for counts in self._counts:
            counts.syncs[self._site(what)] += 1

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Capture of a CUDA graph: a host synchronisation in the context raises RuntimeError."""
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    # ---- one operator ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind.is_composite:
            with self:
                return func.decompose(*args, **kwargs)
        if kind.is_collective:
            return self._collective(kind, args)
        tensors: list[Tensor] = []
        _collect(args, tensors)
        _collect(kwargs.values(), tensors)
        target = kwargs.get("device")
        goes_there = target is not None and torch.device(target).type == "cuda"
        if not goes_there and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._on_cpu(kind, func, args, kwargs)
        if kind.is_special:
            if kind.name in READ_BY_HOST:
                return self._read_by_host(kind.name, args[0])
            if kind.name in COPIES:
                source = args[1] if kind.name == "copy_" else args[0]
                ends_there = isinstance(args[0], FakeTensor) if target is None else goes_there
                if ends_there != isinstance(source, FakeTensor):
                    return self._between_devices(kind.name, source, func, args, kwargs)
            _check(kind.name, args, kwargs)
        if target is not None and not goes_there and kind.name not in COPIES:  # such as zeros_like(tensor, device="cpu")
            return self._on_cpu(kind, func, tuple(map(_without_device, args)), kwargs)
        out = func(*args, **kwargs)
        if kind.is_view:
            if self._values:
                self._remember_view(tensors[0], out)
            return out
        outputs: list[Tensor] = []
        _collect((out,), outputs)
        self._track(outputs)
        if self._counts and not self._compiled and kind.is_kernel:
            self._count(kind, args, kwargs, tensors, outputs)
        return out

    def _on_cpu(self, kind: "_Kind", func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the operator on the CPU. Large random draws are skipped, because nothing reads their values."""
        if kind.name in DRAWS and args[0].numel() > REMEMBERED:
            return args[0]
        pin = kwargs.get("pin_memory") or kind.name == "_pin_memory"
        with unset_fake_temporarily():
            if kind.name == "is_pinned":
                return self._is_pinned(args[0])
            if not pin:
                return func(*args, **kwargs)
            out = args[0].clone() if kind.name == "_pin_memory" else func(*args, **kwargs | {"pin_memory": False})
            self._pinned[out.untyped_storage().data_ptr()] = out
        return out

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _read_by_host(self, name: str, tensor: Tensor) -> Any:
        self.host_waits("item" if name == "_local_scalar_dense" else name)
        if name == "_local_scalar_dense":
            with unset_fake_temporarily():
                return self._value(tensor).item()
        # the largest possible result: all elements are nonzero
        places = torch.empty(tensor.numel(), tensor.dim(), dtype=torch.int64, device=self.device)
        self._track([places])
        self._count_kernel(self._site(name), 1, _n_bytes(tensor), _n_bytes(places))
        return places

    def _between_devices(self, name: str, source: Tensor, func: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Copy from host to device or back. The host waits unless the copy is non_blocking and the host memory is pinned."""
        to_host = isinstance(source, FakeTensor)
        non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        on_host = (args[0] if name == "copy_" else None) if to_host else source
        if not (non_blocking and on_host is not None and self._is_pinned(on_host)):
            self.host_waits("copy to host" if to_host else "copy to device")
        if not to_host:
            out = func(*args, **kwargs)
            self._track([out])
            self._remember(out, source)
            return out
        value = self._value(source)
        with unset_fake_temporarily():
            return args[0].copy_(value) if name == "copy_" else value.to(kwargs.get("dtype") or value.dtype, copy=True)

    def _collective(self, kind: "_Kind", args: tuple) -> Any:
        """Count a collective. It sends nothing and completes at once."""
        if "barrier" in kind.name:
            self.host_waits(kind.name)
        site, written, read = self._site(kind.name), [], []
        _collect(args[:1], written)
        _collect(args[1:2], read)
        n_written, n_read = sum(map(_n_bytes, written)), sum(map(_n_bytes, read or written))
        for counts in self._counts if written else ():
            counts.collectives[site] += 1
            counts.sent[site] += max(n_read, n_written)
            counts.read[site] += n_read
            counts.written[site] += n_written
        work = FakeWork().boxed()
        return (args[0], work) if kind.gives_tensors else work

    # ---- counting --------------------------------------------------------------------------------------------------------

    def _count(
        self, kind: "_Kind", args: tuple, kwargs: dict[str, Any], tensors: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        targets: list[Tensor] = []
        _collect((args[i] if i < len(args) else kwargs.get(name) for i, name in kind.targets), targets)
        written = {id(tensor): _n_bytes(tensor) for tensor in [*targets, *outputs]}
        if not any(written.values()):
            return  # an operator with empty outputs launches no kernel
        unread = {id(tensor) for tensor in targets} if kind.only_writes else set()
        on_gpu = (tensor for tensor in tensors if isinstance(tensor, FakeTensor))
        read = {id(tensor): _n_bytes(tensor) for tensor in on_gpu if id(tensor) not in unread}
        if kind.name in PICKS:
            read[id(args[0])] = min(read[id(args[0])], sum(written.values()))
        elif kind.name in PUTS:
            touched = min(written[id(args[0])], _n_bytes(tensors[-1]))
            written = {id(args[0]): touched}
            read[id(args[0])] = touched if "add" in kind.name else 0
        self._count_kernel(self._site(kind.name), 1, sum(read.values()), sum(written.values()))

    def _count_kernel(self, site: Site, n: int, read: int, written: int) -> None:
        for counts in self._counts:
            counts.kernels[site] += n
            counts.read[site] += read
            counts.written[site] += written

    def _site(self, what: str) -> Site:
        frame = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            file = _short_name(code.co_filename)
            if file is not None:
                return Site(what, file, frame.f_lineno, code.co_qualname)
            frame = frame.f_back
        node = torch._C._current_autograd_node()
        return Site(what, "autograd", 0, node.name() if node is not None else "none")

    # ---- memory ----------------------------------------------------------------------------------------------------------

    def _track(self, outputs: Sequence[Tensor]) -> None:
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if id(storage) not in self._alive:
                size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
                self._alive[id(storage)] = weakref.ref(storage, partial(self._free, id(storage), size))
                self.live_bytes += size
        if not self._compiled:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _free(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self.live_bytes -= size

    # ---- values ----------------------------------------------------------------------------------------------------------

    def _value(self, tensor: Tensor) -> Tensor:
        """Returns the values of a device tensor on the CPU: remembered ones, or zeros if none are known."""
        known = self._values.get(tensor)
        with unset_fake_temporarily():
            if known is not None and known[1] == tensor._version:
                return known[0]
            return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def _remember(self, tensor: Tensor, value: Tensor) -> None:
        if value.numel() <= REMEMBERED and not tensor.is_inference():  # inference tensors have no version counter
            with unset_fake_temporarily():
                self._values[tensor] = value.detach().to(tensor.dtype, copy=True), tensor._version

    def _remember_view(self, source: Tensor, out: Any) -> None:
        known = self._values.get(source)
        if known is not None and known[1] == source._version and isinstance(out, Tensor) and out.shape == source.shape:
            self._remember(out, known[0])


class _Kind(NamedTuple):
    """Properties of an operator, from its name and schema."""

    name: str
    is_composite: bool
    """Decomposes into other operators, which inference mode hides from dispatch."""
    is_collective: bool
    is_special: bool
    """Needs more than a plain call: host reads, copies between devices, argument checks."""
    is_view: bool
    is_kernel: bool
    targets: tuple[tuple[int, str], ...]
    """Positions and names of the arguments that the operator writes to."""
    only_writes: bool
    """The operator doesn't read its `targets`."""
    gives_tensors: bool


@cache
def _kind(func: OpOverload) -> _Kind:
    schema = func._schema
    name = schema.name.partition("::")[2]
    targets = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return _Kind(
        name,
        is_composite=func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE),
        is_collective=func.namespace == "c10d",
        is_special=name in READ_BY_HOST | COPIES | SAME_DTYPES.keys() or any(a.name == "generator" for a in schema.arguments),
        is_view=any(given.alias_info is not None and not given.alias_info.is_write for given in schema.returns),
        is_kernel=name not in NO_KERNEL,
        targets=tuple((i, a.name) for i, a in targets),
        only_writes=name in ONLY_WRITES or any(a.kwarg_only for _, a in targets),
        gives_tensors=len(schema.returns) > 1,
    )


def _check(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError for arguments that CUDA rejects and fake tensors accept."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    if name in SAME_DTYPES:
        left, right = (args[i].dtype for i in SAME_DTYPES[name])
        if left != right:
            raise RuntimeError(f"{name}: expected both matrices to have one dtype, found {left} and {right}")


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    """Append the tensors in `values`, including nested lists, to `found`. torch's own pytree takes several times as long."""
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            _collect(value, found)


def _without_device(arg: Any) -> Any:
    with unset_fake_temporarily():
        if not isinstance(arg, FakeTensor):
            return arg
        return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")


def _n_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements: elements that `expand` repeats count once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


@cache
def _short_name(file: str) -> str | None:
    """Returns the path from the package on. For files to which no work is attributed: None."""
    if any(part in file for part in _PLUMBING):
        return None
    return next((file[file.rindex(package) + 1 :] for package in _PACKAGES if package in file), None)
