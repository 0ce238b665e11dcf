"""Priors and batches of the steps: real shapes on a GPU, tiny shapes in a rehearsal.

B samples, T text slots, N image tokens.
"""

import torch
from torch import Tensor

from dalle_ds.acceptance.place import Place
from dalle_ds.models.prior import PriorConfig
from dalle_ds.padding import PAD

Batch = tuple[Tensor, Tensor]
"""text (B, T-1), image (B, N)."""


def small_prior(place: Place, n_layers: int = 4) -> PriorConfig:
    """Returns a prior with all three patterns at the real length, half as wide as 0.3b. In a rehearsal, its width is not a
    multiple of three ranks."""
    tiny = {"n_heads": 2, "d_head": 16, "text_len": 6, "grid": 4, "vocab_size": 40, "n_codes": 32, "conv_kernel": 3}
    return PriorConfig(n_layers=n_layers, **place.pick({"n_heads": 8}, tiny))


def wide_prior(place: Place, n_layers: int) -> PriorConfig:
    """Returns a prior with layers of the 1.2b preset, width 2048. In a rehearsal: a small prior."""
    return PriorConfig(n_layers=n_layers, n_heads=32) if not place.is_rehearsal else small_prior(place, min(n_layers, 3))


def random_batch(config: PriorConfig, n: int, seed: int) -> Batch:
    """Returns a random batch that is the same on every machine, with captions of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    text_BT = torch.randint(config.vocab_size, (n, config.text_len - 1), generator=generator)
    lengths_B1 = torch.randint(1, config.text_len, (n, 1), generator=generator)
    text_BT[torch.arange(config.text_len - 1) >= lengths_B1] = PAD
    return text_BT, torch.randint(config.n_codes, (n, config.n_image), generator=generator)
