"""Phases of an update and the share of its collectives, on a process group of one."""

import time

import pytest
import torch
import torch.distributed as dist

from dalle_ds.parallel.phases import PhaseTimer, _covered, with_collective_share

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


def test_share_of_collectives(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        result, with_some = with_collective_share(lambda: dist.all_reduce(torch.ones(100_000)) or 7, CPU)
        _, with_none = with_collective_share(lambda: torch.ones(100_000).sum(), CPU)
    finally:
        dist.destroy_process_group()
    assert result == 7
    assert 0 < with_some <= 1 and with_none == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_of_a_gpu() -> None:
    device = torch.device("cuda")
    timer, a = PhaseTimer(device), torch.ones(2048, 2048, device=device)
    for _ in range(2000):  # more than are kept
        with timer("forward"):
            a @ a
    seconds = timer.take()
    assert seconds["forward"] > 0 and timer.take() == {}
