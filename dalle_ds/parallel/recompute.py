"""Activation checkpointing: keep only the layers' inputs, compute the rest again in the backward pass (paper section 2.4)."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dalle_ds.models.prior import Layer, Prior


def recompute_layers(prior: Prior) -> None:
    """Recompute every layer of `prior` in the backward pass. The results stay the same to the last bit."""

    def run_layer(layer: Layer, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    prior.run_layer = run_layer
