"""Pretend that a GPU is present, so that torch.compile generates the CUDA kernels that it would generate there.

Only for child processes: torch, Inductor and Triton are changed permanently. TRITON_INTERPRET=1 must be in the environment,
because Triton's interpreter (interpreter.py) computes the kernels, on CPU tensors that stand behind the "cuda" tensors.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.compile_fx
import torch._inductor.runtime.triton_helpers
import torch._inductor.utils
import torch.utils._triton
from torch import Tensor
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dalle_ds.bench.fake_cuda import stub

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

_ALIKE = {
    "total_memory": 80 << 30,
    "warp_size": 32,
    "max_threads_per_block": 1024,
    "max_threads_per_multi_processor": 2048,
    "regs_per_multiprocessor": 65536,
    "shared_memory_per_block": 48 << 10,
    "gcnArchName": "",
}
CARDS = {
    80: SimpleNamespace(
        name="A100",
        major=8,
        minor=0,
        multi_processor_count=108,
        shared_memory_per_block_optin=163 << 10,
        shared_memory_per_multiprocessor=164 << 10,
        L2_cache_size=40 << 20,
        **_ALIKE,
    ),
    90: SimpleNamespace(
        name="H100",
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=227 << 10,
        shared_memory_per_multiprocessor=228 << 10,
        L2_cache_size=50 << 20,
        **_ALIKE,
    ),
}
"""Device properties by compute capability, as CUDA reports them for these GPUs. Only properties that Inductor reads."""


@dataclass
class Record:
    """Compiled sources and launched kernels."""

    sources: list[str] = field(default_factory=list)
    """Source code of Inductor's modules. Each has kernels and the function that launches them."""
    launched: list[str] = field(default_factory=list)
    """Names of launched kernels, including torch's own operators between them."""
    read: set[int] = field(default_factory=set)
    """Addresses of the tensors passed to the kernels."""


