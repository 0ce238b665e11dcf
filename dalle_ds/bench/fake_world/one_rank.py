"""One rank of a job of any size in one process: the real engine under the real DeepSpeed, on torch's fake process group.

Messages go nowhere: a gather repeats this rank's shard, a reduction takes other ranks' gradients as zero, a sum of counts
and losses takes the same values for every rank. Losses and norms are therefore meaningless. Messages, sizes of shards and
buffers, host work and memory growth are those of a job of that size, on GPUs too, because they depend on no values.

    with in_fake_world(0, 1024) as call:            # a child process, rank 0 of 1,024
        found = call(some_importable_function, 3)   # some_importable_function(ranks, 3), in that child
"""

import contextlib
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import PriorConfig
from dalle_ds.ops import products
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.parallel.ranks import Ranks, join

GPUS_PER_NODE = 8

ONLY_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Environment of the child processes: DeepSpeed chooses its accelerator at import, torch its number of threads."""

PRELOADED = [__name__, "dalle_ds.parallel.engine", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"]
"""Modules that the child processes need. The first engine and its optimizer would import the last two, which takes seconds."""


@contextlib.contextmanager
def in_fake_world(rank: int, world_size: int) -> Iterator[Callable[..., Any]]:
    """Start a child process as rank `rank` of `world_size`. Yields a function that calls an importable function in the child,
    with the child's `Ranks` as first argument.

    DeepSpeed keeps its groups and hooks in module globals, so a process can be one rank of one world only. Child processes are
    forked from a server that has imported torch and DeepSpeed once.

    Raises:
        ValueError: `rank` is not a rank of `world_size`.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}, expected 0 to {world_size - 1}")
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _environment({**ONLY_CPU, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        forkserver.ensure_running()
    with ProcessPoolExecutor(1, mp_context=context, initializer=_join, initargs=(rank, world_size)) as pool:
        yield lambda work, *args, **kwargs: pool.submit(_call, work, args, kwargs).result()


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class _EqualRanks(Ranks):
    """Ranks that all have this rank's batch. If losses were divided by one rank's counts, fp16 gradients would overflow."""

    def sum(self, tensor: Tensor) -> Tensor:
        return super().sum(tensor).mul_(self.world_size)


_ranks: Ranks | None = None


def _join(rank: int, world_size: int) -> None:
    global _ranks
    local_size = min(GPUS_PER_NODE, world_size)
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % local_size, "LOCAL_SIZE": local_size}
    os.environ.update(ONLY_CPU)  # other code may have started the fork server, with another environment
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    products.onednn_is_faster = lambda: False  # count the operators that GPUs run
    gc.freeze()  # imports of the server stay alive: garbage collections and counts of live objects can skip them
    joined = join_alone(rank, world_size)
    _ranks = _EqualRanks(joined.rank, joined.world_size, joined.device)


def join_alone(rank: int, world_size: int) -> Ranks:
    """Join torch's fake process group as rank `rank`. The group sends nothing and takes this rank's data for the others'."""
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
    from deepspeed.utils import logger
    from torch.testing._internal.distributed.fake_pg import FakeStore

    logger.disabled = True
    # these modules compare integers with those of rank 0, which doesn't exist
    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        module.assert_ints_same_as_other_ranks = lambda ints: None
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return join()  # uses the existing process group


def _call(work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return work(_ranks, *args, **kwargs)


# ---- the engine ---------------------------------------------------------------------------------------------------------


def miniature(deepspeed_json: Mapping[str, Any], config: PriorConfig, d_model: int) -> dict[str, Any]:
    """Returns `deepspeed_json` with buckets and limits scaled down from layers of width `d_model` to those of `config`.

    The same matrices are then gathered and reduced together, the same number of layers stays gathered, and all vectors but no
    matrix of a branch stay resident. DeepSpeed always fills `stage3_max_live_parameters`, which is 5.3 layers of the largest
    model and 20 of width 2,048: only the layers of a deeper model are gathered twice.
    """
    ratio = (config.d_model / d_model) ** 2
    zero = dict(deepspeed_json["zero_optimization"])
    defaults = {
        "reduce_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
    }
    real = {key: zero.get(key, default) for key, default in defaults.items()}
    zero |= {key: max(1, int(size * ratio)) for key, size in real.items()}
    if real["reduce_bucket_size"] < d_model**2:  # no matrix fits into the bucket; vectors share messages
        zero["reduce_bucket_size"] = config.d_model**2 - 1
    zero["stage3_param_persistence_threshold"] = 8 * config.d_model
    return {**deepspeed_json, "zero_optimization": zero}


def make_engine(
    ranks: Ranks,
    config: PriorConfig,
    deepspeed_json: Mapping[str, Any],
    *,
    micro_batch: int = 1,
    accumulation: int = 1,
    n_replicas: int = 1,
    compression: str = "none",
    recompute_every: int = 1,
    moments: str = "fp32",
    master: str = "fp32",
) -> Any:
    """Returns this rank's `PriorEngine` with dense attention and small random weights in its shards: rank 0, which would send
    the initial weights, doesn't exist. `recompute_every` sets activation checkpointing as in a run (0: none)."""
    # imported here, in the child process: in a process that sees GPUs, DeepSpeed would choose another accelerator
    from dalle_ds.optim.build import OptimizerSettings
    from dalle_ds.parallel.engine import PriorEngine
    from dalle_ds.parallel.engine_config import load_engine_config
    from dalle_ds.parallel.replicas.groups import ReplicasConfig
    from dalle_ds.parallel.zero_shards import fragments

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "deepspeed.json")
        path.write_text(json.dumps(deepspeed_json), encoding="utf-8")
        engine_config = load_engine_config(path, micro_batch=micro_batch, accumulation=accumulation, clip=4.0)
    optimizer = OptimizerSettings(1e-4, (0.9, 0.96), 1e-8, 0.045, moments, master)
    replicas = ReplicasConfig(count=n_replicas, compression=compression) if n_replicas > 1 else None
    engine = PriorEngine(config, engine_config, optimizer, ranks, seed=0, replicas=replicas)
    use_attention(engine.module, "dense", ranks.device)
    if recompute_every:
        recompute_layers(engine.module, recompute_every)
    shards = engine.shards()
    for fragment in fragments(engine._engine, engine._other_fragments()):
        shards[fragment.name].copy_(fragment.values.normal_(0.0, 0.02))
    engine.refresh_gathered_parameters()
    return engine


def random_batches(config: PriorConfig, micro_batch: int, accumulation: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Returns the random (text, image) micro-batches of one update."""
    return [
        (
            torch.randint(config.vocab_size, (micro_batch, config.text_len - 1)),
            torch.randint(config.n_codes, (micro_batch, config.n_image)),
        )
        for _ in range(accumulation)
    ]
