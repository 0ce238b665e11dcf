"""Learning rate of the prior: warm-up, halvings, cosine."""

import pytest
from pydantic import ValidationError

from dalle_ds.optim.learning_rate import LearningRateConfig


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    rate = LearningRateConfig(peak=1.0, warmup_updates=4)
    assert [rate.at(update, 100) for update in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_five_halvings_end_at_the_papers_last_rate() -> None:
    rate = LearningRateConfig(halve_at=(10_000, 20_000, 30_000, 40_000, 50_000))
    assert rate.at(9_999, 430_000) == 4.5e-4
    assert rate.at(10_000, 430_000) == 2.25e-4
    assert rate.at(430_000, 430_000) == pytest.approx(1.40625e-5)


def test_cosine_ends_at_its_fraction() -> None:
    rate = LearningRateConfig(peak=2.0, warmup_updates=10, shape="cosine", final_fraction=0.1)
    assert rate.at(10, 110) == pytest.approx(2.0)
    assert rate.at(60, 110) == pytest.approx(1.1)
    assert rate.at(110, 110) == pytest.approx(0.2)


def test_halvings_beside_a_cosine_are_refused() -> None:
    with pytest.raises(ValidationError, match="halve_at"):
        LearningRateConfig(shape="cosine", halve_at=(5,))
    with pytest.raises(ValidationError, match="plateau needs shape 'constant'"):
        LearningRateConfig(shape="cosine", plateau={})
