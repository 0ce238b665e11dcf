"""The EMA equals its formula, with plain and warm start. Evaluating with it does not change the weights."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dalle_ds.optim.ema import EMA, EMAConfig


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value)}


def test_plain_average_follows_the_formula() -> None:
    average = EMA(weights(1.0), EMAConfig(decay=0.9))
    expected = 1.0
    for value in (2.0, -3.0, 5.0):
        average.update(weights(value))
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(average.averages["w"], torch.full((2,), expected))


def test_background_gives_the_same_bits_of_the_weights_at_the_call() -> None:
    generator = torch.Generator().manual_seed(0)
    moving = {"w": torch.randn(100_000, generator=generator)}
    sides = [EMA(moving, EMAConfig(decay=0.9), "cpu", background=background) for background in (False, True)]
    for _ in range(20):
        moving["w"].normal_(generator=generator)
        for average in sides:
            average.update(moving)
        moving["w"].zero_()  # training continues while the thread averages
    assert torch.equal(sides[0].averages["w"], sides[1].averages["w"])


def test_warm_start_forgets_the_initial_weights() -> None:
    plain, warm = (EMA(weights(100.0), EMAConfig(start=start)) for start in ("plain", "warm"))
    for _ in range(50):
        plain.update(weights(1.0))
        warm.update(weights(1.0))
    assert plain.averages["w"][0] > 90
    assert warm.averages["w"][0] == pytest.approx(1.0, abs=1e-3)


def test_a_long_run_reaches_the_decay_asked_for() -> None:
    average = EMA(weights(0.0), EMAConfig(decay=0.9, start="warm"))
    for _ in range(500):
        average.update(weights(0.0))
    average.update(weights(1.0))
    torch.testing.assert_close(average.averages["w"], torch.full((2,), 0.1))


def test_exchange_is_exact_announced_and_undone_after_an_error() -> None:
    own, seen = weights(3.3), []
    average = EMA(weights(1.0), EMAConfig())
    with pytest.raises(RuntimeError, match="inside"), average.in_place_of(own, lambda: seen.append(own["w"][0].item())):
        assert own["w"][0] == 1.0
        raise RuntimeError("inside")
    assert torch.equal(own["w"], weights(3.3)["w"])
    assert seen == [1.0, own["w"][0].item()]


def test_half_precision_weights_are_averaged_in_fp32() -> None:
    average = EMA({"w": torch.ones(1, dtype=torch.bfloat16)}, EMAConfig(decay=0.999))
    average.update({"w": torch.zeros(1, dtype=torch.bfloat16)})
    assert average.averages["w"].item() == pytest.approx(0.999)


def test_state_goes_round_and_another_models_is_refused() -> None:
    average = EMA(weights(1.0), EMAConfig(start="warm"))
    average.update(weights(4.0))
    other = EMA(weights(0.0), EMAConfig(start="warm"))
    other.load_state_dict(average.state_dict())
    assert other.n_updates == 1
    assert torch.equal(other.averages["w"], average.averages["w"])
    with pytest.raises(ValueError, match="belongs to another model"):
        EMA({"v": torch.ones(2)}, EMAConfig()).load_state_dict(average.state_dict())


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"start": "cold"}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        EMAConfig(**settings)
