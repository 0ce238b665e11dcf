"""Iterate averaging of named tensors."""

import torch

from dalle_ds.optim.weight_average import WeightAverage, WeightAverageConfig


def test_average_follows_the_decay_and_forgets_its_start() -> None:
    weights = {"w": torch.zeros(3)}
    average = WeightAverage(weights, WeightAverageConfig(decay=0.5))
    weights["w"] += 1
    average.copy(weights)
    # the first copy counts (1 + 1) / (10 + 1) against the initial weights
    torch.testing.assert_close(average.averages["w"], torch.full((3,), 1 - 2 / 11))
    for _ in range(200):
        average.copy(weights)
    torch.testing.assert_close(average.averages["w"], torch.ones(3))


def test_long_runs_use_the_decay_asked_for() -> None:
    weights = {"w": torch.zeros(1)}
    average = WeightAverage(weights, WeightAverageConfig(decay=0.9))
    for _ in range(500):
        average.copy(weights)
    weights["w"] += 1
    average.copy(weights)
    torch.testing.assert_close(average.averages["w"], torch.tensor([0.1]))


def test_exchange_is_exact_and_announced() -> None:
    weights = {"w": torch.randn(5)}
    average = WeightAverage({"w": torch.arange(5.0)}, WeightAverageConfig())
    before, calls = weights["w"].clone(), []
    with average.in_place_of(weights, lambda: calls.append(weights["w"].clone())):
        assert torch.equal(weights["w"], torch.arange(5.0))
    assert torch.equal(weights["w"], before)
    assert [torch.equal(seen, expected) for seen, expected in zip(calls, (torch.arange(5.0), before), strict=True)] == [
        True,
        True,
    ]
