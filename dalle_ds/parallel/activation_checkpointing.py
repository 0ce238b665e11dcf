"""Activation checkpointing: keep only the layers' inputs, compute the rest again in the backward pass (paper section 2.4).

A layer is recomputed inside its own forward and backward pass, below the hooks that ZeRO-3 puts around modules: it sees one
module that runs forward once and backward once, gathers its parameters for each, and leaves nothing behind. torch's own
function runs the module, hooks included, a second time, and keeps the host busy with a first graph and hooks for each of its
tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dalle_ds.models.prior import Layer, Prior
from dalle_ds.precision.fp16_branches import unread_product


def recompute_layers(prior: Prior, every: int = 1) -> None:
    """Recompute every `every`-th layer of `prior` in the backward pass; the others keep their activations, which costs memory
    and saves time. The results stay the same to the last bit."""
    if every < 1:
        raise ValueError(f"every is {every}, expected 1 (all layers), 2 (half of them), ...")
    for layer in prior.layers[::every]:
        layer.run_blocks = _Recomputed(layer)


class _Recomputed:
    def __init__(self, layer: Layer) -> None:
        self._layer, self._parameters = layer, list(layer.parameters())

    def __call__(self, x_BLD: Tensor) -> Tensor:
        return _Recompute.apply(x_BLD, self._layer, *self._parameters)


class _Recompute(torch.autograd.Function):
    """Parameters are arguments so that autograd knows of them. The pass over the second graph leaves their gradients in place,
    each as soon as it is made: whoever takes it then (`masterless`) spares the memory for those of a whole layer."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, layer: Layer, *parameters: nn.Parameter) -> Tensor:
        ctx.save_for_backward(x_BLD)
        ctx.layer, ctx.parameters = layer, parameters
        return layer.blocks(x_BLD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        (x_BLD,) = ctx.saved_tensors
        x_BLD = x_BLD.detach().requires_grad_()
        # what the layer gives is known to the layers after it: only its graph is wanted, and the last product is a third of it
        with torch.enable_grad(), unread_product(ctx.layer.mlp.branch.project):
            out_BLD = ctx.layer.blocks(x_BLD)
        torch.autograd.backward(out_BLD, grad_BLD, inputs=[x_BLD, *(p for p in ctx.parameters if p.requires_grad)])
        return x_BLD.grad, None, *(None for _ in ctx.parameters)
