"""The plan's numbers, compared with the paper's and with independent counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle_ds.models.presets import PRESETS
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.ops import products
from dalle_ds.planning.arithmetic import count_parameters, forward_flops
from dalle_ds.planning.machines import MACHINES
from dalle_ds.planning.settings import PlanInputsConfig
from dalle_ds.recipes import load_recipe
from dalle_ds.training.prior.config import PriorRunConfig
from dalle_ds.training.prior.cost import plan, settings_of
from dalle_ds.training.prior.throughput import PEAK_TFLOPS
from tests.support.launching import ROOT


@pytest.mark.parametrize("preset, billions", [("2.8b", 2.83), ("5.6b", 5.55), ("12b", 12.09)])
def test_parameter_counts_of_the_paper(preset, billions):
    summary = plan(PRESETS[preset], PlanInputsConfig())
    assert summary["n_effective_parameters"] / 1e9 == pytest.approx(billions, abs=0.005 + 0.002)
    assert summary["n_other_parameters"] < 0.001 * summary["n_effective_parameters"]


def test_counts_add_up_to_a_real_model():
    config = PRESETS["tiny"]
    assert sum(count_parameters(config)) == sum(parameter.numel() for parameter in Prior(config).parameters())


def test_arithmetic_is_what_torch_counts(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)  # torch's counter knows its own operators only
    config = PriorConfig(n_layers=4, n_heads=2, d_head=8, text_len=6, grid=4, vocab_size=20, n_codes=16, conv_kernel=3)
    prior = Prior(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prior(torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64))
    # torch's count may include the pairs that the dense mask computes and discards: subtract dense attention if it does
    n = config.n_slots
    dense = config.n_layers * 4 * config.d_model * n * n
    ours_without_attention = forward_flops(config) - sparse_attention(config)
    counted = counter.get_total_flops()
    matrices_only = counted if counted < ours_without_attention + dense / 2 else counted - dense
    assert ours_without_attention == pytest.approx(matrices_only, rel=0.02)
    assert 0 < sparse_attention(config) < dense


def sparse_attention(config):
    from dalle_ds.ops.attention.masks import layer_patterns

    total = 0
    for pattern in layer_patterns(config.n_layers):
        total += sum(4 * config.d_model * int(row.sum()) for row in config.mask(pattern).dense())
    return total


def test_memory_and_time_scale_as_they_must():
    config = PRESETS["12b"]
    one, many = plan(config, PlanInputsConfig(gpus=64, mfu=0.35)), plan(config, PlanInputsConfig(gpus=1024, mfu=0.35))
    assert one["state_gib_per_gpu"] == pytest.approx(16 * one["n_parameters"] / 64 / 2**30)
    assert one["state_gib_per_gpu"] / many["state_gib_per_gpu"] == pytest.approx(16)
    assert one["days_estimate"] / many["days_estimate"] == pytest.approx(16)
    small = plan(config, PlanInputsConfig(gpus=64, moments="low_bit"))
    saved = (one["state_gib_per_gpu"] - small["state_gib_per_gpu"]) * 64 * 2**30
    assert saved == pytest.approx(4 * one["n_effective_parameters"]), "two bytes less per moment of the layers' matrices"
    assert (one["checkpoint_gib"] - small["checkpoint_gib"]) * 2**30 == pytest.approx(saved)
    assert (
        small["optimizer_bytes_per_parameter"] == pytest.approx(4.065, abs=1e-3) and one["optimizer_bytes_per_parameter"] == 8
    )
    parts = sum(many[f"{part}_gib_per_gpu"] for part in ("parameters", "gradients", "optimizer"))
    assert many["state_gib_per_gpu"] == pytest.approx(parts)
    # by hand: in one micro-batch 2 bytes per parameter twice and 4 bytes once, from the 1023 other GPUs
    assert many["communication_gib_per_gpu_per_update"] * 2**30 == pytest.approx(8 * many["n_parameters"] * 1023 / 1024)
    assert one["communication_gib_per_gpu_per_update"] == pytest.approx(
        16 * many["communication_gib_per_gpu_per_update"], rel=0.02
    )
    nodes = plan(config, PlanInputsConfig(gpus=1024, shard_gpus=8, price=2.0))
    assert nodes["state_gib_per_gpu"] == pytest.approx(128 * many["state_gib_per_gpu"]) and nodes["replicas"] == 128
    assert nodes["cost_estimate"] == pytest.approx(2 * nodes["gpu_hours_estimate"])
    # by hand: 6 * 12.09e9 * 1280 tokens * 1024 * 430,000 / (1024 * 312e12 * 0.35) s = 4.23 days, plus a little for attention
    assert many["days_estimate"] == pytest.approx(4.23, rel=0.03)


def test_whether_a_gpu_is_large_enough():
    config = PRESETS["12b"]
    assert plan(config, PlanInputsConfig(gpu_memory=16))["fits_estimate"]
    assert not plan(config, PlanInputsConfig(gpus=8, gpu_memory=16))["fits_estimate"]
    assert plan(config, PlanInputsConfig())["gpu_memory_gib"] == 80, "the memory of the default machine"


def test_time_is_the_longest_and_mfu_a_result():
    config = PRESETS["12b"]
    summary = plan(config, PlanInputsConfig(gpus=256, machine="H100", shard_gpus=16, micro_batch=4))
    longest = max(
        summary[f"micro_step_{name}_seconds_estimate"]
        for name in ("compute", "links_inside_nodes", "links_between_nodes", "host")
    )
    assert summary["binds"] == "compute" and longest == summary["micro_step_compute_seconds_estimate"]
    seconds = summary["seconds_per_update_estimate"]
    assert seconds == pytest.approx(longest + summary["update_end_seconds_estimate"])
    assert summary["mfu_estimate"] == pytest.approx(summary["flops_per_update"] / (256 * 989e12 * seconds))
    assert "warnings" not in summary
    given = plan(config, PlanInputsConfig(gpus=256, machine="H100", shard_gpus=16, micro_batch=4, mfu=0.5))
    assert given["binds"] == "the MFU given" and given["mfu_estimate"] == 0.5
    assert given["seconds_per_update_estimate"] == pytest.approx(seconds * summary["mfu_estimate"] / 0.5)


def test_warnings():
    config = PRESETS["12b"]

    def warnings(**settings):
        return " ".join(plan(config, PlanInputsConfig(machine="H100", **settings)).get("warnings", []))

    assert "ZeRO-3 over 256 GPUs" in warnings(gpus=256) and not warnings(gpus=64)
    assert "global_batch 1024 is not a multiple of 96 GPUs x micro_batch 1" in warnings(gpus=96, shard_gpus=8)
    assert "shard_gpus 24 does not divide the 64 GPUs" in warnings(gpus=64, shard_gpus=24)
    assert "but a GPU has 14.5 GiB (1.5 GiB are reserved)" in warnings(gpus=8, gpu_memory=16)


def test_a_recipe_says_what_a_plan_needs(tmp_path):
    run = load_recipe(PriorRunConfig, ROOT / "launchers" / "recipes" / "12b.yaml")
    settings = settings_of(run, 256)
    assert (
        settings["shard_gpus"] == 8
        and settings["compression_rank"] == 112
        and settings["activation_checkpointing"] == 0
        and settings["moments"] == "low_bit"
    )
    assert settings["compression"] == "power_sgd" and settings["updates"] == 430_000
    json_file = tmp_path / "ds.json"
    json_file.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "sub_group_size": 1e8}}')
    run = load_recipe(
        PriorRunConfig, overrides=["folder=f", "data.dataset=d", f"deepspeed_config={json_file}", "activation_checkpointing=4"]
    )
    settings = settings_of(run, 8)
    assert (settings["bucket"], settings["sub_group"], settings["activation_checkpointing"]) == (
        7,
        100_000_000,
        4,
    ) and "live" not in settings
    assert PlanInputsConfig(**settings).shards == 8


def test_peaks_are_those_of_the_dashboards():
    for name, peak in PEAK_TFLOPS.items():
        for machine, known in MACHINES.items():
            if machine.split("-")[0] == name:
                assert known.tflops == peak, name
