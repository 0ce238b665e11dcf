"""Measure the memory that a rank of a small engine allocates. Results are written as JSON to the given folder."""

import json
import sys
from pathlib import Path

import torch

from dalle_ds.bench.harness.memory import peak_bytes
from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import PriorConfig
from dalle_ds.optim.build import OptimizerSettings
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.parallel.engine import PriorEngine
from dalle_ds.parallel.engine_config import load_engine_config
from dalle_ds.parallel.ranks import join, leave

CONFIG = PriorConfig(n_layers=4, n_heads=4, vocab_size=2048, n_codes=2048)
MICRO_BATCH, BUCKET, LIVE = 1, 500_000, 1_000_000


def main(folder: Path) -> None:
    ranks = join()
    path = folder / f"ds-{ranks.rank}.json"
    zero = {
        "stage": 3,
        "reduce_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET // 2,
        "stage3_param_persistence_threshold": 1000,
        "stage3_max_live_parameters": LIVE,
        "stage3_max_reuse_distance": LIVE,
    }
    path.write_text(json.dumps({"zero_optimization": zero, "fp16": {"enabled": True, "loss_scale": "per_resblock"}}))
    engine_config = load_engine_config(path, micro_batch=MICRO_BATCH, accumulation=1, clip=4.0)
    engine = PriorEngine(CONFIG, engine_config, OptimizerSettings(1e-4, (0.9, 0.96), 1e-8, 0.045), ranks, seed=0)
    use_attention(engine.module, "structured", ranks.device)
    recompute_layers(engine.module)
    text_BT, image_BN = torch.zeros(MICRO_BATCH, 255, dtype=torch.int64), torch.zeros(MICRO_BATCH, 1024, dtype=torch.int64)
    engine.update([(text_BT, image_BN)], lr=1e-4)
    peak = min(peak_bytes(lambda: engine.update([(text_BT, image_BN)], lr=1e-4), ranks.device) for _ in range(2))
    zero_optimizer = engine._engine.optimizer
    n_parameters = sum(parameter.ds_numel for parameter in engine.module.parameters())
    real = {
        "parameters": _bytes(engine.shards().values()),
        "gradients": _bytes([zero_optimizer.grad_partitions_flat_buffer]),
        "optimizer": engine.optimizer_bytes_per_parameter() * n_parameters / ranks.world_size,
        "peak": peak,
    }
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(real))
    leave()


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
