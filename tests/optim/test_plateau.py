"""The learning rate is halved when the loss stops falling, not earlier, and not more often than configured."""

import json
import math
import random

from dalle_ds.optim.plateau import Plateau, PlateauConfig

CONFIG = PlateauConfig(smoothing=20, patience=100, min_improvement=1e-3, max_halvings=2)


def noisy(loss: float, seed: int) -> float:
    return loss * (1 + 0.05 * (random.Random(seed).random() - 0.5))


def test_a_falling_loss_is_left_alone() -> None:
    plateau = Plateau(CONFIG)
    assert not any(plateau.observe(update, noisy(8 * math.exp(-update / 1000), update)) for update in range(2000))
    assert plateau.factor == 1.0


def test_a_flat_loss_halves_after_the_patience_and_at_most_so_often() -> None:
    plateau = Plateau(CONFIG)
    fired = [update for update in range(1500) if plateau.observe(update, noisy(max(4.0, 8 - update / 100), update))]
    assert plateau.state.halvings == fired and len(fired) == 2 and plateau.factor == 0.25
    # the loss falls until update 400; the smoothed loss lags by 20 to 100 updates
    assert 500 <= fired[0] <= 650 and fired[1] - fired[0] >= 100


def test_a_better_slope_after_a_halving_counts_anew() -> None:
    plateau = Plateau(CONFIG)
    losses = [4.0] * 150 + [4 - 0.005 * i for i in range(300)]
    fired = [update for update, loss in enumerate(losses) if plateau.observe(update, loss)]
    assert fired == [100]


def test_losses_that_are_no_numbers_are_passed_over() -> None:
    plateau = Plateau(CONFIG)
    plateau.observe(0, 3.0)
    before = plateau.state_dict()
    assert not plateau.observe(1, float("nan")) and not plateau.observe(2, float("inf"))
    assert plateau.state_dict() == before


def test_a_resume_halves_at_the_same_update() -> None:
    losses = [noisy(5.0, update) for update in range(400)]
    whole = Plateau(CONFIG)
    for update, loss in enumerate(losses):
        whole.observe(update, loss)
    first = Plateau(CONFIG)
    for update in range(77):
        first.observe(update, losses[update])
    second = Plateau(CONFIG)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for update in range(77, 400):
        second.observe(update, losses[update])
    assert second.state_dict() == whole.state_dict() and len(whole.state.halvings) == 2