class PretendedGPU:
    """The only GPU of this process. `save` writes generated sources to `folder`."""

    def __init__(self, sm: int, folder: Path) -> None:
        self._record = Record()
        self._computing, self._is_quiet = True, False
        self._behind: dict[int, tuple[Tensor, Tensor]] = {}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        stub.install()
        _into_torch(lambda: self._card)
        self._into_inductor()
        self.become(sm, folder)

    def become(self, sm: int, folder: Path) -> None:
        """Become the GPU of compute capability `sm`, whose sources go to `folder`."""
        folder.mkdir(parents=True)
        self._folder, self._card = folder, CARDS[sm]
        target = GPUTarget("cuda", sm, 32)
        driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
        torch._dynamo.reset()
        for module in (torch._inductor.utils, torch.utils._triton):  # they cache the capabilities of the previous GPU
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
        DeviceProperties.create.cache_clear()

    @contextmanager
    def recording(self, *, computing: bool) -> Iterator[Record]:
        """Record compiled and launched kernels. Without `computing`, kernels are generated and counted but not computed, and
        results are uninitialised memory."""
        before, self._record, self._computing = (self._record, self._computing), Record(), computing
        try:
            yield self._record
        finally:
            self._record, self._computing = before
            self._behind.clear()

    def save(self, record: Record, name: str) -> None:
        """Write the sources for the compiler (ptxas.py), as "NAME 0.py", "NAME 1.py" and so on."""
        for i, source in enumerate(record.sources):
            (self._folder / f"{name} {i}.py").write_text(source)

    def put(self, tensor: Tensor) -> Tensor:
        """Returns a fake "cuda" tensor of the same layout. Compiled functions that get it read and write `tensor`."""
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        with self._mode, torch.no_grad():
            fake = torch.empty(size, dtype=tensor.dtype, device=CUDA)
            fake = fake.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        fake.requires_grad_(tensor.requires_grad)
        self._behind[id(fake)] = (fake, tensor)  # keeps the fake tensor alive, so that its id isn't reused
        return fake

    def _into_inductor(self) -> None:
        # both trace their patterns on the device, which takes minutes; no function compiled here contains such a pattern
        joint_graph.lazy_init = lambda *_: None
        post_grad.lazy_init = lambda *_: None
        torch._inductor.runtime.triton_helpers.set_driver_to_gpu = lambda: None
        torch._C._dynamo.guards._empty_strided_cuda = self._allocate  # called by the generated launchers
        GraphLowering.save_output_code = staticmethod(lambda source: self._record.sources.append(source))
        _fold_constants_on_the_cpu()
        compile_fx, launch = torch._inductor.compile_fx.compile_fx, CachingAutotuner.run

        def compile_for_values(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            compiled = compile_fx(*args, **kwargs)

            def run(*inputs: Any) -> Any:
                if not any(isinstance(i, FakeTensor) for i in inputs):
                    return compiled(*inputs)  # if it has options, compile_fx calls itself
                values = [self._behind[id(i)][1] if isinstance(i, FakeTensor) else i for i in inputs]
                with _Operators(self._notice):
                    return compiled(*values)

            return run

        def launch_largest(tuner: CachingAutotuner, *args: Any, **kwargs: Any) -> None:
            self._notice(tuner.fn.__name__)
            self._record.read.update(arg.data_ptr() for arg in args if isinstance(arg, Tensor))
            if not self._computing:
                return
            # every autotuning candidate must be correct, and the one with the fewest programs is the cheapest to interpret
            tuner.configs = [min(tuner.configs, key=lambda config: math.prod(tuner._interpret_args_grid(args, config)[1]))]
            with self._quiet():
                launch(tuner, *args, **kwargs)

        torch._inductor.compile_fx.compile_fx = compile_for_values
        CachingAutotuner.run = launch_largest

    def _notice(self, kernel: str) -> None:
        if not self._is_quiet:
            self._record.launched.append(kernel)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        self._is_quiet = True
        try:
            yield
        finally:
            self._is_quiet = False

    def _allocate(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with self._quiet():
            tensor = torch.empty_strided(size, stride, dtype=dtype)
            if self._computing:  # shows elements that a kernel doesn't write
                tensor.fill_(math.nan if dtype.is_floating_point else -1)
        return tensor


class _Operators(TorchDispatchMode):
    """Record torch's own operators, except views."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        super().__init__()
        self._notice = notice

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not func.is_view:
            self._notice(str(func))
        return func(*args, **(kwargs or {}))


class _OnCPU(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return func(*args, **{key: CPU if value == CUDA else value for key, value in (kwargs or {}).items()})


def _fold_constants_on_the_cpu() -> None:
    """Compute one-element constants on the CPU. Inductor would compute them on the graph's device."""
    deduce = UniformValueConstantFolder._deduce_value

    def on_the_cpu(folder: UniformValueConstantFolder, node: torch.fx.Node) -> Any:
        with _OnCPU():
            return deduce(folder, node)

    UniformValueConstantFolder._deduce_value = on_the_cpu


def _into_torch(card: Callable[[], SimpleNamespace]) -> None:
    """Add functions that only a CUDA build of torch has. Each name gets its own function: Dynamo rejects one with two names."""
    functions = {
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_getDevice": lambda: 0,
        "_cuda_setDevice": lambda i: None,
        "_cuda_getCurrentRawStream": lambda i: 0,
        "_cuda_synchronize": lambda: None,
    }
    for name, function in functions.items():
        setattr(torch._C, name, function)
    torch.version.cuda = "13.0"
    torch.cuda._initialized = True
    torch.cuda._exchange_device, torch.cuda._maybe_exchange_device = (lambda i: 0), (lambda i: 0)
    torch.cuda._get_device_properties = lambda i: card()
    # Dynamo saves and restores the random state while it traces
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = (lambda *_: torch.zeros(16, dtype=torch.uint8)), (lambda *_: None)
