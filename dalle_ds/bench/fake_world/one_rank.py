"""One rank of a job of any size in one process: the real engine under the real DeepSpeed, on torch's fake process group.

Its messages go nowhere: a gather repeats this rank's shard, a reduction sees other ranks' gradients as zero, a sum of counts
and losses sees the same on every rank. Losses and norms therefore mean nothing. What is sent, how large shards and buffers
are, what the host does and what grows is what it would be in a job of that size, on GPUs too: it depends on no values.

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
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.parallel.ranks import Ranks, join

GPUS_PER_NODE = 8

ONLY_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Environment of the children: DeepSpeed chooses its accelerator when it is imported, torch its threads."""

PRELOADED = [__name__, "dalle_ds.parallel.engine", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"]
"""What children would import; the last two come with the first engine and its optimizer, and take seconds."""


@contextlib.contextmanager
def in_fake_world(rank: int, world_size: int) -> Iterator[Callable[..., Any]]:
    """A child process that is rank `rank` of `world_size` -> what calls importable functions there, with its `Ranks` first.

    DeepSpeed keeps its groups and hooks in module globals, so a process can be one rank of one world only. Children are
    forked from a server that has imported torch and DeepSpeed once.
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
    """All have the same batch: with losses divided by this rank's counts alone, fp16 gradients would overflow."""

    def sum(self, tensor: Tensor) -> Tensor:
        return super().sum(tensor).mul_(self.world_size)


_ranks: Ranks | None = None


def _join(rank: int, world_size: int) -> None:
    global _ranks
    local_size = min(GPUS_PER_NODE, world_size)
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % local_size, "LOCAL_SIZE": local_size}
    os.environ.update(ONLY_CPU)  # the server may have been started by somebody else
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported stays: collections need not look at it, nor do counts of live objects
    joined = join_alone(rank, world_size)
    _ranks = _EqualRanks(joined.rank, joined.world_size, joined.device)


def join_alone(rank: int, world_size: int) -> Ranks:
    """Be that rank on torch's fake process group, which sends nothing and takes what it holds for what others sent."""
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
    from deepspeed.utils import logger
    from torch.testing._internal.distributed.fake_pg import FakeStore

    logger.disabled = True
    # these compare with what rank 0 sends, which isn't there
    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        module.assert_ints_same_as_other_ranks = lambda ints: None
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return join()  # which finds that process group


def _call(work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return work(_ranks, *args, **kwargs)


# ---- the engine ---------------------------------------------------------------------------------------------------------


def miniature(deepspeed_json: Mapping[str, Any], config: PriorConfig, d_model: int) -> dict[str, Any]:
    """`deepspeed_json` for the layers of `config`, with buckets and limits as many of them long as they are in a model of width
    `d_model`: the same matrices are gathered and reduced together, as many layers are kept gathered, and all vectors and no
    matrix of a branch stay resident. DeepSpeed always fills `stage3_max_live_parameters`, 5.3 layers of the largest model and
    20 of 2,048: only a deeper one is gathered twice."""
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
    if real["reduce_bucket_size"] < d_model**2:  # no matrix fits; vectors share messages
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
    """A `PriorEngine` of this rank, with dense attention and activation checkpointing as a run sets it (0: none), and small
    random weights in its shards: initial ones would come from rank 0, which isn't there, padding has none."""
    # imported here, in a child: DeepSpeed would choose another accelerator in a process that sees GPUs
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
    """(text, image) micro-batches of one update."""
    return [
        (
            torch.randint(config.vocab_size, (micro_batch, config.text_len - 1)),
            torch.randint(config.n_codes, (micro_batch, config.n_image)),
        )
        for _ in range(accumulation)
    ]
