"""The CUDA path on a machine without CUDA: devices, generators and dtypes are correct, the host waits only in known places, and
GPU work stays within bounds. `dalle-ds bench cuda-path` prints the same counts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dalle_ds.bench import cuda_path
from dalle_ds.bench.cuda_path import CudaPath
from dalle_ds.bench.fake_cuda.engine import EngineCounts
from dalle_ds.bench.fake_cuda.stub import stub_problem
from dalle_ds.bench.harness.settings import CudaPathBenchConfig
from tests.cuda_path.cases import lint as lint_cases
from tests.support.fake_cuda import fake_cuda_process
from tests.support.launching import ROOT

ZERO3 = "deepspeed/runtime/zero/stage3.py DeepSpeedZeroOptimizer_Stage3"


@pytest.fixture(scope="module")
def call() -> Iterator[Callable[..., Any]]:
    with fake_cuda_process() as call:
        yield call


@pytest.fixture(scope="module")
def bench() -> CudaPath:
    """Counts from a few updates of rank 1 of 8 with the shipped DeepSpeed config, at the width of 12b."""
    if problem := stub_problem():
        pytest.skip(f"fake CUDA: {problem}")
    return cuda_path.run(
        CudaPathBenchConfig(n_heads=(62,), rounds=0, deepspeed_config=str(ROOT / "ds_configs" / "zero3_fp16.json"))
    )


@pytest.fixture(scope="module")
def engine(bench: CudaPath) -> EngineCounts:
    return bench.widths[0]


def test_bench_says_what_it_counted(bench: CudaPath, engine: EngineCounts, capsys: pytest.CaptureFixture[str]) -> None:
    bench.print_table(to_stderr=False)
    table, summary = capsys.readouterr().out, json.loads(json.dumps(bench.summary()))
    assert f"d {engine.d_model:>6}" in table and "1 host synchronisations in one micro-step" in table
    assert summary["bench"] == "cuda-path" and summary["widths"]["3968"]["kernels"] == engine.kernels


def test_kernels_of_a_layer_under_the_engine(engine: EngineCounts) -> None:
    """Before operators were fused: 264 (4 of them attention) and 50."""
    assert engine.kernels <= 68
    assert engine.zero_kernels <= 28


def test_bytes_of_a_layer_under_the_engine(engine: EngineCounts) -> None:
    """Before operators were fused: 541 bytes per element and 86 per parameter."""
    assert engine.bytes_per_element <= 220
    assert engine.bytes_per_parameter["all"] <= 30
    assert engine.bytes_per_parameter["cast"] < 0.1  # weights are gathered as fp16 and used without a cast


def test_the_host_waits_once_a_micro_step(engine: EngineCounts) -> None:
    """The wait is for ZeRO-3's reduction. Before, there were eight waits, two of them in DeepSpeed's throughput timer."""
    assert engine.micro_step.sync_places() == {f"stream.synchronize: {ZERO3}.independent_gradient_partition_epilogue": 1}


def test_where_the_host_waits_in_an_update(engine: EngineCounts) -> None:
    """The number of waits doesn't depend on the number of layers. Before, there were 11, and once one per parameter."""
    places = engine.update.sync_places()
    assert sum(places.values()) <= 7, places
    assert places.keys() <= {
        "copy to host: dalle_ds/parallel/agreement.py AgreementSums.read",
        "item: dalle_ds/parallel/engine.py PriorEngine.update",
        "item: deepspeed/runtime/utils.py is_invalid_grad_norm",
        f"copy to device: {ZERO3}.get_grad_norm_direct",
        "synchronize: dalle_ds/parallel/resident_gather.py _gather",
    }


def test_memory_of_a_layer_under_the_engine(engine: EngineCounts) -> None:
    """A shard on 8 ranks takes 16 bytes per parameter, and 4 more during DeepSpeed's step. A sample takes the layer's input."""
    d = engine.d_model
    parameters = 12 * d**2 + 13 * d
    assert engine.layer_bytes <= 1.02 * (20 * parameters / 8 + 4 * engine.n_slots * d)


def test_first_weights_are_drawn_on_the_cpu(call: Callable[..., Any]) -> None:
    assert call(lint_cases.first_weights, 1) == "cuda:0"


def test_prior_of_12b_without_the_engine(call: Callable[..., Any]) -> None:
    found = call(lint_cases.prior_step, n_heads=62, n_samples=1, recomputed=True, low_bit=True)
    assert found["attention"] == "flex" and not found["syncs"]
    assert found["kernels"] <= 82
    assert not found["syncs_optimizer"]


def test_prior_of_1_2b_without_recomputation_fits_8_samples(call: Callable[..., Any]) -> None:
    """Memory per layer: weights and gradients, 384 MiB, and the saved activations of 8 samples."""
    found = call(lint_cases.prior_step, n_heads=32, n_samples=8, recomputed=False, low_bit=False)
    assert found["layer_mib"] <= 960 and not found["syncs"] and not found["syncs_optimizer"]


@pytest.mark.parametrize("in_fp16", [False, True], ids=["fp32", "fp16"])
def test_sampling(in_fp16: bool, call: Callable[..., Any]) -> None:
    """A step can be captured as a CUDA graph, and the host doesn't wait between tokens."""
    found = call(lint_cases.sampling, 62, in_fp16)
    assert not found["syncs_token"] and found["kernels_token"] <= 12
    assert found["kernels_layer"] <= (45 if in_fp16 else 29)
    assert found["syncs"].keys() <= {
        "copy to device: dalle_ds/sampling/generate.py generate",
        "copy to device: dalle_ds/models/prior.py Prior.prefill",
        "item: dalle_ds/sampling/generate.py _recorded",
        "copy to host: dalle_ds/sampling/generate.py generate",
    }


NORM_IS_READ = {"item: dalle_ds/training/skipped_updates.py SkippedUpdates.take_step": 1}
"""An update waits for the norm of its gradients, which decides whether it is skipped."""


def test_dvae(call: Callable[..., Any], tmp_path: Path) -> None:
    found = call(lint_cases.dvae_update, str(tmp_path))
    assert found["device"] == "cuda" and found["gib"] <= 12 and found["gib_validation"] <= 9
    assert found["syncs"] == {
        "item: dalle_ds/training/dvae/trainer.py DVAETrainer._step": 1,  # torch's GradScaler reads the finite flag
        **NORM_IS_READ,
    }


def test_clip(call: Callable[..., Any], tmp_path: Path) -> None:
    found = call(lint_cases.clip_update, str(tmp_path))
    assert found["device"] == "cuda"
    assert found["syncs"] == NORM_IS_READ
