"""Per-sample losses of given images under prior and decoder, for evaluations by likelihood.

S samples, T text positions, N image tokens, C channels, H and W pixels.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dalle_ds.models.dvae import DVAE
from dalle_ds.models.prior import Prior
from dalle_ds.ops.logit_laplace import log_mass, split_output


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


@torch.inference_mode()
def caption_losses(prior: Prior, text_ST: Tensor, image_SN: Tensor, *, batch: int = 16) -> np.ndarray:
    """Negative log-likelihood of each caption: the sum over its tokens. Returns nats (S,), float64. As `image_losses`."""
    device = next(prior.parameters()).device
    sums = []
    for text_BT, image_BN in zip(text_ST.split(batch), image_SN.split(batch), strict=True):
        sums.append(prior.token_nll(text_BT.to(device), image_BN.to(device))[0].double().sum(1).cpu().numpy())
    return np.concatenate(sums)


@torch.inference_mode()
def pixel_losses(
    dvae: DVAE, images_SHWC: np.ndarray, codes_SN: Tensor, ln_b_min: float | None, *, batch: int = 16
) -> np.ndarray:
    """Negative log-likelihood of the 8-bit values of each image given its codes. Returns nats (S,), float64.

    Args:
        images_SHWC: uint8.
        codes_SN: int64.
        ln_b_min: lower limit of ln b. None: no limit.
    """
    device, config = next(dvae.parameters()).device, dvae.config
    sums = []
    for start in range(0, len(images_SHWC), batch):
        images_BCHW = torch.from_numpy(images_SHWC[start : start + batch]).permute(0, 3, 1, 2).to(device)
        codes_Bhw = codes_SN[start : start + batch].to(device).unflatten(1, (config.grid, config.grid))
        mu, ln_b = split_output(dvae.decoder.from_codes(codes_Bhw))
        ln_b = ln_b if ln_b_min is None else ln_b.clamp(min=ln_b_min)
        sums.append(-log_mass(images_BCHW, mu, ln_b, config.pixel_eps).flatten(1).sum(1).cpu().numpy())
    return np.concatenate(sums)
