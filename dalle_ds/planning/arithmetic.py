"""Parameter counts and FLOPs of a prior."""

from functools import cache

import torch

from dalle_ds.models.presets import n_effective_parameters
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.ops.attention.masks import layer_patterns


@cache
def count_parameters(config: PriorConfig) -> tuple[int, int, int]:
    """Count the parameters of the model. Returns (residual matrices, embeddings and unembeddings, biases and norms).

    The first is the paper's count, 12 d^2 per layer.
    """
    with torch.device("meta"):
        prior = Prior(config)
    n_all = sum(parameter.numel() for parameter in prior.parameters())
    n_embedding = sum(parameter.numel() for module in (prior.embed, prior.heads) for parameter in module.parameters())
    n_effective = n_effective_parameters(config)
    return n_effective, n_embedding, n_all - n_embedding - n_effective


def forward_flops(config: PriorConfig) -> float:
    """FLOPs of one sample's forward pass: matrices, attention to the keys in each pattern's mask, unembeddings.

    A multiply-add counts as two.
    """
    d, n = config.d_model, config.n_slots
    matrices = 2.0 * n_effective_parameters(config) * n
    heads = 2.0 * d * ((config.text_len - 1) * config.vocab_size + config.n_image * config.n_codes)
    return matrices + attention_flops(config) + heads


@cache
def attention_flops(config: PriorConfig) -> float:
    """FLOPs of attention in one sample's forward pass: scores and weighted sum, over the keys in each pattern's mask."""
    patterns = layer_patterns(config.n_layers)
    pairs = {pattern: int(config.mask(pattern).dense().sum()) for pattern in set(patterns)}
    return sum(4.0 * config.d_model * pairs[pattern] for pattern in patterns)
