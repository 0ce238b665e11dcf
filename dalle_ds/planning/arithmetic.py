"""Parameters and arithmetic of a prior, counted from the model itself."""

from functools import cache

import torch

from dalle_ds.models.presets import effective_parameters
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.ops.attention.masks import layer_patterns


@cache
def count_parameters(config: PriorConfig) -> tuple[int, int, int]:
    """-> (the paper's count 12 d^2 a layer, embeddings and unembeddings, the rest: biases and norms), from the model itself."""
    with torch.device("meta"):
        prior = Prior(config)
    n_all = sum(parameter.numel() for parameter in prior.parameters())
    n_embedding = sum(parameter.numel() for module in (prior.embed, prior.heads) for parameter in module.parameters())
    n_effective = effective_parameters(config)
    return n_effective, n_embedding, n_all - n_embedding - n_effective


def forward_flops(config: PriorConfig) -> float:
    """Multiply-adds count two, for one sample: matrices, attention over the keys that each pattern reaches, unembeddings."""
    d, n = config.d_model, config.n_slots
    matrices = 2.0 * effective_parameters(config) * n
    heads = 2.0 * d * ((config.text_len - 1) * config.vocab_size + config.n_image * config.n_codes)
    return matrices + attention_flops(config) + heads


@cache
def attention_flops(config: PriorConfig) -> float:
    """Of one sample's forward pass: scores, then the weighted sum, over the keys that each pattern reaches."""
    patterns = layer_patterns(config.n_layers)
    pairs = {pattern: int(config.mask(pattern).dense().sum()) for pattern in set(patterns)}
    return sum(4.0 * config.d_model * pairs[pattern] for pattern in patterns)
