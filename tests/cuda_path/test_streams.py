"""The real engine, with all work between updates, never touches memory that another stream may use at the same time. If
DeepSpeed loses one of the waits that guarantee this, the sanitizer notices."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from dalle_ds.bench.fake_world.one_rank import in_fake_world, make_engine, miniature, random_batches
from dalle_ds.optim.ema import EMA, EMAConfig
from dalle_ds.parallel.ranks import Ranks
from tests.cuda_path import stream_sanitizer
from tests.cuda_path.stream_sanitizer import StreamSanitizer
from tests.cuda_path.test_fake_world import CONFIG, LIMITS_OF_WIDTH, SHIPPED

Wait = tuple[str, str]


@dataclass
class Seen:
    races: dict[str, int]
    waits: set[Wait]
    n: int
    took_step: list[bool]


def watch(
    ranks: Ranks,
    with_residents: bool = True,
    without: tuple[Wait, ...] = (),
    n_updates: int = 3,
    between: bool = False,
    accumulation: int = 1,
    **how: Any,
) -> Seen:
    """Take updates under the sanitizer. With `between`, also do the work that a run does between updates."""
    stream_sanitizer.install()
    tree = miniature(SHIPPED, CONFIG, LIMITS_OF_WIDTH)
    if not with_residents:
        tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    stream_sanitizer.without = set()
    stream_sanitizer.WAITS.clear()
    took_step = []
    with StreamSanitizer() as sanitizer:
        engine = make_engine(ranks, CONFIG, tree, accumulation=accumulation, **how)
        batches = random_batches(CONFIG, 1, accumulation)
        sanitizer.on_host(tensor for batch in batches for tensor in batch)
        average = EMA(engine.shards(), EMAConfig())
        stream_sanitizer.without = set(without)

        def update() -> None:
            took_step.append(engine.update(batches, 1e-4).took_step)

        for _ in range(n_updates):
            update()
        if between:
            average.update(engine.shards())
            update()
            with average.in_place_of(engine.shards(), engine.refresh_gathered_parameters):
                engine.evaluate(batches)
            engine.evaluate(batches)
            engine.image_nll(*batches[0])
            engine.snapshot({}, average.averages)
            update()
            scale = engine.scaler.scale.clone()
            engine.scaler.scale.fill_(2.0**60)  # causes an overflow, so that the step is vetoed
            update()
            engine.scaler.scale.copy_(scale)
            update()
    return Seen(dict(sanitizer.races), set(stream_sanitizer.WAITS), sanitizer.n, took_step)


@pytest.fixture(scope="module")
def watched() -> Iterator[Callable[..., Seen]]:
    """Returns a function that runs `watch` as rank 0 of a job of `n_ranks`. Each job has one process, which builds one engine
    after the other."""
    with ExitStack() as stack:
        jobs: dict[int, Any] = {}

        def of(n_ranks: int, **how: Any) -> Seen:
            if n_ranks not in jobs:
                jobs[n_ranks] = stack.enter_context(in_fake_world(0, n_ranks))
            return jobs[n_ranks](watch, **how)

        yield of


@pytest.mark.parametrize("with_residents", [True, False])
@pytest.mark.parametrize("n_ranks", [1, 8])
def test_updates_vetoes_averages_evaluation_and_snapshots_race_with_nothing(
    watched: Callable[..., Seen], n_ranks: int, with_residents: bool
) -> None:
    seen = watched(n_ranks, with_residents=with_residents, between=True, accumulation=1 if with_residents else 2)
    assert not seen.races, "\n".join(seen.races)
    assert seen.took_step == [True, True, True, True, True, False, True]
    assert seen.n > 4000


@pytest.mark.parametrize("compression", ["none", "power_sgd"])
def test_replicas_race_with_nothing(watched: Callable[..., Seen], compression: str) -> None:
    seen = watched(8, between=True, n_replicas=2, compression=compression)
    assert not seen.races, "\n".join(seen.races)
    assert seen.took_step == [True, True, True, True, True, False, True]


def test_matrices_without_masters_race_with_nothing(watched: Callable[..., Seen]) -> None:
    seen = watched(8, between=True, master="none", moments="low_bit", accumulation=2)
    assert not seen.races, "\n".join(seen.races)
    assert seen.took_step == [True, True, True, True, True, False, True]


LOST_WAITS = {
    "reduction before the backward pass has computed gradients": (
        [("wait_stream", "__add_grad_to_ipg_bucket")],
        ["div_ on stream", "coalesced_collectives.py", "mm on default", "dalle_ds/ops/fp16.py", "(linear_fp16_backward)"],
    ),
    "gradients used before they are reduced": (
        [("synchronize", "independent_gradient_partition_epilogue")],
        ["_amp_foreach_non_finite_check_and_unscale_ on default", "(unscale)", "on stream", "(partition_grads)"],
    ),
    "weights used before they are gathered": (
        [("wait_stream", "_fetch_sub_module_impl")],
        ["on default", "dalle_ds/", "on stream", "fp16_gather.py"],
    ),
    "weights used before the all-gather has ended": (
        [("wait", "wait")],
        ["on default", "dalle_ds/", "_allgather_base_ on NCCL", "fp16_gather.py"],
    ),
    "weights gathered while the step writes them": (
        [("read", "update")],  # the host reads the norm after the step
        ["on stream", "(_all_gather_dtype)", "on default", "(_reassign_or_swap_out_partitioned_parameters)"],
    ),
    "gathered weights freed while in use": (
        [("record_stream", "free_param")],
        ["freed for stream", "(free_param)", "on default", "dalle_ds/"],
    ),
    "gradients freed while they are reduced": (
        [("record_stream", "partition_grads"), ("record_stream", "__add_grad_to_ipg_bucket")],
        ["freed for default", "(partition_grads)", "on stream"],
    ),
}
"""Waits in DeepSpeed and in this project that prevent races, and strings in the report if they are missing."""

NEEDS_NO_RESIDENTS = "weights gathered while the step writes them"
"""With resident parameters, this race can't occur: they are gathered after the step, and all streams are waited for then."""


@pytest.mark.parametrize("what", LOST_WAITS)
def test_a_lost_wait_is_noticed(watched: Callable[..., Seen], what: str) -> None:
    without, named = LOST_WAITS[what]
    seen = watched(8, without=tuple(without), n_updates=2, with_residents=what != NEEDS_NO_RESIDENTS)
    assert seen.waits.issuperset(without), (
        "DeepSpeed now waits elsewhere: find the wait that protects the engine, adapt LOST_WAITS"
    )
    assert any(all(part in race for part in named) for race in seen.races), "\n".join(seen.races) or "no race reported"
