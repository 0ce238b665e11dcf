"""The fake CUDA device counts kernels, bytes and waits, raises CUDA's errors, and is removed completely."""

from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from dalle_ds.bench.fake_cuda import stub
from dalle_ds.bench.fake_cuda.counts import Counts
from dalle_ds.bench.fake_cuda.device import FakeGPU, fake_cuda
from dalle_ds.bench.harness.memory import in_fresh_process
from dalle_ds.errors import ConfigError
from tests.support.fake_cuda import fake_cuda_process

KIB = 2**10


@pytest.fixture(scope="module")
def call():
    with fake_cuda_process() as call:
        yield call


def by_name(numbers: Counter) -> dict[str, float]:
    names: Counter[str] = Counter()
    for site, number in numbers.items():
        names[site.what] += number
    return dict(names)


def work_of_known_size() -> dict[str, Counts]:
    found = {}
    with fake_cuda() as gpu:
        a, b = torch.empty(16, 64, device=gpu.device), torch.empty(64, 32, device=gpu.device)  # 4 and 8 KiB
        works = {
            "product": lambda: a @ b,
            "views": lambda: a.t().view(64, 4, 4)[1:].expand(2, 63, 4, 4),
            "nothing": lambda: a[:0] + 1,
            "twice the same": lambda: a * a,
            "in place": lambda: a.add_(1.0),
            "overwritten": lambda: a.copy_(b.view(2, 1024)[0].view(16, 64)).zero_(),
            "repeated": lambda: a + torch.empty(16, 1, device=gpu.device).expand(16, 64),
            "picked": lambda: b.index_select(0, torch.zeros(2, dtype=torch.int64, device=gpu.device)),
            "compiled": lambda: compiled(gpu, a),
        }
        for name, work in works.items():
            with gpu.counting() as found[name]:
                work()
    return found


def compiled(gpu: FakeGPU, a: torch.Tensor) -> torch.Tensor:
    writes: list[torch.Tensor] = []
    with gpu.compiled("chain", 2, [a], writes):
        writes.append(a.exp().sin().to(torch.float16))
    return writes[0]


def test_kernels_and_bytes(call):
    found = call(work_of_known_size)
    kib = {name: (sum(c.read.values()) / KIB, sum(c.written.values()) / KIB) for name, c in found.items()}
    assert kib["product"] == (12, 2) and kib["twice the same"] == (4, 4) and kib["in place"] == (4, 4)
    assert kib["views"] == kib["nothing"] == (0, 0)
    assert kib["overwritten"] == (4, 8)  # neither operator reads the tensor that it overwrites
    assert kib["repeated"] == (4 + 64 / KIB, 4)
    assert kib["compiled"] == (4, 2)
    names = {name: by_name(c.kernels) for name, c in found.items()}
    assert names["product"] == {"mm": 1} and names["compiled"] == {"chain": 2} and not names["views"] and not names["nothing"]
    assert kib["picked"] == (256 / KIB + 16 / KIB, 256 / KIB + 16 / KIB) and names["picked"] == {"zeros": 1, "index_select": 1}


def host_waits() -> dict[str, dict[str, float]]:
    with fake_cuda() as gpu:
        a, on_host = torch.ones(3, device=gpu.device), torch.arange(3.0)
        pinned = on_host.pin_memory()
        works = {
            "item": lambda: a[0].item(),
            "bool": lambda: bool((a > 0).all()),
            "tolist": lambda: a.tolist(),
            "nonzero": lambda: a.nonzero(),
            "cpu": lambda: a.cpu(),
            "to device": lambda: on_host.to(gpu.device),
            "unpinned": lambda: on_host.to(gpu.device, non_blocking=True),
            "assigned": lambda: a.__setitem__(0, 1.0),
            "pinned": lambda: pinned.to(gpu.device, non_blocking=True),
            "back": lambda: pinned.copy_(a, non_blocking=True),
            "filled": lambda: torch.full((), 3.0, device=gpu.device),
            "scalar": lambda: a * on_host[0],
            "stream": lambda: torch.cuda.current_stream().synchronize(),
            "event": lambda: torch.cuda.Event().synchronize(),
            "device": torch.cuda.synchronize,
        }
        found = {}
        for name, work in works.items():
            with gpu.counting() as counts:
                work()
            found[name] = by_name(counts.syncs)
    return found


