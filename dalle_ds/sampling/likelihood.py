"""Losses of given images under the prior, sample by sample: the model's part of every evaluation by likelihood.

S samples, T text slots, N image tokens.
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
    """Negative log-likelihood of every image token given its caption and the tokens before it, nats -> (S, N) float32.

    Args:
        batch: samples at once.
        progress: called with the number of samples just done.
    """
    device = next(prior.parameters()).device
    losses = np.empty(tuple(image_SN.shape), dtype=np.float32)
    for start in range(0, len(image_SN), batch):
        rows = slice(start, start + batch)
        losses[rows] = prior.image_nll(text_ST[rows].to(device), image_SN[rows].to(device)).float().cpu().numpy()
        if progress is not None:
            progress(len(losses[rows]))
    return losses
