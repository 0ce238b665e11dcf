"""Decoding caches and reads every key that the mask allows, and no other key."""

import pytest
import torch

from dalle_ds.ops.attention.decoding import attend_to_reach, reach_of
from dalle_ds.ops.attention.masks import Pattern, SparseMask
from dalle_ds.ops.fp16 import batched_matmul_to_fp32

CPU = torch.device("cpu")


@pytest.mark.parametrize("pattern", list(Pattern))
@pytest.mark.parametrize(("grid", "kernel"), [(1, 3), (4, 3), (5, 11), (8, 5), (32, 11)])
def test_every_query_reads_exactly_its_keys(pattern: Pattern, grid: int, kernel: int) -> None:
    """Simulate the ring buffer: where each image slot is stored after slot j was written, and which of them query j reads."""
    mask = SparseMask(pattern, 4, grid, kernel)
    reach, seen = reach_of(mask, CPU), mask.dense()[4:, 4:]
    held = torch.full((reach.ring,), -1)
    for j in range(grid * grid):
        held[j % reach.ring] = j
        read = held if reach.read_NW is None else held[reach.read_NW[j]]
        keys = read[reach.hidden_NW[j] == 0].tolist()
        assert sorted(keys) == seen[j].nonzero().flatten().tolist(), f"slot {j}"


def test_sizes_at_the_papers_sequence() -> None:
    """A query reads the text and 33, 32 or 61 image keys. Only column layers need a large ring buffer."""
    reaches = {pattern: reach_of(SparseMask(pattern, 256, 32, 11), CPU) for pattern in Pattern}
    sizes = {pattern: (reach.ring, reach.hidden_NW.shape[1]) for pattern, reach in reaches.items()}
    assert sizes == {Pattern.ROW: (33, 33), Pattern.COLUMN: (993, 32), Pattern.CONV: (166, 61)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_softmax_over_shared_text_and_own_keys(dtype: torch.dtype) -> None:
    """Two captions with three candidates each, compared in fp64 with attention over all keys, repeated for each candidate."""
    generator = torch.Generator().manual_seed(0)
    text_k, text_v = (torch.randn(2, 4, 7, 16, generator=generator).to(dtype) for _ in range(2))
    q, k, v = (torch.randn(6, 4, n, 16, generator=generator).to(dtype) for n in (1, 5, 5))
    hidden = torch.tensor([0.0, 0.0, float("-inf"), 0.0, float("-inf")])
    out = attend_to_reach(q, text_k, text_v, k, v, hidden)
    keys, values = (torch.cat([t.repeat_interleave(3, 0), own], 2).double() for t, own in ((text_k, k), (text_v, v)))
    mask = torch.cat([torch.zeros(7), hidden]).double()[None]
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), keys, values, attn_mask=mask)
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert out.dtype is dtype and (out - expected).norm() < limit * expected.norm()


NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bit_numbers_stay_fp32(dtype: torch.dtype, device: str) -> None:
    a, b = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(device, dtype) for _ in range(2))
    out = batched_matmul_to_fp32(a, b.mT)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out.double(), a.double() @ b.mT.double(), rtol=1e-5, atol=1e-5)
