"""Rates and time fractions, measured with a simulated clock."""

import pytest

from dalle_ds.models.prior import PriorConfig
from dalle_ds.planning.arithmetic import forward_flops
from dalle_ds.training.prior.throughput import Throughput

CONFIG = PriorConfig(n_layers=2, n_heads=1, d_head=8, text_len=6, grid=4, vocab_size=20, n_codes=16, conv_kernel=3)


def test_rates_and_shares_of_each_stretch() -> None:
    now = [100.0]
    throughput = Throughput(CONFIG, 8, peak_tflops=1e-6, clock=lambda: now[0])
    for _ in range(3):
        throughput.add()
        now[0] += 2.0
    values = throughput.metrics({"forward": 1.5, "backward": 3.0, "step": 0.6}, waited_seconds=0.3)
    assert values["speed/samples_per_second"] == pytest.approx(4.0)
    assert values["speed/tokens_per_second"] == pytest.approx(4.0 * CONFIG.n_slots)
    assert values["speed/model_tflops"] == pytest.approx(4.0 * 3 * forward_flops(CONFIG) / 1e12)
    assert values["speed/mfu"] == pytest.approx(values["speed/model_tflops"] / 1e-6)
    shares = {name.removeprefix("time_share/"): value for name, value in values.items() if name.startswith("time_share/")}
    assert shares == pytest.approx({"data_wait": 0.05, "forward": 0.25, "backward": 0.5, "step": 0.1, "other": 0.1})
    throughput.add()
    now[0] += 4.0
    values = throughput.metrics({"forward": 1.0}, waited_seconds=0.7)
    assert values["speed/samples_per_second"] == pytest.approx(2.0), "only since the previous call"
    assert values["time_share/data_wait"] == pytest.approx(0.1)


def test_no_mfu_without_a_peak() -> None:
    throughput = Throughput(CONFIG, 8, peak_tflops=None)
    throughput.add()
    assert "speed/mfu" not in throughput.metrics({}, 0.0)
