"""How many tokens stay the same when the prior's residual branches compute in fp16 instead of fp32?

S samples, T text positions, N image tokens.
"""

import torch
from torch import Tensor

from dalle_ds.models.prior import Prior
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.sampling.export import fp16_in_memory
from dalle_ds.sampling.generate import pick


def fp16_agreement(prior: Prior, text_ST: Tensor, image_SN: Tensor, *, seed: int = 0) -> float:
    """Fraction of the image tokens that both formats sample, given the same preceding tokens and the same random numbers.

    The temperature is 1. Memory holds one copy of the weights: afterwards, the prior is in fp16.

    Args:
        text_ST: captions (S, T-1) int64, padded with PAD.
        image_SN: codes (S, N) int64: the preceding tokens.
    """
    in_fp32 = _picked(prior, text_ST, image_SN, seed)
    for name, parameter in prior.named_parameters():
        if (dtype := fp16_in_memory(name)) is not None:
            parameter.data = parameter.data.to(dtype)
    use_fp16_branches(prior)
    return (in_fp32 == _picked(prior, text_ST, image_SN, seed)).double().mean().item()


@torch.inference_mode()
def _picked(prior: Prior, text_ST: Tensor, image_SN: Tensor, seed: int) -> Tensor:
    device = next(prior.parameters()).device
    draws_SN = torch.rand(image_SN.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)
    picked = []
    for text_1T, image_1N, draws_N in zip(text_ST.split(1), image_SN.split(1), draws_SN, strict=True):  # logits are large
        picked.append(pick(prior.image_logits(text_1T.to(device), image_1N.to(device))[0], draws_N, 1.0))
    return torch.stack(picked)
