"""Priors and batches of the steps: the real shapes on a GPU, tiny ones in a rehearsal.

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
    """All three patterns at the real length, half as wide as 0.3b; in a rehearsal, a width that three ranks don't divide."""
    tiny = {"n_heads": 2, "d_head": 16, "text_len": 6, "grid": 4, "vocab_size": 40, "n_codes": 32, "conv_kernel": 3}
    return PriorConfig(n_layers=n_layers, **place.pick({"n_heads": 8}, tiny))


def wide_prior(place: Place, n_layers: int) -> PriorConfig:
    """Layers of the 1.2b preset, 2048 wide."""
    return PriorConfig(n_layers=n_layers, n_heads=32) if not place.is_rehearsal else small_prior(place, min(n_layers, 3))


def random_batch(config: PriorConfig, n: int, seed: int) -> Batch:
    """The same on every machine. Captions have all lengths."""
    generator = torch.Generator().manual_seed(seed)
    text_BT = torch.randint(config.vocab_size, (n, config.text_len - 1), generator=generator)
    lengths_B1 = torch.randint(1, config.text_len, (n, 1), generator=generator)
    text_BT[torch.arange(config.text_len - 1) >= lengths_B1] = PAD
    return text_BT, torch.randint(config.n_codes, (n, config.n_image), generator=generator)
