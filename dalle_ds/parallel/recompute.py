"""Activation checkpointing: keep only the layers' inputs, compute the rest again in the backward pass (paper section 2.4)."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dalle_ds.models.prior import Layer, Prior


def recompute_layers(prior: Prior, every: int = 1) -> None:
    """Recompute every `every`-th layer of `prior` in the backward pass; the others keep their activations, which costs memory
    and saves time. The results stay the same to the last bit."""
    if every < 1:
        raise ValueError(f"every is {every}, expected 1 (all layers), 2 (half of them), ...")
    recomputed = set(prior.layers[::every])

    def run_layer(layer: Layer, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False) if layer in recomputed else layer(x)

    prior.run_layer = run_layer
