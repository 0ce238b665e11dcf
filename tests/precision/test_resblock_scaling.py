"""Per-resblock scaling is exact if nothing over- or underflows, and keeps gradients that any single global scale loses."""

import math

import pytest
import torch
from torch import Tensor, nn

from dalle_ds.models.prior import IMAGE_WEIGHT, TEXT_WEIGHT, Prior, PriorConfig, initialise
from dalle_ds.models.resblock import MLP, ResBlock
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.precision.resblock_scaling import ResblockGradScaler, ResblockScalingConfig

CONFIG = PriorConfig(n_layers=3, n_heads=2, d_head=16, text_len=5, grid=4, vocab_size=11, n_codes=13, conv_kernel=3)
WIDE = ResblockScalingConfig(min_scale_power=-60, max_scale_power=100)


def make_prior() -> Prior:
    prior = Prior(CONFIG)
    initialise(prior, torch.Generator().manual_seed(0))
    return prior


def backward(prior: Prior, scaler: ResblockGradScaler | None = None) -> float:
    generator = torch.Generator().manual_seed(1)
    text, image = torch.randint(0, 11, (8, 4), generator=generator), torch.randint(0, 13, (8, 16), generator=generator)
    nll = prior(text, image)
    loss = TEXT_WEIGHT * nll.text_sum / nll.n_text + IMAGE_WEIGHT * nll.image_sum / nll.n_image
    loss.backward()
    if scaler:
        scaler.unscale()
    return loss.item()


def test_scale_of_one_is_plain_fp16_to_the_bit() -> None:
    plain, scaled = make_prior(), make_prior()
    use_fp16_branches(plain)
    scaler = ResblockGradScaler(scaled, ResblockScalingConfig(initial_scale_power=0, min_scale_power=0))
    assert backward(plain) == backward(scaled, scaler)
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("power", [0, 10])
def test_gradients_equal_fp32_up_to_rounding(power: int) -> None:
    reference, scaled = make_prior(), make_prior()
    scaler = ResblockGradScaler(scaled, ResblockScalingConfig(initial_scale_power=power, min_scale_power=0))
    assert backward(scaled, scaler) == pytest.approx(backward(reference), rel=1e-4)
    for (name, a), b in zip(reference.named_parameters(), scaled.named_parameters(), strict=True):
        error, size = (a.grad - b[1].grad).norm(), a.grad.norm()
        assert error <= 5e-3 * size, f"{name}: error {error:.1e} of {size:.1e}"


class _Damp(torch.autograd.Function):
    """Identity in the forward pass. The backward pass multiplies by 2^-power."""

    @staticmethod
    def forward(ctx, x: Tensor, power: int) -> Tensor:
        ctx.power = power
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 2.0**-ctx.power, None


