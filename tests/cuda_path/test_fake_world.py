"""The real engine as one rank of jobs of 8, 256 and 1,024: what is sent, what is held, what the host does."""

import json
from typing import Any

import pytest

from dalle_ds.bench.counting import Sent
from dalle_ds.bench.fake_world import in_fake_world, make_engine, miniature, random_batches
from dalle_ds.bench.host_time import HOST_CONFIG
from dalle_ds.models.prior import PriorConfig
from tests.launching import ROOT

SHIPPED = json.loads((ROOT / "ds_configs" / "zero3_fp16.json").read_text())
D = HOST_CONFIG["n_heads"] * HOST_CONFIG["d_head"]


def sent_by_an_update(ranks: Any, n_layers: int) -> dict[tuple[str, str, int], tuple[int, int]]:
    """(collective, dtype, size of its group) -> (calls, bytes)."""
    config = PriorConfig(n_layers=n_layers, **HOST_CONFIG)
    engine = make_engine(ranks, config, miniature(SHIPPED, config, 3968))
    batches = random_batches(config, 1)
    for _ in range(2):  # in the first, ZeRO-3 learns the order of modules
        engine.update(batches, 1e-4)
    with Sent() as sent:
        engine.update(batches, 1e-4)
    return {key: (entry.calls, entry.bytes) for key, entry in sent.traffic.items()}


@pytest.mark.parametrize(("rank", "world_size"), [(0, 8)])
def test_a_layer_is_gathered_twice_in_fp16_and_reduced_once_in_fp32(rank: int, world_size: int) -> None:
    with in_fake_world(rank, world_size) as call:
        fewer, more = (call(sent_by_an_update, n_layers) for n_layers in (8, 12))

    def a_layer(collective: str, dtype: str) -> float:
        return (more[collective, dtype, world_size][1] - fewer[collective, dtype, world_size][1]) / 4

    matrices, vectors = 12 * D**2, 13 * D
    assert a_layer("all_gather", "float16") == (2 + 2) * matrices
    assert a_layer("reduce_scatter", "float32") == 4 * (matrices + vectors)
