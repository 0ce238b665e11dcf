"""Updates of the dVAE and of CLIP that are skipped because of Inf or NaN: count them, and end a run that diverges."""

import logging
import math

from torch import Tensor

from dalle_ds.errors import TrainingDiverged

log = logging.getLogger(__name__)


class SkippedUpdates:
    """Counts skipped updates, in all and in a row. Every rank has the same gradient norm, so the counts are the same too.

    One Inf or NaN among the gradients makes their norm non-finite. Clipping by such a norm would make every gradient NaN, and a
    step would destroy weights and moments, so the update must be skipped in every number format. So must one with a non-finite
    loss, even if the gradients happen to be finite.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: number of consecutive skipped updates that ends the run."""
        self.total, self._limit, self._in_a_row = 0, limit, 0

    def take_step(self, update: int, grad_norm: Tensor, loss: Tensor, loss_scale: float | None = None) -> bool:
        """Whether update number `update` may step. If not, it is counted and logged. Waits for the device.

        Args:
            grad_norm: global norm of the gradients of all ranks, before clipping.
            loss_scale: of this update, for the message. None: training uses none.

        Raises:
            TrainingDiverged: no update took a step for as long as the limit allows.
        """
        if math.isfinite(float(grad_norm + 0 * loss.detach())):  # NaN if either is not finite; one wait for the device
            self._in_a_row = 0
            return True
        self.total += 1
        self._in_a_row += 1
        norm, loss_value = float(grad_norm), float(loss)
        scaled = "" if loss_scale is None else f" at loss scale 2^{math.log2(loss_scale):g}"
        log.warning("update %d is skipped: gradient norm %g%s, loss %g", update, norm, scaled, loss_value)
        if self._in_a_row >= self._limit:
            raise TrainingDiverged(
                f"training diverged: Inf or NaN in the loss or the gradients in {self._in_a_row} consecutive updates up to "
                f"update {update}, the last one with loss {loss_value:g}{scaled}; expected fewer than "
                f"failure.updates_without_step {self._limit}. The same command resumes from the newest checkpoint; a lower "
                "learning_rate.peak or a limit on the gradient (optimizer.clip) usually helps"
            )
        return False
