"""A pre-norm residual block whose number formats are applied from outside.

B batch, L tokens, D model width.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.ops.products import linear


class BranchPrecision:
    """Conversions at the start and the end of a residual branch. This base class keeps everything in the input's dtype: fp32.

    `dalle_ds.precision` replaces it by subclasses for fp16 branches (paper section 2.4, figure 4).
    """

    def to_branch(self, norm: nn.LayerNorm, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the identity path and the branch's input: `norm(x_BLD)` in the format in which the branch computes."""
        return x_BLD, norm(x_BLD)

    def from_branch(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        """Add the branch's output to the identity path."""
        return x_BLD + y_BLD


class Linear(nn.Linear):
    """A linear layer whose product `matmul(x, weight, bias)` can be replaced from outside."""

    matmul: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(linear)
    is_inputs_first = False
    """Whether `weight` is (inputs, outputs), the transpose of torch's layout."""

    @property
    def weight_OI(self) -> Tensor:
        """`weight` in torch's layout, (outputs, inputs)."""
        return self.weight.t() if self.is_inputs_first else self.weight

    @property
    def has_own_matmul(self) -> bool:
        """Whether `use_matmul` has replaced the product."""
        return "matmul" in vars(self)

    def use_matmul(self, matmul: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        self.matmul = matmul  # type: ignore[method-assign]

    def reset_matmul(self) -> None:
        """Restore the plain product of the class."""
        vars(self).pop("matmul", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight, self.bias)


class BranchLinear(Linear):
    """A linear layer inside a residual branch. The paper keeps the matrices of these layers in 16 bits."""


class InputsFirstLinear(BranchLinear):
    """A layer with more inputs than outputs, whose `weight` is (inputs, outputs).

    ZeRO-3 shards the first axis. A shard of the MLP's second matrix is then (4 d / ranks, d) instead of (d / ranks, 4 d), which
    PowerSGD approximates with fewer values at the same rank (paper, appendix E.1, table 2: axis 0 for this matrix).
    """

    matmul = staticmethod(partial(linear, inputs_first=True))
    is_inputs_first = True

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__(n_inputs, n_outputs)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous())


class ResBlock(nn.Module):
    """x + branch(norm(x)). Every residual block has its own gradient scale. A layer has two blocks, attention and MLP."""

    def __init__(self, d_model: int, branch: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.branch = branch
        self.precision = BranchPrecision()

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD, h_BLD = self.to_branch(x_BLD)
        return self.from_branch(x_BLD, self.branch(h_BLD))

    def to_branch(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the identity path and the branch's input."""
        return self.precision.to_branch(self.norm, x_BLD)

    def from_branch(self, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        """Add the branch's output to the identity path."""
        return self.precision.from_branch(x_BLD, y_BLD)


class MLP(nn.Module):
    """Two linear layers with a GELU between them; the hidden width is 4 * d_model (paper table 2)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.expand = BranchLinear(d_model, 4 * d_model)
        self.project = InputsFirstLinear(4 * d_model, d_model)

    def forward(self, x_BLD: Tensor) -> Tensor:
        # The paper does not state which GELU it uses. The exact form is one fused kernel on every device. On CPUs it is three
        # times as fast as the tanh form.
        return self.project(F.gelu(self.expand(x_BLD)))
