"""The real engine as the first, a middle and the last rank of jobs of 8, 256 and 1,024 ranks: communication, memory, host work
and memory growth.

A layer has four matrices with 12 d^2 parameters, and eight vectors with 13 d parameters: two norms and four biases.
"""

import json
import math
from dataclasses import asdict
from typing import Any

import pytest

from dalle_ds.bench.fake_world.counting import Sent, alive
from dalle_ds.bench.fake_world.host_time import HostTime, host_time
from dalle_ds.bench.fake_world.one_rank import in_fake_world, make_engine, miniature, random_batches
from dalle_ds.models.prior import PriorConfig
from dalle_ds.models.resblock import BranchLinear
from dalle_ds.parallel.ranks import Ranks
from tests.support.launching import ROOT

SHIPPED = json.loads((ROOT / "ds_configs" / "zero3_fp16.json").read_text())
N_LAYERS, D = 2, 40
"""40 is a multiple of 8 ranks, but not of 256 or 1,024."""
CONFIG = PriorConfig(n_layers=N_LAYERS, n_heads=5, d_head=8, text_len=8, grid=4, vocab_size=64, n_codes=32, conv_kernel=3)
LIMITS_OF_WIDTH = 8192
"""At this width, DeepSpeed's limits keep 1.2 layers gathered, so that one of two layers is gathered twice."""

