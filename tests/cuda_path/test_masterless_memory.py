"""Memory of one of eight ranks with matrices without master weights: bytes per parameter, temporary memory of an update, and
the sum of both at the width of 12b."""

import gc
import json
from typing import Any

import pytest
import torch

from dalle_ds.bench.fake_cuda.engine import engine_peaks
from dalle_ds.bench.fake_cuda.stub import stub_problem
from dalle_ds.bench.fake_world.one_rank import in_fake_world, make_engine, miniature, random_batches
from dalle_ds.bench.harness.memory import PeakMemory, in_fresh_process
from dalle_ds.models.presets import PRESETS
from dalle_ds.models.prior import PriorConfig
from dalle_ds.planning.memory import memory
from tests.planning.test_memory import without_masters
from tests.support.launching import ROOT

SMALL_MEMORY = json.loads((ROOT / "ds_configs" / "zero3_fp16_16gb.json").read_text())
CONFIG = {"n_heads": 4, "d_head": 32, "text_len": 8, "grid": 4, "vocab_size": 64, "n_codes": 32, "conv_kernel": 3}
D, N_RANKS, N_SLOTS = 128, 8, 24
MATRICES, VECTORS = 12 * D**2, 13 * D
"""Number of parameters of a layer."""


def held_and_worked_on(ranks: Any, n_layers: int) -> tuple[int, int]:
    """Returns the bytes of all tensors between two updates, and the peak above them during an update."""
    config = PriorConfig(n_layers=n_layers, **CONFIG)
    engine = make_engine(ranks, config, miniature(SMALL_MEMORY, config, 3968), moments="low_bit", master="none")
    batches = random_batches(config, 1)
    for _ in range(2):
        engine.update(batches, 1e-4)
    gc.collect()
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) in KINDS}
    with PeakMemory() as peak:
        engine.update(batches, 1e-4)
    return sum(storages.values()), peak.peak_bytes


KINDS = (torch.Tensor, torch.nn.Parameter)


@pytest.fixture(scope="module")
def fewer_and_more() -> list[tuple[int, int]]:
    found = []
    for n_layers in (4, 8):
        with in_fake_world(0, N_RANKS) as call:
            found.append(call(held_and_worked_on, n_layers))
    return found


def test_a_matrix_takes_eight_bytes_a_parameter_and_all_else_sixteen(fewer_and_more: list[tuple[int, int]]) -> None:
    (fewer, _), (more, _) = fewer_and_more
    vectors = VECTORS * (16 / N_RANKS + 4)  # vectors are also resident in fp32
    assert (more - fewer) / 4 == pytest.approx(8 * MATRICES / N_RANKS + vectors, rel=0.02)


def test_an_update_works_on_two_layers_at_a_time_however_many_there_are(fewer_and_more: list[tuple[int, int]]) -> None:
    (_, fewer), (_, more) = fewer_and_more
    assert more - fewer <= 1.05 * 4 * 4 * N_SLOTS * D, "only the layers' inputs"
    two_layers, largest = 2 * 2 * MATRICES, 4 * 4 * D**2
    assert fewer < two_layers + 3 * largest + 4 * 4 * N_SLOTS * D + UNEMBEDDINGS


UNEMBEDDINGS = 3 * 4 * D * (CONFIG["vocab_size"] + CONFIG["n_codes"])


def test_the_papers_replica_of_8_as_it_is_planned() -> None:
    """At the width of 12b, with PowerSGD between replicas, on fake CUDA. Depths 1 and 3 are extrapolated to 64 layers."""
    if problem := stub_problem():
        pytest.skip(f"fake CUDA: {problem}")
    settings = {"n_replicas": 2, "compression": "power_sgd", "moments": "low_bit", "master": "none"}
    fewer, more = in_fresh_process(engine_peaks, (1, 3), 62, SMALL_MEMORY, 2 * N_RANKS, **settings)
    peak = fewer + 63 * (more - fewer) / 2
    assert peak <= 14.5 * 2**30
    assert memory(PRESETS["12b"], without_masters(2)).total == pytest.approx(peak, rel=0.03)
