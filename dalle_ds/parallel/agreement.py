"""The all-reduce of an update: it carries the losses, the stop request and the non-finite flags of the gradients."""

from dataclasses import dataclass

import torch

from dalle_ds.parallel.ranks import Ranks


@dataclass(frozen=True)
class Agreement:
    """Result of the all-reduce, on the host. It is the same on every rank."""

    text_loss: float
    image_loss: float
    """Mean losses over the global batch, in nats per token."""
    stop_requested: bool
    """Whether some rank has requested to stop."""
    n_saving: int
    """Number of ranks still writing a background checkpoint."""
    is_finite: bool
    """Whether all gradients of all ranks are finite and can be averaged over replicas."""
    nonfinite_blocks: tuple[int, ...]
    """Residual blocks with a non-finite gradient on some rank, as indices into `ResblockGradScaler.names`."""


class AgreementSums:
    """This rank's summands of an `Agreement`, and after `sum` their sums over all ranks.

    They stay on the device: the host does not wait for a GPU before `read`.
    """

    def __init__(self, n_blocks: int, device: torch.device) -> None:
        self._all = torch.zeros(5 + n_blocks, dtype=torch.float64, device=device)
        self.losses, self._stop, self._saving = self._all[:2], self._all[2], self._all[3]
        """(text, image): this rank's contribution to the global mean losses."""
        self.unaverageable = self._all[4]
        """0-d, above 0 if replicas can't average some gradient."""
        self.nonfinite = self._all[5:]
        """(n_blocks,), above 0 for residual blocks with a non-finite gradient."""

    def request(self, stop: bool, is_saving: bool) -> None:
        """Set whether this rank requests to stop, and whether it is writing a background checkpoint."""
        self._stop.fill_(float(stop))
        self._saving.fill_(float(is_saving))

    def sum(self, ranks: Ranks) -> "AgreementSums":
        """Sum over all ranks, in place, with one all-reduce. Returns self."""
        ranks.sum(self._all)
        return self

    def read(self) -> Agreement:
        """Copy the sums to the host. This waits for the device."""
        text_loss, image_loss, n_stop, n_saving, n_unaverageable, *flags = self._all.tolist()
        return Agreement(
            text_loss=text_loss,
            image_loss=image_loss,
            stop_requested=n_stop > 0,
            n_saving=int(n_saving),
            is_finite=not n_unaverageable and not any(flags),
            nonfinite_blocks=tuple(number for number, flag in enumerate(flags) if flag),
        )
