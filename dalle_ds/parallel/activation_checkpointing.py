"""Activation checkpointing: keep only the layers' inputs and recompute the rest in the backward pass (paper section 2.4).

The recomputation runs inside the layer's own backward pass, below the hooks that ZeRO-3 installs on modules. So ZeRO-3 sees one
module that runs forward once and backward once, and gathers its parameters once for each. torch.utils.checkpoint runs the
module a second time, hooks included. It also costs host time, for a first graph and for hooks on each of its saved tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dalle_ds.models.prior import Layer, Prior
from dalle_ds.precision.fp16_branches import unread_product


def recompute_layers(prior: Prior, every: int = 1) -> None:
    """Recompute every `every`-th layer of `prior` in the backward pass. The other layers keep their activations, which costs
    memory and saves time. Results are bit-identical to those without recomputation.

    Raises:
        ValueError: `every` is less than 1.
    """
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
    """Runs a layer without saving activations. Parameters are arguments so that autograd knows that the output depends on them.

    The backward pass over the recomputed graph accumulates each parameter's gradient in `grad` as soon as it is computed. A
    hook that takes it there (`masterless`) avoids holding the gradients of a whole layer at once.
    """

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
        # The recomputed output is not needed, only its graph: skip the last product, a third of the layer's forward cost.
        with torch.enable_grad(), unread_product(ctx.layer.mlp.branch.project):
            out_BLD = ctx.layer.blocks(x_BLD)
        torch.autograd.backward(out_BLD, grad_BLD, inputs=[x_BLD, *(p for p in ctx.parameters if p.requires_grad)])
        return x_BLD.grad, None, *(None for _ in ctx.parameters)
