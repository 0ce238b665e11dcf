"""Every attention backend equals the dense reference in outputs and gradients, and is causal."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_ds.errors import ConfigError
from dalle_ds.ops.attention import structured
from dalle_ds.ops.attention.backends import BACKENDS, attention_backend, backend_problem, choose_backend, errors_against_dense
from dalle_ds.ops.attention.dense import DenseAttention
from dalle_ds.ops.attention.masks import Pattern, SparseMask, transpose_grid

CPU = torch.device("cpu")
GEOMETRIES = [(6, 4, 3), (3, 5, 5), (2, 8, 11), (5, 8, 5), (1, 1, 3), (4, 16, 11)]
"""(n_text, grid, conv_kernel). Includes text shorter than a window, windows wider than the grid, and a grid of one slot."""

FULL = [(256, 32, 11)]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("pattern", list(Pattern))
@pytest.mark.parametrize("geometry", GEOMETRIES + FULL)
def test_structured_equals_dense_in_fp32_and_fp64(
    pattern: Pattern, geometry: tuple[int, int, int], dtype: torch.dtype, limit: float
) -> None:
    mask = SparseMask(pattern, *geometry)
    errors = errors_against_dense(attention_backend("structured", mask, CPU), mask, 3, 16, dtype, CPU)
    assert errors["out"][0] < limit and errors["grad"][0] < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", list(Pattern))
@pytest.mark.parametrize("geometry", [(5, 8, 5), (256, 32, 11)])
def test_structured_is_as_exact_as_dense_in_16_bits(
    pattern: Pattern, geometry: tuple[int, int, int], dtype: torch.dtype
) -> None:
    mask = SparseMask(pattern, *geometry)
    errors = errors_against_dense(attention_backend("structured", mask, CPU), mask, 2, 64, dtype, CPU)
    for ours, dense in errors.values():
        assert ours <= 1.4 * dense  # merging the two parts rounds once more than dense attention


@pytest.mark.parametrize("pattern", list(Pattern))
def test_short_training_in_bf16_is_as_exact_as_the_flash_kernel(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = SparseMask(pattern, 30, 8, 5)
    kept = errors_against_dense(DenseAttention(mask, CPU), mask, 2, 64, torch.bfloat16, CPU, batch=2)
    monkeypatch.setattr("dalle_ds.ops.attention.dense.SHORT", 0)
    flash = errors_against_dense(DenseAttention(mask, CPU), mask, 2, 64, torch.bfloat16, CPU, batch=2)
    assert kept != flash  # both ways ran
    for name in ("out", "grad"):
        assert kept[name][0] <= 1.4 * flash[name][0]


@pytest.mark.parametrize("pattern", list(Pattern))
def test_large_scores_cost_no_exactness(pattern: Pattern) -> None:
    """Some keys have weights e^60 times those of others. Half-precision scores would be off by 0.12 here; ours are fp32."""
    mask = SparseMask(pattern, 16, 8, 5)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 1, 2, mask.n_slots, 64, generator=generator)
    qkv[:2] *= 8
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        results = []
        for backend in (DenseAttention(mask, CPU), attention_backend("structured", mask, CPU)):
            q, k, v = (part.to(dtype).requires_grad_() for part in qkv)
            backend(q, k, v).sum().backward()
            results.append(torch.cat([q.grad, k.grad, v.grad]).float())
        assert (results[1] - results[0]).norm() < limit * results[0].norm()


@pytest.mark.parametrize("name", ["dense", "structured"])
@pytest.mark.parametrize("pattern", list(Pattern))
def test_no_backend_sees_the_future(pattern: Pattern, name: str) -> None:
    """Perturb one slot after another. The results of exactly those queries must change that may attend to the slot."""
    mask = SparseMask(pattern, 5, 4, 3)
    backend, seen = attention_backend(name, mask, CPU), mask.dense()
    q, k, v = torch.randn(3, 1, 2, mask.n_slots, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = backend(q, k, v)
    for slot in range(mask.n_slots):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, :, slot] += 1
        changed_v[:, :, slot] -= 1
        moved = (backend(q, changed_k, changed_v) - before).abs().amax((0, 1, 3)) > 1e-9
        assert torch.equal(moved, seen[:, slot]), f"slot {slot}"


class Branch(nn.Module):
    """A fused projection, attention and an output projection, with the strides and the graph of the model."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.attend = nn.Linear(32, 96), attend

    def forward(self, x_BLC: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BLC).view(*x_BLC.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


def _train(branch: Branch, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = run(branch, x)
    out.float().square().sum().backward()
    return [out.detach().float(), x.grad, branch.qkv.weight.grad]


def _autocast(branch: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return branch(x)


def _deepspeed_checkpoint(branch: nn.Module, x: Tensor) -> Tensor:
    import deepspeed

    return deepspeed.checkpointing.non_reentrant_checkpoint(branch, x)


@pytest.mark.parametrize("pattern", list(Pattern))
@pytest.mark.parametrize(
    ("run", "limit"),
    [
        (lambda branch, x: checkpoint(branch, x, use_reentrant=False), 1e-6),
        (lambda branch, x: checkpoint(branch, x, use_reentrant=True), 1e-6),
        (_deepspeed_checkpoint, 1e-6),
        (_autocast, 2e-2),
        (lambda branch, x: torch.compile(branch, fullgraph=True, backend="aot_eager_decomp_partition")(x), 1e-6),
    ],
    ids=["checkpoint", "reentrant checkpoint", "deepspeed checkpoint", "autocast", "compile"],
)
def test_structured_equals_dense_however_it_is_run(pattern: Pattern, run: Callable, limit: float) -> None:
    mask = SparseMask(pattern, 4, 8, 5)
    x = torch.randn(2, mask.n_slots, 32, generator=torch.Generator().manual_seed(1))
    plain = _train(Branch(DenseAttention(mask, CPU)), lambda branch, x: branch(x), x)
    ours = _train(Branch(attention_backend("structured", mask, CPU)), run, x)
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).norm() < limit * b.norm()


@pytest.mark.parametrize("pattern", list(Pattern))
def test_no_gradient_is_made_where_none_is_wanted(pattern: Pattern) -> None:
    mask = SparseMask(pattern, 4, 4, 3)
    q, k, v = torch.randn(3, 1, 1, mask.n_slots, 16)
    with torch.inference_mode():
        torch.testing.assert_close(attention_backend("structured", mask, CPU)(q, k, v), DenseAttention(mask, CPU)(q, k, v))


@pytest.mark.parametrize("pattern", list(Pattern))
@pytest.mark.parametrize("geometry", [(6, 4, 3), (128, 16, 11), (256, 32, 11)])
def test_flex_masks_are_the_mask_in_the_order_of_the_layer(pattern: Pattern, geometry: tuple[int, int, int]) -> None:
    """Checks FlexAttention's mask function for every pair and its block mask, on any device.
    FlexAttention itself has no backward pass on CPUs."""
    from torch.nn.attention.flex_attention import create_mask

    from dalle_ds.ops.attention.flex import BLOCK, FlexAttention

    mask = SparseMask(pattern, *geometry)
    flex = FlexAttention(mask, CPU)
    n = mask.n_slots
    expected = mask.dense()
    if flex.columns_first:
        order = transpose_grid(torch.arange(n)[None], mask.n_text, mask.grid)[0]
        expected = expected[order][:, order]
    assert flex.columns_first == (pattern is Pattern.COLUMN)
    assert torch.equal(create_mask(flex.block_mask.mask_mod, 1, 1, n, n, device="cpu")[0, 0], expected)
    n_blocks = -(-n // BLOCK)
    padded = torch.zeros(n_blocks * BLOCK, n_blocks * BLOCK, dtype=torch.bool)
    padded[:n, :n] = expected
    assert torch.equal(
        flex.block_mask.to_dense()[0, 0].bool(), padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(3).any(1)
    )


def test_transposed_columns_and_rows_leave_blocks_out() -> None:
    """Number of 128 x 128 blocks that are computed at the paper's size.
    Causal attention has 55, and so would column layers in raster order."""
    from dalle_ds.ops.attention.flex import FlexAttention

    live = {p: int(FlexAttention(SparseMask(p, 256, 32, 11), CPU).block_mask.to_dense().sum()) for p in Pattern}
    assert live == {Pattern.ROW: 34, Pattern.COLUMN: 27, Pattern.CONV: 40}


def test_impossible_backends_are_refused_with_the_reason() -> None:
    mask = SparseMask(Pattern.ROW, 4, 4, 3)
    with pytest.raises(ConfigError, match="'flex' can't be used: its backward pass needs CUDA, but the device is cpu"):
        attention_backend("flex", mask, CPU)
    with pytest.raises(ConfigError, match="'fast' can't be used: no backend has this name; expected one of flex, structured"):
        attention_backend("fast", mask, CPU)
    assert "it uses CPU operators" in backend_problem("structured", torch.device("cuda"))
    assert {name for name in BACKENDS if backend_problem(name, CPU) is None} == {"structured", "dense"}


def test_the_fastest_is_chosen_and_the_log_says_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_backend(CPU, grid=32) == "structured"
    assert choose_backend(CPU, grid=8) == "dense"
    assert not caplog.records
    monkeypatch.setattr(structured, "_FORWARD", "_operator_of_the_past")
    with caplog.at_level(logging.WARNING):
        assert choose_backend(CPU, grid=32) == "dense"
    assert "dense instead of structured" in caplog.text and "lacks _operator_of_the_past" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["flex", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern", list(Pattern))
def test_cuda_backends_are_as_exact_as_dense(pattern: Pattern, dtype: torch.dtype, name: str) -> None:
    cuda = torch.device("cuda", 0)
    mask = SparseMask(pattern, 256, 32, 11)
    errors = errors_against_dense(attention_backend(name, mask, cuda), mask, 4, 64, dtype, cuda)
    limit = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for ours, dense in errors.values():
        assert ours <= 1.5 * dense and ours < limit
