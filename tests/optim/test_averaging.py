"""The average against the formula, its warm start, and that borrowing it leaves the model as it was."""

import pytest
import torch

from dalle_ds.optim.averaging import ParameterAverage


def _model(value: float) -> torch.nn.Linear:
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


def test_plain_average_follows_the_formula() -> None:
    model = _model(1.0)
    average = ParameterAverage(model, decay=0.9)
    expected = 1.0
    for value in (2.0, -3.0, 5.0):
        torch.nn.init.constant_(model.weight, value)
        average.update(model)
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(average.average["weight"], torch.full((1, 2), expected))


def test_warm_start_forgets_the_initial_parameters() -> None:
    model = _model(100.0)
    plain, warm = ParameterAverage(model, 0.999), ParameterAverage(model, 0.999, "warm")
    torch.nn.init.constant_(model.weight, 1.0)
    for _ in range(50):
        plain.update(model)
        warm.update(model)
    assert plain.average["weight"][0, 0] > 90
    assert warm.average["weight"][0, 0] == pytest.approx(1.0, abs=1e-3)


def test_applied_to_gives_the_average_and_then_the_own_parameters_back() -> None:
    model = _model(1.0)
    average = ParameterAverage(model, 0.5)
    torch.nn.init.constant_(model.weight, 3.0)
    average.update(model)
    with pytest.raises(RuntimeError, match="inside"), average.applied_to(model):
        assert model.weight[0, 0].item() == 2.0
        raise RuntimeError("inside")
    assert model.weight[0, 0].item() == 3.0


def test_state_goes_round_and_another_models_is_refused() -> None:
    model = _model(1.0)
    average = ParameterAverage(model, 0.9, "warm")
    torch.nn.init.constant_(model.weight, 4.0)
    average.update(model)
    other = ParameterAverage(_model(0.0), 0.9, "warm")
    other.load_state_dict(average.state_dict())
    assert other.n_updates == 1
    assert torch.equal(other.average["weight"], average.average["weight"])
    with pytest.raises(ValueError, match="belongs to another model"):
        ParameterAverage(torch.nn.Linear(2, 1), 0.9).load_state_dict(average.state_dict())


@pytest.mark.parametrize(("decay", "start", "words"), [(1.0, "plain", "decay is 1.0"), (0.9, "cold", "start is 'cold'")])
def test_bad_settings_are_named(decay: float, start: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParameterAverage(_model(0.0), decay, start)  # type: ignore[arg-type]
