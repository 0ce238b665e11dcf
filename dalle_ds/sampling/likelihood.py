"""Per-sample losses of given images under the prior, for evaluations by likelihood.

S samples, T text positions, N image tokens.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dalle_ds.models.prior import Prior


@torch.inference_mode()
def image_losses(
    prior: Prior, text_ST: Tensor, image_SN: Tensor, *, batch: int = 16, progress: Callable[[int], object] | None = None
) -> np.ndarray:
    """Negative log-likelihood of every image token given its caption and the preceding tokens. Returns nats (S, N), float32.

    Args:
        text_ST: captions (S, T-1) int64, padded with PAD.
        image_SN: codes (S, N) int64.
        batch: samples per forward pass.
        progress: called after each batch with its number of samples.
    """
    device = next(prior.parameters()).device
    losses = np.empty(tuple(image_SN.shape), dtype=np.float32)
    for start in range(0, len(image_SN), batch):
        rows = slice(start, start + batch)
        losses[rows] = prior.image_nll(text_ST[rows].to(device), image_SN[rows].to(device)).float().cpu().numpy()
        if progress is not None:
            progress(len(losses[rows]))
    return losses
