"""A pre-norm residual block whose number formats are applied from outside.

B batch, L tokens, D model width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.ops.fp16 import gelu


class Numerics:
    """The edges of a residual branch. This base keeps everything in the input's dtype: fp32 truth.

    `dalle_ds.precision` puts its own in their place (paper section 2.4, figure 4); the model knows nothing of it.
    """

    def enter(self, norm: nn.LayerNorm, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Identity path -> identity path, and normed in the format that the branch computes in."""
        return x_BLD, norm(x_BLD)

    def leave(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        """Identity path and what the branch made -> identity path."""
        return x_BLD + y_BLD


class Linear(nn.Linear):
    """A linear layer whose product `matmul(x, weight, bias)` can be replaced from outside, as the edges of a block can."""

    matmul: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)

    @property
    def has_own_matmul(self) -> bool:
        """Whether the product has been replaced."""
        return "matmul" in vars(self)

    def use_matmul(self, matmul: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        self.matmul = matmul  # type: ignore[method-assign]

    def reset_matmul(self) -> None:
        """Back to the plain product."""
        vars(self).pop("matmul", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight, self.bias)


class BranchLinear(Linear):
    """A linear layer inside a residual branch: the matrices that the paper keeps in 16 bits."""


class ResBlock(nn.Module):
    """x + branch(norm(x)). One of these is the unit of gradient scaling: a layer has two, attention and MLP."""

    def __init__(self, d_model: int, branch: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.branch = branch
        self.numerics = Numerics()

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD, h_BLD = self.enter(x_BLD)
        return self.leave(x_BLD, self.branch(h_BLD))

    def enter(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Identity path -> identity path and the branch's input."""
        return self.numerics.enter(self.norm, x_BLD)

    def leave(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        """Identity path and the branch's output -> identity path."""
        return self.numerics.leave(x_BLD, y_BLD)


class MLP(nn.Module):
    """Two matrices around a GELU, hidden width 4 * d_model (paper table 2)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.expand = BranchLinear(d_model, 4 * d_model)
        self.project = BranchLinear(4 * d_model, d_model)

    def forward(self, x_BLD: Tensor) -> Tensor:
        # The paper does not state its GELU. The exact form is one fused kernel everywhere, and on CPUs three times as fast
        # as the tanh form.
        return self.project(gelu(self.expand(x_BLD)))
