"""torch's TF32 and accumulation flags, which exist without a GPU too. tests/cuda_path/test_exact_fp32.py: who sets them."""

from collections.abc import Iterator

import pytest
import torch

from dalle_ds.ops.exactness import exact_fp32, has_tf32, tf32

PRODUCTS, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


@pytest.fixture(autouse=True)
def flags_as_before() -> Iterator[None]:
    yield
    exact_fp32()


def loosen() -> None:
    """Allow everything that NVIDIA's containers allow, and more."""
    PRODUCTS.allow_tf32 = CUDNN.allow_tf32 = True
    PRODUCTS.allow_fp16_reduced_precision_reduction = PRODUCTS.allow_bf16_reduced_precision_reduction = True
    PRODUCTS.allow_fp16_accumulation = True


def test_fp32_is_fp32_and_sums_of_16_bit_products_are() -> None:
    loosen()
    assert has_tf32()
    exact_fp32()
    assert not has_tf32() and not PRODUCTS.allow_tf32 and not CUDNN.allow_tf32
    assert not PRODUCTS.allow_fp16_reduced_precision_reduction and not PRODUCTS.allow_bf16_reduced_precision_reduction
    assert not PRODUCTS.allow_fp16_accumulation
    assert torch.get_float32_matmul_precision() == "highest"  # FlexAttention's fp32 kernels read this setting


def test_a_general_wish_for_tf32_does_not_come_back_through_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """If only cuDNN's older switch is off, `torch.backends.fp32_precision` decides."""
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    CUDNN.allow_tf32 = False
    assert has_tf32()
    exact_fp32()
    assert not has_tf32()


def test_tf32_lasts_as_long_as_it_was_asked_for() -> None:
    exact_fp32()
    with tf32(True):
        assert has_tf32() and PRODUCTS.allow_tf32 and CUDNN.allow_tf32
        with tf32(False):
            assert not has_tf32()
        assert has_tf32()
    assert not has_tf32() and not PRODUCTS.allow_tf32 and not CUDNN.allow_tf32
    CUDNN.allow_tf32 = True  # torch's default
    with tf32(False):
        assert not has_tf32()
    assert CUDNN.allow_tf32 and not PRODUCTS.allow_tf32
    exact_fp32()
    with pytest.raises(RuntimeError, match="inside"), tf32(True):
        raise RuntimeError("inside")
    assert not has_tf32()
