"""Estimated time of the prior's updates: against an earlier estimate, and the effect of each setting."""

from dataclasses import replace

import pytest

from dalle_ds.models.presets import PRESETS
from dalle_ds.planning.arithmetic import forward_flops
from dalle_ds.planning.counts import NOW
from dalle_ds.planning.prior_work import exchanged_bytes, prior_workload, recomputed_share
from dalle_ds.planning.settings import PlanInputsConfig
from dalle_ds.planning.timing import times

BEFORE = replace(
    NOW,
    element_bytes=411,
    recomputed_bytes=130,
    weight_bytes=40,
    gather_bytes=24,
    alone_bytes=0,
    reduce_bytes=32,
    collectives=23,
    host_ms=10.5,
    heads="fp32",
    products_a_head_product=1,
)
"""Counts of the CUDA path before the scaling at the edges of residual blocks was fused."""


def on_h100(preset, batch, *, counts=NOW, **settings):
    """Returns (workload, machine)."""
    chosen = PlanInputsConfig(machine="H100", global_batch=batch, **settings)
    return prior_workload(PRESETS[preset], chosen, chosen.build_machine(), counts), chosen.build_machine()


@pytest.mark.parametrize(
    ("preset", "settings", "percent"),
    [
        ("0.3b", {"gpus": 1, "micro_batch": 8, "activation_checkpointing": 2, "batch": 256}, 7),
        ("0.3b", {"gpus": 1, "micro_batch": 32, "activation_checkpointing": 2, "batch": 256}, 17),
        ("1.2b", {"gpus": 1, "micro_batch": 8, "batch": 512}, 23),
        ("1.2b", {"gpus": 1, "micro_batch": 16, "activation_checkpointing": 0, "batch": 512}, 31),
        ("2.8b", {"gpus": 8, "micro_batch": 1, "batch": 512}, 3),
        ("2.8b", {"gpus": 8, "micro_batch": 4, "batch": 512}, 12),
        ("2.8b", {"gpus": 8, "micro_batch": 8, "batch": 512}, 23),
        ("12b", {"gpus": 64, "micro_batch": 1, "batch": 1024}, 13),
        ("12b", {"gpus": 64, "micro_batch": 4, "batch": 1024}, 26),
        ("12b", {"gpus": 64, "micro_batch": 16, "batch": 1024}, 31),
        ("12b", {"gpus": 1024, "batch": 1024}, 2),
        ("12b", {"gpus": 1024, "shard_gpus": 8, "compression": "power_sgd", "batch": 1024}, 13),
    ],
)
def test_mfu_of_an_earlier_estimate_by_other_arithmetic(preset, settings, percent):
    """Estimates for the code before the edges were fused, from the same counts. The current code is faster in every row."""
    workload, machine = on_h100(preset, counts=BEFORE, **settings)
    assert 100 * workload.mfu(machine) == pytest.approx(percent, rel=0.3)
    better, _ = on_h100(preset, **settings)
    assert better.mfu(machine) > workload.mfu(machine)
    assert better.useful_flops == workload.useful_flops


def test_what_binds():
    small, machine = on_h100("0.3b", 256, gpus=1)
    assert times(small.micro_step, machine).binds == "host", "Python takes as long for one sample as for many"
    large, _ = on_h100("0.3b", 256, gpus=1, micro_batch=32)
    assert times(large.micro_step, machine).binds == "compute"
    assert times(large.micro_step, machine).host == times(small.micro_step, machine).host
    paper = PlanInputsConfig(machine="V100", shard_gpus=32)
    slow = prior_workload(PRESETS["12b"], paper, paper.build_machine())
    # 98 GB, of which three quarters enter each of four nodes, at 100 Gb/s
    found = times(slow.micro_step, paper.build_machine())
    assert found.binds == "links between nodes" and found.between > 98e9 * 3 / 4 / 12.5e9
    inside = paper.model_copy(update={"shard_gpus": 8})
    assert times(prior_workload(PRESETS["12b"], inside, paper.build_machine()).micro_step, paper.build_machine()).between == 0
    by_pcie = PlanInputsConfig(machine="A100-40", gpus=8, global_batch=8, pcie=True)
    found = times(prior_workload(PRESETS["2.8b"], by_pcie, by_pcie.build_machine()).micro_step, by_pcie.build_machine())
    assert found.binds == "links inside nodes"


def test_sharding_over_many_gpus_costs_the_host():
    flat, machine = on_h100("12b", 1024, gpus=1024)
    replicas, _ = on_h100("12b", 1024, gpus=1024, shard_gpus=8)
    assert times(flat.micro_step, machine).host > 4.5 > 10 * times(replicas.micro_step, machine).host
    given, _ = on_h100("12b", 1024, gpus=8, host_ms_per_layer=2.0, micro_batch=1)
    assert times(given.micro_step, machine).host == pytest.approx((64 + 2) * 2e-3)


def test_exchange_between_replicas():
    """Computed by hand: PowerSGD sends 14.1 % of the matrices' values in 2 bytes instead of 4, and the rest uncompressed."""
    config, plain = PRESETS["12b"], PlanInputsConfig(gpus=64, shard_gpus=8)
    power_sgd = plain.model_copy(update={"compression": "power_sgd"})
    matrices, rest = 12 * 3968**2 * 64, 197_361_152 + 3_301_376
    assert exchanged_bytes(config, plain) == pytest.approx(4 * (matrices + rest) / 8)
    assert exchanged_bytes(config, power_sgd) == pytest.approx((0.141 * 2 * matrices + 4 * rest) / 8, rel=0.01)
    slow_network = {"gpus": 64, "shard_gpus": 8, "node_gbps": 100.0, "batch": 1024}
    ends = {}
    for compression in ("none", "power_sgd"):
        workload, machine = on_h100("12b", compression=compression, **slow_network)
        ends[compression] = times(workload.closing, machine).one_after_the_other
    assert ends["none"] > 5 * ends["power_sgd"]


def test_recomputation_costs_a_forward_pass_without_its_last_product():
    assert [recomputed_share(PRESETS["tiny"], every) for every in (0, 1, 2, 3, 4)] == [0, 1, 0.5, 0.5, 0.25]
    none, _ = on_h100("1.2b", 512, gpus=8, micro_batch=8, activation_checkpointing=0)
    every, _ = on_h100("1.2b", 512, gpus=8, micro_batch=8)

    def layer_flops(workload):
        return sum(product.flops for product in workload.micro_step.products[:12])

    config = PRESETS["1.2b"]
    forward = 2.0 * 12 * config.d_model**2 * config.n_layers * config.n_slots * 8
    assert layer_flops(none) == pytest.approx(3 * forward) and layer_flops(every) == pytest.approx((3 + 8 / 12) * forward)
    assert every.useful_flops == none.useful_flops == pytest.approx(3 * forward_flops(config) * 64)
