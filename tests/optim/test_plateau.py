"""The learning rate is halved where the loss flattens, measured by the length of the run."""

import json
import math
import random
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from dalle_ds.optim.plateau import Plateau, PlateauConfig

N, WARMUP = 430_000, 5_000
EVERY = 20
"""Updates per simulated loss. Its noise is that of their mean, so that the points of the curve have the noise of a full run."""


def simulated(loss: Callable[[float, float], float], noise: float, seed: int = 0, answers: bool = False) -> list[int]:
    """Halvings of a run of the paper's length.

    Args:
        loss: loss after u thousand updates at full rate, and the rate's factor.
        noise: standard deviation of single losses. Half of the variance of their means is shared by neighbours.
        answers: whether the curve reacts to the rate: half the rate is half as fast, and its loss is lower after 3,000 updates.
    """
    draw = random.Random(seed)
    plateau = Plateau(PlateauConfig(), N // EVERY)
    done, settled, shared = float(WARMUP), 1.0, 0.0
    for update in range(WARMUP // EVERY + 1, N // EVERY + 1):
        done += EVERY * (plateau.factor if answers else 1.0)
        settled += (plateau.factor - settled) * EVERY / 3000
        shared = 0.9 * shared + 0.1 * draw.gauss(0, noise / EVERY**0.5)
        value = loss(done / 1000, settled if answers else 1.0) + shared + draw.gauss(0, noise / EVERY**0.5)
        plateau.observe(update, value)
    return [EVERY * update for update in plateau.state.halvings]


def power_law(exponent: float, floor: float = 3.3, fall: float = 2.2) -> Callable[[float, float], float]:
    return lambda u, rate: floor + fall * u**-exponent + 0.15 * (rate**0.5 - 1)


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("exponent", [0.1, 0.2, 0.3, 0.4])
@pytest.mark.parametrize("answers", [False, True])
def test_a_curve_that_never_stops_falling_is_halved_five_times_until_the_end(
    exponent: float, noise: float, answers: bool
) -> None:
    """The first halving comes when as much lies behind as ahead, and each other one in the second half of what is then left: as
    in a linear decay to zero. The last comes in the last 4 % of the run."""
    for seed in range(2):
        first, *others, last = found = simulated(power_law(exponent), noise, seed, answers)
        assert len(found) == 5
        assert 0.4 * N < first < 0.58 * N, found
        assert 0.96 * N < last < N, found
        for before, after in zip([first, *others], [*others, last], strict=True):
            assert 0.2 <= (after - before) / (N - before) < 0.7, found


def test_scale_and_floor_of_the_loss_do_not_matter() -> None:
    found = [simulated(power_law(0.2, floor, fall), 0.02 * fall) for floor, fall in ((0.0, 2.2), (3.3, 2.2), (33.0, 22.0))]
    assert all(abs(a - b) <= 0.05 * N for other in found[1:] for a, b in zip(found[0], other, strict=True)), found


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_a_loss_that_is_flat_is_not_waited_for(noise: float) -> None:
    first, *_ = simulated(lambda u, rate: 3.3 + 2.2 * min(u, 50.0) ** -0.3, noise)
    assert 50_000 < first < 0.25 * N


def test_a_loss_that_keeps_its_slope_is_not_taken_for_flat() -> None:
    first, *_ = simulated(lambda u, rate: 8 - u / 100, 0.03)
    assert first > 0.5 * N


def test_a_loss_that_rises_is_halved() -> None:
    first, *_ = simulated(lambda u, rate: 3 + u / 500, 0.03)
    assert first < 0.25 * N


def run(plateau: Plateau, losses: list[float], start: int = 0) -> None:
    for update, loss in enumerate(losses[start:], start=start + 1):
        plateau.observe(update, loss)


def noisy(n: int) -> list[float]:
    return [8 * (1 + update) ** -0.2 + random.Random(update).gauss(0, 0.02) for update in range(n)]


def test_short_runs_have_as_many_points() -> None:
    plateau = Plateau(PlateauConfig(points=100), 800)
    run(plateau, noisy(800))
    assert len(plateau.state.halvings) == 5 and all(update % 8 == 0 for update in plateau.state.halvings)
    assert plateau.factor == 1 / 32
    few = Plateau(PlateauConfig(points=100, max_halvings=1), 800)
    run(few, noisy(800))
    assert few.state.halvings == plateau.state.halvings[:1]


def test_losses_that_are_no_numbers_are_passed_over() -> None:
    plateau = Plateau(PlateauConfig(), 1000)
    plateau.observe(1, 3.0)
    before = plateau.state_dict()
    assert not plateau.observe(2, float("nan")) and not plateau.observe(3, math.inf)
    assert plateau.state_dict() == before


def test_a_resume_halves_at_the_same_update() -> None:
    losses, config = noisy(800), PlateauConfig(points=100)
    whole, first, second = (Plateau(config, 800) for _ in range(3))
    run(whole, losses)
    run(first, losses[:333])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    run(second, losses, start=333)
    assert second.state_dict() == whole.state_dict() and len(whole.state.halvings) == 5


def test_lengths_that_contradict_are_refused() -> None:
    with pytest.raises(ValidationError, match="shortest is 0.7, expected at most longest, which is 0.6"):
        PlateauConfig(shortest=0.7)
