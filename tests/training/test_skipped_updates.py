"""Updates with Inf or NaN are skipped and counted, and a run of them ends the run."""

import pytest
import torch

from dalle_ds.errors import TrainingDiverged
from dalle_ds.training.skipped_updates import SkippedUpdates

NOT_FINITE = [(torch.inf, 1.0), (torch.nan, 1.0), (1.0, torch.nan), (1.0, torch.inf), (1.0, -torch.inf)]


@pytest.mark.parametrize("norm, loss", NOT_FINITE)
def test_a_loss_that_is_not_finite_counts_as_gradients_that_are_not(norm: float, loss: float) -> None:
    skipped = SkippedUpdates(limit=3)

    def take(update: int, norm: float, loss: float) -> bool:
        return skipped.take_step(update, torch.tensor(norm), torch.tensor(loss))

    assert [take(0, norm, loss), take(1, norm, loss), take(2, 1.0, 1.0)] == [False, False, True]
    assert not take(3, norm, loss) and not take(4, norm, loss) and skipped.total == 4
    with pytest.raises(TrainingDiverged, match=f"in 3 consecutive updates up to update 5, the last one with loss {loss:g}"):
        take(5, norm, loss)
