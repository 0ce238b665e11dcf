"""2d convolutions, those with 1 x 1 kernels as matrix products where torch has slow loops for them.

B batch, C channels, O output channels, H and W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d(x_BCHW: Tensor, weight_OCkk: Tensor, bias_O: Tensor, padding: int) -> Tensor:
    """F.conv2d with stride 1; in channels_last memory on CPUs, a 1 x 1 kernel is a linear layer over each pixel's channels.

    torch leaves such kernels to loops that copy to another memory format and back where a process has one thread and fewer than
    16 images. Their results come in that other format, and all that adds or rectifies them later copies as well.
    """
    is_linear = weight_OCkk.shape[2:] == (1, 1) and x_BCHW.device.type == "cpu"
    if not is_linear or not x_BCHW.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x_BCHW, weight_OCkk, bias_O, padding=padding)
    return F.linear(x_BCHW.permute(0, 2, 3, 1), weight_OCkk.flatten(1), bias_O).permute(0, 3, 1, 2)
