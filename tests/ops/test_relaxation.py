"""The relaxed sample becomes a categorical sample as tau goes to 0. The KL is that of the plain logits."""

import math

import pytest
import torch

from dalle_ds.ops.relaxation import gumbel_softmax, kl_terms, kl_to_uniform


def test_argmax_of_the_sample_follows_the_categorical() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    n = 200_000
    sample = gumbel_softmax(logits.view(1, 4, 1, 1).expand(n, 4, 1, 1), tau=0.7, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(sample.argmax(dim=1).flatten(), minlength=4) / n
    torch.testing.assert_close(share, torch.softmax(logits, 0), atol=4e-3, rtol=0)


def test_sample_is_soft_and_hardens_with_tau() -> None:
    logits = torch.randn(8, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    samples = [gumbel_softmax(logits, tau, torch.Generator().manual_seed(2)) for tau in (1.0, 0.0625, 1e-4)]
    for sample in samples:
        torch.testing.assert_close(sample.sum(dim=1), torch.ones(8, 4, 4))
    tops = [sample.amax(dim=1).mean().item() for sample in samples]
    assert tops[0] < 0.6 < tops[1] < tops[2]
    assert tops[2] == pytest.approx(1.0, abs=1e-3)


def test_same_seed_same_sample_in_both_memory_formats() -> None:
    logits = torch.randn(2, 5, 3, 3)
    channels_last = logits.to(memory_format=torch.channels_last)
    assert torch.equal(*(gumbel_softmax(x, 0.5, torch.Generator().manual_seed(3)) for x in (logits, channels_last)))


def test_gradient_reaches_every_logit() -> None:
    logits = torch.randn(1, 6, 2, 2, requires_grad=True)
    (gumbel_softmax(logits, 1.0) * torch.randn(1, 6, 2, 2)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.ne(0).all()


def test_kl_against_torch_and_its_ends() -> None:
    logits = torch.randn(3, 7, 2, 2, dtype=torch.float64) * 3
    rows = logits.permute(0, 2, 3, 1).float()
    uniform = torch.distributions.Categorical(logits=torch.zeros_like(rows))
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=rows), uniform)
    torch.testing.assert_close(kl_to_uniform(logits), expected)
    assert kl_to_uniform(torch.zeros(1, 512, 1, 1)).item() == pytest.approx(0.0, abs=1e-5)
    assert kl_to_uniform(1e4 * torch.eye(512).view(1, 512, 512, 1)).mean().item() == pytest.approx(math.log(512))


def test_mean_kl_sees_unused_codes_but_not_sharp_ones() -> None:
    one_hot = 1e4 * torch.eye(8).view(1, 8, 8, 1)  # every cell is certain of its code, and every code is used once
    assert kl_terms(one_hot)[1].item() == pytest.approx(0.0, abs=1e-5)
    assert kl_to_uniform(one_hot).mean().item() == pytest.approx(math.log(8))
    same = one_hot[:, :, :1].expand(1, 8, 8, 1)  # every cell has code 0
    assert kl_terms(same)[1].item() == pytest.approx(math.log(8))
    each, of_mean = kl_terms(torch.randn(2, 8, 3, 3) * 2)
    assert 0 < of_mean < each


def test_tau_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="tau is 0"):
        gumbel_softmax(torch.zeros(1, 2, 1, 1), 0.0)


def test_both_terms_against_torch_with_their_gradients() -> None:
    logits = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0)).mul(3)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    together = kl_terms(leaves[0])
    q_BKhw = leaves[1].softmax(1)
    q_K = q_BKhw.mean((0, 2, 3))
    apart = kl_to_uniform(leaves[1]).mean(), (q_K * q_K.log()).sum() + math.log(16)
    for terms in (together, apart):
        (terms[0] + 4 * terms[1]).backward()
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_a_code_of_no_probability_gives_finite_gradients() -> None:
    logits = torch.zeros(2, 4, 2, 2)
    logits[:, 3] = -1e4  # exp underflows: q of this code is exactly 0 in all cells
    logits.requires_grad_()
    kl_per_cell, usage_kl = kl_terms(logits)
    (kl_per_cell + usage_kl).backward()
    assert usage_kl.item() == pytest.approx(math.log(4 / 3))
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
