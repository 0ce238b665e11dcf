"""Times of an update's phases and the fraction of time in collectives, on a process group of one rank."""

import sys
import time
from collections.abc import Iterator
from types import FrameType

import pytest
import torch
import torch.distributed as dist
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from dalle_ds.parallel.step_timer import PhaseTimer, _collective_spans, _covered, collective_share

CPU = torch.device("cpu")


def test_seconds_add_up_and_start_anew() -> None:
    timer = PhaseTimer(CPU)
    for _ in range(2):
        with timer("forward"):
            time.sleep(0.02)
        with timer("step"):
            pass
    first = timer.take()
    assert first.keys() == {"forward", "step"} and first["forward"] >= 0.04 > first["step"]
    assert timer.take() == {}


def test_union_of_spans() -> None:
    assert _covered([(0, 2), (1, 3), (1, 2), (5, 6)]) == 4
    assert _covered([]) == 0


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_share_of_collectives(group: None) -> None:
    with collective_share(CPU) as with_some:
        dist.all_reduce(torch.ones(100_000))
    with collective_share(CPU) as with_none:
        torch.ones(100_000).sum()
    assert 0 < with_some.value <= 1 and with_none.value == 0


def work() -> None:
    """Collectives of three kinds among many other operations."""
    for _ in range(50):
        numbers = torch.ones(1000).mul(2).add(1)
    dist.all_reduce(numbers)
    dist.broadcast(numbers, 0)
    dist.all_gather([torch.empty(1000)], numbers)


def test_spans_are_those_of_the_profilers_event_objects(group: None) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    spans = _collective_spans(profiler, on_gpu=False)
    events = [event.time_range for event in profiler.events() if event.name.startswith("gloo:")]
    assert len(spans) == len(events) == 3
    lengths = [(end - start) / 1e3 for start, end in spans]
    assert lengths == pytest.approx([span.end - span.start for span in sorted(events, key=lambda span: span.start)], abs=2e-3)


def test_no_event_objects_are_made(group: None) -> None:
    """An event object takes 80 us. For an update of a large model that is minutes, while all other ranks wait."""
    made = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal made
        made += event == "call" and frame.f_code is FunctionEvent.__init__.__code__

    sys.setprofile(count)
    try:
        with collective_share(CPU):
            work()
    finally:
        sys.setprofile(None)
    assert made == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_of_a_gpu() -> None:
    device = torch.device("cuda")
    timer, a = PhaseTimer(device), torch.ones(2048, 2048, device=device)
    for _ in range(2000):  # more than KEPT_EVENTS
        with timer("forward"):
            a @ a
    seconds = timer.take()
    assert seconds["forward"] > 0 and timer.take() == {}
