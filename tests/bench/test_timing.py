"""Timing in turns, with a simulated clock that the timed functions advance."""

import time

import pytest
import torch

from dalle_ds.bench.harness.report import Report, mixed
from dalle_ds.bench.harness.timing import Comparison, Ratio, clock_for, take_turns


class Workshop:
    """Named functions of known durations. `log` has the order of their calls."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def work(self, name, *seconds):
        lengths = iter(seconds)

        def run():
            self.log.append(name)
            self.now += next(lengths)

        return run

    def clock(self):
        return self.now


def test_every_variant_runs_between_two_baselines():
    shop = Workshop()
    variants = {name: shop.work(name, *[1.0] * 9) for name in ("dense", "ours", "causal")}
    take_turns(variants, "dense", 2, shop.clock)
    assert shop.log[:3] == ["dense", "ours", "causal"]  # warm-up
    assert shop.log[3:] == ["dense", "ours", "dense", "causal", "dense", "ours", "dense", "causal", "dense"]


def test_ratio_is_the_mean_of_the_neighbouring_baselines_over_the_variant():
    shop = Workshop()
    # the first numbers are the warm-up, which is not counted
    variants = {"dense": shop.work("dense", 100, 2, 4, 8, 16), "ours": shop.work("ours", 900, 1, 2, 24)}
    turns = take_turns(variants, "dense", 3, shop.clock)
    assert turns.runs == {"dense": [2, 4, 8, 16], "ours": [1, 2, 24]}
    assert turns.rounds["ours"] == [(2 + 4) / 2 / 1, (4 + 8) / 2 / 2, (8 + 16) / 2 / 24]
    assert turns.ratio("ours", "dense") == Ratio(median=3.0, low=0.5, high=3.0)
    assert turns.seconds("dense") == 6 and turns.seconds("ours") == 2


def test_drift_of_the_machine_cancels():
    shop = Workshop()
    slower = [1.0, 1.1, 1.3, 1.5, 1.7, 1.9, 2.1]  # a steady drift, baseline and variant alternating
    variants = {"dense": shop.work("dense", *slower[1::2]), "ours": shop.work("ours", *(s / 4 for s in slower[2::2]))}
    turns = take_turns(variants, "dense", 2, shop.clock, warm_up=False)
    assert turns.ratio("ours", "dense").median == pytest.approx(4.0)


def test_two_variants_are_compared_round_by_round():
    turns = Comparison("dense", {}, {"ours": [2.0, 3.0, 10.0], "causal": [1.0, 2.0, 2.0]})
    assert turns.ratio("ours", "causal") == Ratio(2.0, 1.5, 5.0)
    assert turns.ratio("dense", "ours") == Ratio(1 / 3, 0.1, 0.5)


@pytest.mark.parametrize("names, baseline, rounds", [("a", "a", 1), ("ab", "c", 1), ("ab", "a", 0)])
def test_nothing_to_compare(names, baseline, rounds):
    with pytest.raises(ValueError, match="expected the baseline and others"):
        take_turns(dict.fromkeys(names, print), baseline, rounds, time.monotonic)


def test_mix_weighs_patterns_by_their_layers():
    seen = {
        "row": Comparison("dense", {"dense": [3.0], "ours": [1.0]}, {"ours": [3.0]}),
        "conv": Comparison("dense", {"dense": [4.0], "ours": [5.0]}, {"ours": [0.5, 1.0, 2.0]}),
    }
    ours, dense, ratio = mixed({"row": 3, "conv": 1}, seen, "dense")
    assert (ours, dense) == ((3 * 1.0 + 5.0) / 4, (3 * 3.0 + 4.0) / 4)
    assert ratio.median == pytest.approx(13 / 7) and ratio.low == pytest.approx(13 / 11) and ratio.high == pytest.approx(13 / 5)


def test_clock_is_cpu_time_at_one_thread_only():
    cpu = torch.device("cpu")
    assert clock_for(cpu, 1) is time.process_time and clock_for(cpu, 2) is time.perf_counter


def test_report(capsys):
    report = Report("step", "an abacus").note(n_layers=2)
    report.add("step", "dense", 0.5, 2.0, Ratio(4.0, 3.0, 5.0))
    assert report.summary() == {
        "bench": "step",
        "device": "an abacus",
        "ratios": {"step_vs_dense": 4.0},
        "seconds": {"step_ours": 0.5, "step_dense": 2.0},
        "spread": {"step_vs_dense": [3.0, 5.0]},
        "n_layers": 2,
    }
    report.print_table(to_stderr=True)
    out, err = capsys.readouterr()
    assert out == "" and "500.00 ms" in err and "4.00  (3.00 to 5.00)" in err
