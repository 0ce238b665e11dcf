"""What the ranks agree on once in an update: one all-reduce carries losses, requests and the flags of non-finite gradients."""

from dataclasses import dataclass

import torch

from dalle_ds.parallel.ranks import Ranks


@dataclass(frozen=True)
class Agreement:
    """The same on every rank, on the host."""

    text_loss: float
    image_loss: float
    """Means in nats a token over the global batch."""
    stop_requested: bool
    n_saving: int
    """Ranks that are writing a background checkpoint."""
    is_finite: bool
    """Whether all gradients of all ranks are, and can be averaged over replicas."""
    nonfinite_blocks: tuple[int, ...]
    """Residual blocks with a non-finite gradient on some rank, by their number in the scaler."""


class AgreementSums:
    """This rank's part, then the sum over the ranks; on the device, where a GPU need not be waited for until `read`."""

    def __init__(self, n_blocks: int, device: torch.device) -> None:
        self._all = torch.zeros(5 + n_blocks, dtype=torch.float64, device=device)
        self.losses, self._stop, self._saving = self._all[:2], self._all[2], self._all[3]
        """(text, image): this rank's share of the global means."""
        self.unaverageable = self._all[4]
        """Above 0: a gradient that replicas can't average."""
        self.nonfinite = self._all[5:]
        """(n_blocks,): above 0 where a residual block has a non-finite gradient."""

    def request(self, stop: bool, is_saving: bool) -> None:
        """What this rank asks for, and whether it is writing a background checkpoint."""
        self._stop.fill_(float(stop))
        self._saving.fill_(float(is_saving))

    def sum(self, ranks: Ranks) -> "AgreementSums":
        """Over all ranks, in place; the one collective."""
        ranks.sum(self._all)
        return self

    def read(self) -> Agreement:
        """The sums on the host, which waits for them."""
        text_loss, image_loss, n_stop, n_saving, n_unaverageable, *flags = self._all.tolist()
        return Agreement(
            text_loss=text_loss,
            image_loss=image_loss,
            stop_requested=n_stop > 0,
            n_saving=int(n_saving),
            is_finite=not n_unaverageable and not any(flags),
            nonfinite_blocks=tuple(number for number, flag in enumerate(flags) if flag),
        )
