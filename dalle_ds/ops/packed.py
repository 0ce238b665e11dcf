"""Linear layers that run many times on few rows, on CPUs: the weight is packed once in oneDNN's own layout.

R rows, I input width, O output width.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def packed_linear(weight_OI: Tensor, rows: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """Pack `weight_OI` for inputs of about `rows` rows.

    Returns a function (x, weight, bias) -> x @ weight.T + bias that reads the packed copy instead of `weight`. It has no
    gradients, and the copy does not follow later changes of the weight. Returns None if packing is not supported: on GPUs, for
    other dtypes than fp32, or without oneDNN.

    At 16 rows and the widths of a model with d_model 512, the function takes 0.4 to 0.7 of the time of F.linear, whose library
    packs the weight in every call.
    """
    if weight_OI.device.type != "cpu" or weight_OI.dtype is not torch.float32 or not torch.backends.mkldnn.is_available():
        return None
    mkldnn = torch.ops.mkldnn
    if not all(hasattr(mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return None  # these private operators may be missing in other versions of torch
    packed = mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), rows)

    def linear(x: Tensor, _weight: Tensor, bias: Tensor | None) -> Tensor:
        return mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return linear
