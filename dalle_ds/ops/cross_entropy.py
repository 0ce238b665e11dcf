"""Cross-entropy of a linear layer in chunks of rows, so that all logits never exist at once.

R rows (tokens), C rows of one chunk, D model width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dalle_ds.ops.products import add_product, linear, product
from dalle_ds.ops.split import Split, split_matmul

MAX_LOGITS = 2**23
"""Logits that exist at a time: 32 MiB in fp32, the logits of one image with 1024 tokens and 8192 codes. This is enough for
matrix products at full speed. The paper's text and image logits of a single sample would take 48 MiB, their softmax and their
gradient as much again each."""

MAX_WEIGHT_ROWS = 2**11
"""Rows of the weight's gradient that are computed at a time on fp16 units. Products of this size run at full speed."""


def linear_cross_entropy(
    x_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_R: Tensor,
    ignore_index: int | None = None,
    n_kept: int | None = None,
) -> Tensor:
    """Sum of -ln softmax(x @ weight.T + bias)[target] over all rows whose target is not `ignore_index`. Returns an fp32 scalar.

    Logits are fp32 even under autocast. The forward pass also computes the gradients, while a chunk's logits exist. So the
    backward pass recomputes nothing, and it does not need the weight, which ZeRO-3 may have freed by then. It can run only
    once, even with retain_graph.

    `n_kept` is the number of targets that are not ignored. Without it, the host must wait for the GPU to count them.
    """
    if ignore_index is not None:
        # Drop ignored rows instead of masking them: most text slots are pads, and the text vocabulary is the larger one.
        is_kept_R = targets_R != ignore_index
        kept = (is_kept_R.nonzero() if n_kept is None else torch.nonzero_static(is_kept_R, size=n_kept)).squeeze(1)
        x_RD, targets_R = x_RD.index_select(0, kept), targets_R[kept]
    with torch.autocast(x_RD.device.type, enabled=False):
        # read it here: inside a Function, is_grad_enabled() is always False
        with_gradients = torch.is_grad_enabled()
        return _LinearCrossEntropy.apply(x_RD.float(), weight_VD.float(), bias_V.float(), targets_R, with_gradients)


def linear_nll(x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_R: Tensor, ignore_index: int | None = None) -> Tensor:
    """The terms of the sum in `linear_cross_entropy`: (R,) fp32, 0 for ignored targets.

    It is meant for evaluation: if gradients are enabled, autograd keeps the logits of all chunks.
    """
    ignore_index = -100 if ignore_index is None else ignore_index  # torch's default
    with torch.autocast(x_RD.device.type, enabled=False):
        x, weight, bias = x_RD.float(), weight_VD.float(), bias_V.float()
        chunks = [
            F.cross_entropy(linear(x[rows], weight, bias), targets_R[rows], ignore_index=ignore_index, reduction="none")
            for rows in _chunks(len(x), len(weight))
        ]
    return torch.cat(chunks)


def _chunks(n_rows: int, vocab_size: int) -> Iterator[slice]:
    step = max(1, MAX_LOGITS // vocab_size)
    for start in range(0, max(n_rows, 1), step):  # zero rows give one empty chunk, so that gradients are zero, not None
        yield slice(start, min(start + step, n_rows))


class _PlainProducts:
    """Products in fp32. The logits of all chunks may share one buffer."""

    def __init__(self, x_RD: Tensor, weight_VD: Tensor) -> None:
        self._x_RD, self._weight_VD = x_RD, weight_VD
        self._buffer = x_RD.new_empty(min(len(x_RD), max(1, MAX_LOGITS // len(weight_VD))), len(weight_VD))

    def logits(self, rows: slice, bias_V: Tensor) -> Tensor:
        """Logits (C, V) of a chunk, perhaps in the shared buffer. The caller may overwrite them."""
        x_CD = self._x_RD[rows]
        return product(x_CD, self._weight_VD.t(), bias_V, out=self._buffer[: len(x_CD)])

    def add_gradients(self, grad_CV: Tensor, rows: slice, grad_x_RD: Tensor | None, grad_weight_VD: Tensor | None) -> None:
        """Write these rows of x's gradient, and add the chunk's contribution to the weight's gradient."""
        if grad_x_RD is not None:
            grad_x_RD[rows] = product(grad_CV, self._weight_VD)
        if grad_weight_VD is not None:
            add_product(grad_weight_VD, grad_CV.t(), self._x_RD[rows])


class _SplitProducts:
    """Like `_PlainProducts`, on a GPU's fp16 units."""

    def __init__(self, x_RD: Tensor, weight_VD: Tensor) -> None:
        self._x_RD, self._weight_VD = Split.of(x_RD), Split.of(weight_VD)

    def logits(self, rows: slice, bias_V: Tensor) -> Tensor:
        return split_matmul(self._x_RD[rows], self._weight_VD.t()).add_(bias_V)

    def add_gradients(self, grad_CV: Tensor, rows: slice, grad_x_RD: Tensor | None, grad_weight_VD: Tensor | None) -> None:
        grad = Split.of(grad_CV)
        if grad_x_RD is not None:
            grad_x_RD[rows] = split_matmul(grad, self._weight_VD)
        if grad_weight_VD is not None:
            grad_VC, x_CD = grad.t(), self._x_RD[rows]
            for start in range(
                0, len(grad_weight_VD), MAX_WEIGHT_ROWS
            ):  # for all rows at once, the summands would take twice the gradient's memory
                some = slice(start, start + MAX_WEIGHT_ROWS)
                grad_weight_VD[some].add_(split_matmul(grad_VC[some], x_CD))


def _products_on(device: torch.device) -> type[_PlainProducts] | type[_SplitProducts]:
    return _SplitProducts if device.type == "cuda" else _PlainProducts


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_R: Tensor, with_gradients: bool) -> Tensor:
        n_rows, vocab_size = len(x_RD), len(weight_VD)
        needed = [with_gradients and need for need in ctx.needs_input_grad[:3]]
        grad_x = torch.empty_like(x_RD) if needed[0] else None
        grad_weight = torch.zeros_like(weight_VD) if needed[1] else None
        grad_bias = torch.zeros_like(bias_V) if needed[2] else None
        nll_R = x_RD.new_empty(n_rows)
        products = _products_on(x_RD.device)(x_RD, weight_VD)
        for rows in _chunks(n_rows, vocab_size):
            target_C1 = targets_R[rows, None]
            # one tensor holds, in turn, the logits, the shifted logits, their exponentials and the gradient
            logits_CV = products.logits(rows, bias_V)
            logits_CV.sub_(logits_CV.amax(1, keepdim=True))
            at_target_C1 = logits_CV.gather(1, target_C1)
            sum_C1 = logits_CV.exp_().sum(1, keepdim=True)
            nll_R[rows] = (sum_C1.log() - at_target_C1).squeeze(1)
            if not any(needed):
                continue
            grad_CV = logits_CV.div_(sum_C1)
            grad_CV.scatter_add_(1, target_C1, grad_CV.new_full(target_C1.shape, -1.0))
            products.add_gradients(grad_CV, rows, grad_x, grad_weight)
            if grad_bias is not None:
                grad_bias.add_(grad_CV.sum(0))
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return nll_R.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since a copy of the weight's gradient would be the largest tensor here. torch raises on a second backward
        # pass, because the saved tensors have changed.
        return *(None if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors), None, None
