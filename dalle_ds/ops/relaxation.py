"""Gumbel-softmax relaxation of categorical codes, which lets gradients reach the encoder, and KL terms."""

# B batch, K codes, h and w grid cells

import math

import torch
from torch import Tensor

_SMALLEST_Q = 1e-30  # of a code, inside the logarithm


def gumbel_softmax(logits_BKhw: Tensor, tau: float, generator: torch.Generator | None = None) -> Tensor:
    """softmax((logits + Gumbel noise) / tau) over the codes of each cell, in fp32: (B, K, h, w) -> (B, K, h, w).

    The result is soft, not straight-through. The paper trains on the relaxed bound and anneals tau to 1/16, where the relaxed
    bound is close to the true one.

    Raises:
        ValueError: `tau` is not above 0.
    """
    if tau <= 0:
        raise ValueError(f"tau is {tau}, expected above 0; for hard codes take the argmax")
    logits_BhwK = _codes_last(logits_BKhw)
    # Gumbel noise is -ln(-ln u) with a uniform u, which on a CPU takes a quarter of the time of exponential_(). u = 0 gives
    # -inf, a weight of 0. This is harmless: it happens once in 2^24 draws, so never to all codes of a cell.
    noise = torch.rand(logits_BhwK.shape, generator=generator, device=logits_BhwK.device)
    noise = noise.log_().neg_().log_().neg_()
    return torch.softmax(noise.add_(logits_BhwK).div_(tau), dim=-1).permute(0, 3, 1, 2)


def kl_to_uniform(logits_BKhw: Tensor) -> Tensor:
    """KL(q || uniform) of each cell in nats, (B, h, w): sum_k q_k ln q_k + ln K, between 0 and ln K.

    q is the softmax of the logits, without the temperature and noise of the relaxation (confirmed by the authors, issue 26).
    """
    q_BhwK, ln_q_BhwK = _probabilities(logits_BKhw)
    return (q_BhwK * ln_q_BhwK).sum(dim=-1) + math.log(logits_BKhw.shape[1])


def kl_terms(logits_BKhw: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean of `kl_to_uniform`, KL(mean of q over all cells of the batch || uniform)) in nats, from one softmax.

    The second is 0 if all codes are used equally. It is not in the paper. The first is the second plus the information that a
    code carries about its cell, and the paper penalises both with one weight. Short runs, in which unused codes do not recover,
    can penalise the second more than the rest of the first.
    """
    q_BhwK, ln_q_BhwK = _probabilities(logits_BKhw)
    return (q_BhwK * ln_q_BhwK).sum(dim=-1).mean() + math.log(logits_BKhw.shape[1]), _kl_of_mean(q_BhwK)


def _probabilities(logits_BKhw: Tensor) -> tuple[Tensor, Tensor]:
    ln_q_BhwK = torch.log_softmax(_codes_last(logits_BKhw), dim=-1)
    return ln_q_BhwK.exp(), ln_q_BhwK


def _kl_of_mean(q_BhwK: Tensor) -> Tensor:
    q_K = q_BhwK.flatten(0, 2).mean(dim=0)
    # Below the limit a code's q may be 0, where the gradient of the logarithm is infinite and times 0 gives NaN.
    return (q_K * q_K.clamp_min(_SMALLEST_Q).log()).sum() + math.log(len(q_K))


def _codes_last(logits_BKhw: Tensor) -> Tensor:
    # In channels_last memory format this is a view. Softmax over the last dimension is several times faster than over dimension
    # 1.
    return logits_BKhw.float().permute(0, 2, 3, 1).contiguous()
