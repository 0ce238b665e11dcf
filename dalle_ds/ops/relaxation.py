"""Gumbel-softmax relaxation of categorical codes: how gradients reach the encoder through a discrete choice."""

# B batch, K codes, h and w grid cells

import math

import torch
from torch import Tensor


def gumbel_softmax(logits_BKhw: Tensor, tau: float, generator: torch.Generator | None = None) -> Tensor:
    """softmax((logits + Gumbel noise) / tau) over the codes of each cell, in fp32.

    Soft, not straight-through: the paper trains on the relaxed bound and anneals tau to 1/16, where it meets the true one.
    """
    if tau <= 0:
        raise ValueError(f"tau is {tau}, expected above 0; for hard codes take the argmax")
    logits_BhwK = _codes_last(logits_BKhw)
    # Two logarithms of a uniform number: on a CPU a quarter of the time of exponential_(). A zero becomes -inf, which is a
    # weight of 0: harmless, as one code in 2^24 draws cannot be all codes of a cell.
    noise = torch.rand(logits_BhwK.shape, generator=generator, device=logits_BhwK.device)
    noise = noise.log_().neg_().log_().neg_()
    return torch.softmax(noise.add_(logits_BhwK).div_(tau), dim=-1).permute(0, 3, 1, 2)


def kl_to_uniform(logits_BKhw: Tensor) -> Tensor:
    """KL(q || uniform) of each cell in nats, shape (B, h, w): sum_k q_k ln q_k + ln K, between 0 and ln K.

    Of the plain categorical: no temperature and no noise, whatever the relaxation does (the authors, issue 26).
    """
    ln_q = torch.log_softmax(_codes_last(logits_BKhw), dim=-1)
    return (ln_q.exp() * ln_q).sum(dim=-1) + math.log(logits_BKhw.shape[1])


def mean_kl_to_uniform(logits_BKhw: Tensor) -> Tensor:
    """KL(mean of q over all cells of the batch || uniform) in nats, a scalar: 0 where all codes are used alike.

    Not in the paper. The mean of `kl_to_uniform` is this plus the information that a code carries about its cell; the paper's
    one weight holds down both. Runs too short for codes to come back to life can hold down this part more than the other.
    """
    q_K = torch.softmax(_codes_last(logits_BKhw), dim=-1).flatten(0, 2).mean(dim=0)
    return torch.special.xlogy(q_K, q_K).sum() + math.log(logits_BKhw.shape[1])


def kl_terms(logits_BKhw: Tensor) -> tuple[Tensor, Tensor]:
    """(mean of `kl_to_uniform`, `mean_kl_to_uniform`), from one softmax."""
    ln_q = torch.log_softmax(_codes_last(logits_BKhw), dim=-1)
    q, ln_k = ln_q.exp(), math.log(logits_BKhw.shape[1])
    q_K = q.flatten(0, 2).mean(dim=0)
    return (q * ln_q).sum(dim=-1).mean() + ln_k, torch.special.xlogy(q_K, q_K).sum() + ln_k


def _codes_last(logits_BKhw: Tensor) -> Tensor:
    # In channels_last memory this is a view, and softmax over the last dimension is several times faster than over dimension 1.
    return logits_BKhw.float().permute(0, 2, 3, 1).contiguous()
