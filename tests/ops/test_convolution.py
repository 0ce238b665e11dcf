"""Convolutions against torch's."""

import pytest
import torch
import torch.nn.functional as F

from dalle_ds.ops.convolution import conv2d


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_values_and_gradients_are_those_of_torch(kernel: int, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 5, 4, generator=generator).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(6, 8, kernel, kernel, generator=generator), torch.randn(6, generator=generator)
    results = []
    for convolve in (lambda *args, padding: conv2d(*args, padding), F.conv2d):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = convolve(*leaves, padding=kernel // 2)
        out.square().sum().backward()
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_one_by_one_kernel_keeps_the_channels_last() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    out = conv2d(x, torch.randn(6, 8, 1, 1), torch.zeros(6), 0)
    assert out.shape == (2, 6, 4, 4)
    assert out.is_contiguous(memory_format=torch.channels_last)
