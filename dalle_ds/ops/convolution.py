"""2d convolutions. On CPUs, 1 x 1 kernels are computed as matrix products, because torch's convolution is slow for them.

B batch, C channels, O output channels, H and W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.ops.products import linear


def conv2d(x_BCHW: Tensor, weight_OCkk: Tensor, bias_O: Tensor, padding: int) -> Tensor:
    """F.conv2d with stride 1. On CPUs in channels_last memory, a 1 x 1 kernel is a linear layer over each pixel's channels.

    With one thread and fewer than 16 images, torch computes such kernels with loops that copy to another memory format. Their
    results keep that format, so later additions and activations copy as well.
    """
    is_linear = weight_OCkk.shape[2:] == (1, 1) and x_BCHW.device.type == "cpu"
    if not is_linear or not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x_BCHW, weight_OCkk, bias_O, padding=padding)
    return linear(x_BCHW.permute(0, 2, 3, 1), weight_OCkk.flatten(1), bias_O).permute(0, 3, 1, 2)