FLAT = [(rank, n) for n in (8, 256, 1024) for rank in (0, n // 2 - 1, n - 1)]
REPLICAS = [(rank, 1024) for rank in (0, 515, 1023)]


def facts(ranks: Ranks, n_replicas: int, compression: str) -> dict[str, Any]:
    """Returns the messages of one update after two others, and sizes of shards and buffers."""
    tree = miniature(SHIPPED, CONFIG, LIMITS_OF_WIDTH)
    engine = make_engine(ranks, CONFIG, tree, n_replicas=n_replicas, compression=compression)
    batches = random_batches(CONFIG, 1)
    for _ in range(2):  # ZeRO-3 knows the order of modules from the third update on
        engine.update(batches, 1e-4)
    with Sent() as sent:
        report = engine.update(batches, 1e-4)
    zero, between = engine._engine.optimizer, engine.replica_gradients
    halves = {f"{name}.weight" for name, module in engine.module.named_modules() if isinstance(module, BranchLinear)}
    return {
        "report": asdict(report),
        "sent": {key: (entry.calls, entry.bytes) for key, entry in sent.traffic.items()},
        "dispatches": sum(sent.dispatches.values()),
        "whole": {name: parameter.ds_numel for name, parameter in engine.module.named_parameters()},
        "halves": halves,
        "shards": {name: shard.numel() for name, shard in engine.shards().items()},
        "gradients": zero.grad_partitions_flat_buffer.numel(),
        "bucket": sum(bucket.buffer.numel() for bucket in zero.ipg_buckets.values()),
        "bucket_size": tree["zero_optimization"]["reduce_bucket_size"],
        "between_replicas": between and (between.plain_bytes, between.bytes_sent),
    }


@pytest.fixture(scope="module")
def found() -> Any:
    """Returns a cached function from (rank, world size, number of replicas, compression) to `facts`."""
    cache: dict[Any, dict[str, Any]] = {}

    def of(rank: int, world_size: int, n_replicas: int = 1, compression: str = "none") -> dict[str, Any]:
        key = rank, world_size, n_replicas, compression
        if key not in cache:
            with in_fake_world(rank, world_size) as call:
                cache[key] = call(facts, n_replicas, compression)
        return cache[key]

    return of


def assert_shards_and_traffic(seen: dict[str, Any], n: int) -> None:
    """Check shards and traffic in a shard group of n ranks."""
    part = {name: math.ceil(numel / n) for name, numel in seen["whole"].items()}
    assert seen["shards"] == part
    assert seen["gradients"] == sum(part.values())
    assert seen["bucket"] == seen["bucket_size"] == D**2 - 1, "no matrix fits, so none is copied into the bucket"

    padded = {name: n * numel for name, numel in part.items()}
    matrices = sum(padded[name] for name in seen["halves"])
    others = sum(padded.values()) - matrices
    of_layers = sum(padded[name] for name in seen["halves"] if name.startswith("layers.0."))
    assert matrices == N_LAYERS * of_layers
    # forward and backward, 2 + 2 bytes per parameter; the last layer stays gathered in between. One message per matrix.
    times = 2 * N_LAYERS - 1
    assert seen["sent"]["all_gather", "float16", n] == (4 * times, 2 * times * of_layers)
    # resident parameters after the step, in one message of bytes; embeddings and unembeddings when they are used
    calls, size = seen["sent"]["all_gather", "float32", n]
    n_messages, resident_size = seen["sent"]["all_gather", "uint8", n]
    assert n_messages == 1
    assert 0 <= size + resident_size - 4 * others < 8 * n, "a multiple of 8 bytes a rank"
    assert calls <= 14
    # 4 bytes per parameter. One message per matrix (embeddings included), vectors in buckets.
    calls, size = seen["sent"]["reduce_scatter", "float32", n]
    assert size == 4 * sum(padded.values())
    assert 4 * N_LAYERS < calls <= 5 * N_LAYERS + 7


@pytest.mark.parametrize(("rank", "n"), FLAT)
def test_flat_each_matrix_is_gathered_twice_in_fp16_and_reduced_once_in_fp32(found: Any, rank: int, n: int) -> None:
    seen = found(rank, n)
    assert seen["report"]["took_step"]
    assert_shards_and_traffic(seen, n)
    # token counts (2); losses, stop requests and flags (5 + one per residual block); the norm of all gradients
    assert seen["sent"].pop(("all_reduce", "float64", n)) == (3, 8 * (2 + 5 + 2 * N_LAYERS + 1))
    assert {key[0] for key in seen["sent"]} == {"all_gather", "reduce_scatter"}


@pytest.mark.parametrize(("rank", "n"), REPLICAS)
@pytest.mark.parametrize("compression", ["none", "power_sgd"])
def test_replicas_of_8_ranks_send_shards_of_gradients_to_their_peers(found: Any, rank: int, n: int, compression: str) -> None:
    seen = found(rank, n, n // 8, compression)
    assert seen["report"]["took_step"]
    assert_shards_and_traffic(seen, 8)
    plain, total = seen["between_replicas"]
    plainly = [name for name in seen["whole"] if compression == "none" or name not in seen["halves"]]
    assert plain == 4 * sum(seen["shards"][name] for name in plainly)
    assert seen["sent"]["all_reduce", "float32", n // 8] == (1, plain)
    # among all ranks: the values that they agree on; inside a replica: the norm
    assert seen["sent"]["all_reduce", "float64", n] == (2, 8 * (2 + 5 + 2 * N_LAYERS))
    assert seen["sent"]["all_reduce", "float64", 8] == (1, 8)
    if compression == "power_sgd":  # codes of both factors, padded to whole bytes per peer
        for collective in ("all_to_all", "all_gather"):
            calls, size = seen["sent"][collective, "uint8", n // 8]
            assert calls == 2
            assert total - plain <= size < total - plain + calls * 2 * (n // 8)
    else:
        assert total == plain


def test_no_rank_slices_gradients_more_often_than_it_has_peers_in_its_shard_group(found: Any) -> None:
    flat_8, flat_1024, in_replicas = found(0, 8), found(0, 1024), found(0, 1024, 128)
    # DeepSpeed slices every gradient once per rank, in Python: this is why 1,024 GPUs must not be one shard group
    assert flat_1024["dispatches"] > 20 * flat_8["dispatches"]
    assert in_replicas["dispatches"] < 1.5 * flat_8["dispatches"]


def test_what_the_host_does_for_a_layer() -> None:
    with in_fake_world(0, 8) as call:
        seen: HostTime = call(host_time, SHIPPED, 3968, rounds=1, depths=(6, 8))
    micro_step, plain = seen.micro_step, seen.plain
    print(
        f"host, per layer and micro-step: {micro_step} against {plain}, ratio {seen.ratio:.1f}; rest of update: {seen.update}"
    )
    # Bounds are on counts, because a bound on time would fail on a busy machine. Current: 8,800 calls, 470 operators, 3,300
    # calls.
    assert micro_step.calls < 10_000
    assert micro_step.dispatches < 540
    assert seen.update.calls < 4_000


def grown(ranks: Ranks, n_updates: int) -> dict[str, Any]:
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    engine = make_engine(ranks, CONFIG, miniature(SHIPPED, CONFIG, LIMITS_OF_WIDTH))
    batches = random_batches(CONFIG, 1)

    def held(n: int) -> tuple[Any, int]:
        for number in range(n):
            engine.update(batches, 1e-4)
            if number % 10 == 0:
                engine.evaluate(batches)
        return alive(), len(FWD_MODULE_STACK)

    before, stack_before = held(12)
    after, stack_after = held(n_updates)
    return {
        "objects": after.grown_since(before),
        "entries": after.entries - before.entries,
        "bytes": after.tensor_bytes - before.tensor_bytes,
        "stack": stack_after - stack_before,
    }


def test_nothing_grows_from_update_to_update() -> None:
    with in_fake_world(3, 8) as call:
        found = call(grown, 50)
    assert found["stack"] == 0
    assert found["bytes"] <= 0
    assert found["entries"] < 25, found
    assert sum(found["objects"].values()) < 25, found["objects"]
