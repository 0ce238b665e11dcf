"""fp16 products of residual branches: which of them are computed, and fp16 weights with fp32 gradients."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from dalle_ds.models.prior import Prior, PriorConfig, initialise
from dalle_ds.models.resblock import BranchLinear, InputsFirstLinear
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.precision import fp16_branches
from dalle_ds.precision.fp16_branches import unread_product, use_fp16_branches

CONFIG = PriorConfig(n_layers=2, n_heads=2, d_head=8, text_len=5, grid=4, vocab_size=11, n_codes=13, conv_kernel=3)


def fp16_prior() -> Prior:
    prior = Prior(CONFIG)
    initialise(prior, torch.Generator().manual_seed(0))
    use_fp16_branches(prior)
    return prior


def test_recomputation_leaves_out_the_product_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, products = fp16_prior(), Counter()
    recompute_layers(prior)
    plain = fp16_branches.linear_fp16

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        products[(tuple(weight.shape), bias is not None)] += 1
        return plain(x, weight, bias)

    monkeypatch.setattr(fp16_branches, "linear_fp16", counted)
    nll = prior(torch.randint(11, (2, 4)), torch.randint(13, (2, 16)))
    (nll.text_sum + nll.image_sum).backward()
    d, n = CONFIG.d_model, CONFIG.n_layers
    forward = {shape: products[(shape, True)] for shape in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))}
    assert forward == {(3 * d, d): 2 * n, (d, d): 2 * n, (4 * d, d): 2 * n, (d, 4 * d): n}


def test_a_product_that_was_left_out_has_its_gradients() -> None:
    layer = fp16_prior().layers[0].mlp.branch.project
    x = torch.randn(3, 4 * CONFIG.d_model, dtype=torch.float16)
    grad = torch.randn(3, CONFIG.d_model).half()
    found = []
    for unread in (False, True):
        inputs = x.clone().requires_grad_()
        if unread:
            with unread_product(layer):
                out = layer(inputs)
        else:
            out = layer(inputs)
        out.backward(grad)
        found.append([inputs.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
        layer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(layer(x), layer(x)), "outside it computes as ever"


def test_an_fp16_weight_has_fp32_gradients_and_gives_the_same_numbers() -> None:
    wide, narrow = BranchLinear(8, 4), BranchLinear(8, 4)
    narrow.load_state_dict(wide.state_dict())
    narrow.weight.grad_dtype = torch.float32
    narrow.weight.data = narrow.weight.data.half()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).half()
    for layer in (wide, narrow):
        layer.use_matmul(fp16_branches._LinearFP16.apply)
        layer(x).sum().backward()
    assert torch.equal(wide(x), narrow(x))
    assert narrow.weight.grad.dtype is torch.float32 and torch.equal(wide.weight.grad, narrow.weight.grad)


@pytest.mark.parametrize("half", [False, True])
def test_a_weight_with_its_inputs_first_gives_the_same_numbers(half: bool) -> None:
    """The transposed storage of the MLP's second matrix changes neither its products nor its gradients."""
    plain, stored = BranchLinear(16, 4), InputsFirstLinear(16, 4)
    with torch.no_grad():
        stored.weight.copy_(plain.weight.t())
        stored.bias.copy_(plain.bias)
    assert stored.weight.shape == (16, 4) and torch.equal(stored.weight_OI, plain.weight)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    if half:
        plain.use_matmul(fp16_branches._LinearFP16.apply)
        stored.use_matmul(fp16_branches._InputsFirstFP16.apply)
        x = x.half()
    found = []
    for layer in (plain, stored):
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        out.float().square().sum().backward()
        found.append((out, inputs.grad, layer.weight.grad if layer is plain else layer.weight.grad.t(), layer.bias.grad))
    assert stored.weight.grad.is_contiguous()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if half else 1e-5, atol=1e-3 if half else 1e-6)
