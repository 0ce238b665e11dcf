"""Compares `dalle-ds plan` with the memory that two ranks of a small engine allocate."""

import json
from pathlib import Path

import pytest

from dalle_ds.training.prior.cost import PlanInputsConfig, plan
from tests.distributed.cases.memory import BUCKET, CONFIG, LIVE, MICRO_BATCH
from tests.support import launching

pytestmark = pytest.mark.launch

# large allocations are returned to the system when freed, so resident memory is the memory in use
RETURN_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "262144"}


def test_memory_of_a_rank(tmp_path: Path) -> None:
    case = Path(__file__).parent / "cases" / "memory.py"
    launching.run_ranks(2, case, str(tmp_path), cwd=launching.ROOT, extra_env=RETURN_MEMORY)
    settings = PlanInputsConfig(gpus=2, micro_batch=MICRO_BATCH, global_batch=2 * MICRO_BATCH, bucket=BUCKET, live=LIVE)
    planned = {name: gib * 2**30 for name, gib in plan(CONFIG, settings).items() if "gib" in name}
    for rank in (0, 1):
        real = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for name in ("parameters", "gradients", "optimizer"):
            assert real[name] == pytest.approx(planned[f"{name}_gib_per_gpu"], rel=1e-3), "ZeRO pads to whole shards"
        beside_state = planned["memory_gib_per_gpu_estimate"] - planned["state_gib_per_gpu"]
        # CPUs compute fp16 products with fp32 copies, which are not in the plan for a GPU
        assert 0.7 < real["peak"] / beside_state < 1.5, f"{real['peak'] / 2**20:.0f} MiB, planned {beside_state / 2**20:.0f}"