def test_where_the_host_waits(call):
    assert call(host_waits) == {
        "item": {"item": 1},
        "bool": {"item": 1},
        "tolist": {"copy to host": 1},
        "nonzero": {"nonzero": 1},
        "cpu": {"copy to host": 1},
        "to device": {"copy to device": 1},
        "unpinned": {"copy to device": 1},
        "assigned": {"copy to device": 1},
        "pinned": {},
        "filled": {},
        "back": {},
        "stream": {"stream.synchronize": 1},
        "event": {"event.synchronize": 1},
        "device": {"synchronize": 1},
        "scalar": {},
    }


def mistakes() -> dict[str, str]:
    def recorded_wait(tensor: torch.Tensor) -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            tensor.item()

    with fake_cuda() as gpu:
        a, half = torch.empty(4, 4, device=gpu.device), torch.empty(4, 4, dtype=torch.float16, device=gpu.device)
        works = {
            "generator": lambda: a.normal_(generator=torch.Generator()),
            "devices": lambda: a + torch.ones(4),
            "dtypes": lambda: half @ a,
            "recording": lambda: recorded_wait(a[0, 0]),
            "good": lambda: a.normal_(generator=torch.Generator(gpu.device).manual_seed(3)),
        }
        said = {}
        for name, work in works.items():
            try:
                work()
            except RuntimeError as error:
                said[name] = str(error)
    return said


def test_refuses_what_cuda_refuses(call):
    said = call(mistakes)
    assert set(said) == {"generator", "devices", "dtypes", "recording"}
    assert "'cuda'" in said["generator"] and "'cpu'" in said["generator"] and "two devices" in said["devices"]
    assert "torch.float16" in said["dtypes"] and "not permitted while a CUDA graph is captured" in said["recording"]


def values() -> dict[str, Any]:
    with fake_cuda() as gpu:
        a = torch.tensor([3, 5], device=gpu.device)
        known, item = a.cpu().tolist(), a.view(2).detach().tolist()
        a += 1
        on_host = torch.ones_like(a, device="cpu")
        return {"written": known, "view": item, "changed": a.tolist(), "cpu": (torch.arange(2) * on_host).tolist()}


def test_values_that_the_host_wrote_come_back_and_the_cpu_is_real(call):
    assert call(values) == {"written": [3, 5], "view": [3, 5], "changed": [0, 0], "cpu": [0, 1]}


def peaks() -> tuple[int, int, int]:
    def step(model: nn.Module, x: torch.Tensor) -> None:
        model(x).square().sum().backward()
        model.zero_grad()

    def ours(gpu: FakeGPU) -> int:
        before = gpu.live_bytes
        model, x = model_and_input(gpu)
        with gpu.measuring_peak() as peak:
            step(model, x)
        return peak() - before

    def theirs(gpu: FakeGPU) -> int:
        model, x = model_and_input(gpu)
        tracker = MemTracker()
        tracker.track_external(model, x)
        with tracker:
            step(model, x)
        return tracker.get_tracker_snapshot("peak")[gpu.device]["Total"]

    with fake_cuda() as gpu:
        return ours(gpu), gpu.live_bytes, theirs(gpu)


def model_and_input(gpu: FakeGPU) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)).to(gpu.device)
    return model, torch.empty(64, 128, device=gpu.device)


def test_peak_memory_is_what_torch_itself_tracks(call):
    ours, left, theirs = call(peaks)
    assert ours == theirs and left == 0


def afterwards() -> tuple[bool, list[float], str]:
    with fake_cuda():
        inside = torch.cuda.is_available()
    after = torch.cuda.is_available() or torch.accelerator.is_available()
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()
    with pytest.raises((RuntimeError, AssertionError)) as refused:
        torch.empty(1, device="cuda")
    return inside and not after, x.grad.tolist(), str(refused.value)


def test_leaves_nothing_behind(call):
    only_inside, grad, refused = call(afterwards)
    assert only_inside and grad == [2.0, 2.0] and "CUDA" in refused


def too_late() -> str:
    torch.ones(1, requires_grad=True).sum().backward()
    with suppress(ConfigError), pytest.raises(RuntimeError) as error, fake_cuda():
        pass
    return str(error.value)


def test_says_that_it_came_too_late(call):
    assert "before the process's first backward pass" in in_fresh_process(too_late)


def test_says_that_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "CXX" in stub.stub_problem() and "no-such-compiler" in stub.stub_problem()
    stub._library.cache_clear()
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        stub.install()