class Damped(nn.Module):
    """Four residual blocks. Gradients shrink by 2^-13 from each block
    to the previous one, so by 2^-39 from the last to the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(ResBlock(32, MLP(32)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(_Damp.apply(x, 13) if i else x)
        return x


def lost_share(block: ResBlock) -> float:
    grads = torch.cat([p.grad.flatten() for p in block.branch.parameters() if p.dim() == 2])
    return grads.eq(0).double().mean().item()


def run_damped(powers: list[float] | None) -> tuple[Damped, ResblockGradScaler | None]:
    model = Damped()
    scaler = None
    if powers is not None:
        scaler = ResblockGradScaler(model, WIDE)
        scaler.scale.copy_(torch.tensor([2.0**p for p in powers]))
        scaler.begin()
    x = torch.randn(16, 6, 32, generator=torch.Generator().manual_seed(2))
    (model(x).square().mean() * 2.0**-6).backward()
    if scaler:
        scaler.unscale()
    return model, scaler


def test_gradients_over_forty_powers_of_two_need_a_scale_each() -> None:
    reference, _ = run_damped(None)
    sizes = [max(p.grad.abs().max().item() for p in block.parameters()) for block in reference.blocks]
    assert math.log2(sizes[3] / sizes[0]) > 38

    for power in range(0, 48, 4):  # with any global scale, either the first blocks underflow or the last overflows
        model, scaler = run_damped([power] * 4)
        lost = lost_share(model.blocks[0])
        assert lost > 0.5 or scaler.found_nonfinite.any(), f"global scale 2^{power} loses {lost:.0%} of the first block"

    model, scaler = run_damped([13 * (4 - i) for i in range(4)])
    assert not scaler.found_nonfinite.any()
    for i, (block, plain) in enumerate(zip(model.blocks, reference.blocks, strict=True)):
        assert lost_share(block) < 0.01, f"block {i}"
        for p, q in zip(block.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=float(q.grad.abs().max()) * 5e-3)


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, value: float) -> Tensor:
        ctx.value = value
        return y.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad.view(-1)[3] = ctx.value
        return grad, None


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_event_is_seen_in_its_block_and_filtered_for_the_others(value: float) -> None:
    prior = make_prior()
    scaler = ResblockGradScaler(prior, ResblockScalingConfig())
    victim = 3
    branch = scaler.blocks[victim].branch
    whole = branch.forward
    branch.forward = lambda *args: _Poison.apply(whole(*args), value)
    backward(prior, scaler)
    assert scaler.found_nonfinite.nonzero().flatten().tolist() == [victim]
    others = [p for i, block in enumerate(scaler.blocks) if i != victim for p in block.parameters()]
    assert all(p.grad.isfinite().all() for p in [*others, *prior.embed.parameters(), *prior.heads.parameters()])
    assert not all(p.grad.isfinite().all() for p in scaler.blocks[victim].parameters())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_entry_raises_the_flag(value: float) -> None:
    scaler = ResblockGradScaler(make_prior(), ResblockScalingConfig())
    weight = scaler.blocks[3].branch.project.weight
    grad = torch.ones_like(weight)
    (weight * 1).backward(grad)
    scaler.unscale()
    assert not scaler.found_nonfinite.any()
    grad[2, 5] = value
    (weight * 1).backward(grad)
    scaler.unscale()
    assert scaler.found_nonfinite.tolist() == [0, 0, 0, 1, 0, 0]


def test_policy_follows_the_paper() -> None:
    prior = make_prior()
    scaler = ResblockGradScaler(prior, ResblockScalingConfig())
    fine, bad = torch.zeros(6), torch.zeros(6)
    bad[2] = 1
    scaler.update(bad)  # the first non-finite gradient lowers the scale: there was no back-off before
    assert scaler.scale[2].item() == pytest.approx(2**12.5)
    assert scaler.scale[0].item() == pytest.approx(2 ** (13 + 1 / 1000))
    for _ in range(124):
        scaler.update(bad)
    assert scaler.scale[2].item() == pytest.approx(2**12.5), "within the window a scale is not lowered again"
    scaler.update(bad)
    assert scaler.scale[2].item() == pytest.approx(2**12.0)
    before = scaler.scale[2].item()
    for _ in range(1000):
        scaler.update(fine)
    assert scaler.scale[2].item() == pytest.approx(2 * before, rel=1e-3), "a thousand finite updates double a scale"


def backward_flags(prior: Prior, scaler: ResblockGradScaler) -> Tensor:
    prior.zero_grad()
    scaler.begin()
    backward(prior, scaler)
    flags = scaler.found_nonfinite.clone()
    scaler.found_nonfinite.zero_()
    return flags


def test_calibrated_scales_are_the_highest_finite_ones_less_a_margin() -> None:
    prior = make_prior()
    scaler = ResblockGradScaler(prior, ResblockScalingConfig(min_scale_power=-60, max_scale_power=60, calibration_trials=8))
    scaler.calibrate(lambda: backward_flags(prior, scaler))
    found = scaler.scale.clone()
    assert not backward_flags(prior, scaler).any()
    for i in range(len(scaler.names)):
        for powers, is_finite in ((0.9, True), (2.1, False)):  # eight bisections of 120 powers leave an interval of about 0.5
            scaler.scale.copy_(found)
            scaler.scale[i] *= 2**powers
            assert backward_flags(prior, scaler)[i] == (not is_finite), f"{scaler.names[i]}, 2^{powers} above what was found"


@pytest.mark.parametrize("trials", [1, 4, 10])
def test_calibration_is_not_deceived_by_overflows_that_hide_others(trials: int) -> None:
    scaler = ResblockGradScaler(make_prior(), ResblockScalingConfig(calibration_trials=trials))
    limits = torch.tensor([9.0, 12, 15, 18, 21, 30])

    def attempt() -> Tensor:
        powers, bad = scaler.scale.log2(), torch.zeros(6)
        for i in reversed(range(6)):  # while a later block overflows, a block tolerates six more powers of two
            bad[i] = powers[i] > limits[i] + (6 if bad.any() else 0)
        return bad

    scaler.calibrate(attempt)
    powers = scaler.scale.log2()
    assert (powers <= limits).all() and (powers > limits.clamp(max=24) - 2 - 17 / 2**trials).all()


def test_calibration_ends_where_a_block_never_is_finite() -> None:
    scaler, attempts = ResblockGradScaler(make_prior(), ResblockScalingConfig(calibration_trials=5)), []

    def attempt() -> Tensor:
        attempts.append(torch.tensor([0, 0, 1.0, 0, 0, 0]))
        return attempts[-1]

    scaler.calibrate(attempt)
    assert len(attempts) == 5 + 1
    assert scaler.scale.log2()[2] == 7.0
    assert scaler.scale.log2()[0] == pytest.approx(24 - 17 / 2**5 - 1)


def test_scales_stay_within_their_limits() -> None:
    scaler = ResblockGradScaler(
        make_prior(), ResblockScalingConfig(initial_scale_power=7, min_scale_power=7, max_scale_power=7.01, backoff_window=0)
    )
    scaler.update(torch.ones(6))
    assert scaler.scale.log2().tolist() == [7.0] * 6
    assert scaler.at_limits(scaler.log2_scales()) == dict.fromkeys(scaler.names, "floor")
    scaler.update(torch.tensor([1.0, 0, 0, 0, 0, 0]))
    assert scaler.at_limits(scaler.log2_scales()) == {scaler.names[0]: "floor"}
    for _ in range(50):
        scaler.update(torch.zeros(6))
    assert scaler.at_limits(scaler.log2_scales()) == dict.fromkeys(scaler.names, "ceiling")
    assert scaler.scale.log2().max().item() == pytest.approx(7.01, abs=1e-4)


def test_state_round_trip_and_refusal() -> None:
    a, b = (ResblockGradScaler(make_prior(), ResblockScalingConfig()) for _ in range(2))
    bad = torch.tensor([0, 1, 0, 0, 0, 0.0])
    a.update(bad)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.scale, b.scale) and torch.equal(a.since_backoff, b.since_backoff)
    with pytest.raises(ValueError, match="saved scales are for blocks"):
        ResblockGradScaler(Damped(), ResblockScalingConfig()).load_state_dict(a.state_dict())


def test_limits_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="min <= initial <= max"):
        ResblockScalingConfig(initial_scale_power=5)
