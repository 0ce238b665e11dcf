"""AdamW with 16-bit moments, compared with torch's AdamW."""

import copy
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
import torch._inductor.config
from torch import nn

from dalle_ds.ops.low_bit import FORMAT_0_6_10, FORMAT_1_6_9, decode, encode
from dalle_ds.optim import adamw
from dalle_ds.optim.adamw import ClippedAdamW, moment_bytes
from dalle_ds.optim.build import OptimizerSettings, build_adamw
from dalle_ds.optim.groups import decay_groups
from dalle_ds.training.prior.config import PriorOptimizerConfig

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.045}


def parameter(n: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(7)))


def gradient(n: int, step: int) -> torch.Tensor:
    """Gradients of very different magnitudes, as in a deep model."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(6).exp2().clamp_max(4) * 1e-2


def run(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: range) -> None:
    for step in steps:
        p.grad = gradient(p.numel(), step)
        optimizer.step()


def torch_adamw(p: nn.Parameter) -> torch.optim.AdamW:
    return torch.optim.AdamW([p], foreach=False, fused=False, **SETTINGS)


@pytest.mark.parametrize("n", [1, 17, 5000])
def test_with_fp32_moments_it_is_torchs_to_the_last_bit(n: int) -> None:
    ours, theirs = parameter(n), parameter(n)
    a, b = ClippedAdamW([ours], moments="fp32", **SETTINGS), torch_adamw(theirs)
    run(a, ours, range(20))
    run(b, theirs, range(20))
    assert torch.equal(ours, theirs)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(a.state[ours][key], b.state[theirs][key])


def test_low_bit_is_torchs_with_moments_rounded_after_each_step() -> None:
    ours, theirs = parameter(5000), parameter(5000)
    a, b = ClippedAdamW([ours], **SETTINGS), torch_adamw(theirs)
    for step in range(20):
        run(a, ours, range(step, step + 1))
        run(b, theirs, range(step, step + 1))
        assert torch.equal(ours, theirs)
        for key, fmt in (("exp_avg", FORMAT_1_6_9), ("exp_avg_sq", FORMAT_0_6_10)):
            codes = encode(b.state[theirs][key], fmt)
            assert torch.equal(a.state[ours][key], codes)
            b.state[theirs][key].copy_(decode(codes, fmt))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = parameter(1000), parameter(1000)
    run(ClippedAdamW([whole], **SETTINGS), whole, range(3))
    monkeypatch.setattr(adamw, "_PLAIN_CHUNK", 7)  # 1000 is not a multiple of 7
    run(ClippedAdamW([pieces], **SETTINGS), pieces, range(3))
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("moments", ["low_bit", "fp32"])
def test_the_compiled_loop_is_the_plain_one(moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_COMPILED_CHUNK", 3000)
    plain, compiled = parameter(10_000), parameter(10_000)
    settings = {**SETTINGS, "moments": moments}
    a, b = ClippedAdamW([plain], **settings), ClippedAdamW([compiled], compile_from=1, **settings)
    run(a, plain, range(5))
    run(b, compiled, range(5))
    assert adamw._can_compile and adamw._compiled_loop.cache_info().currsize == 1
    # the compiler may fuse a multiplication and an addition, which rounds once instead of twice
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
    for key in ("exp_avg", "exp_avg_sq"):
        if moments == "low_bit":
            assert (a.state[plain][key].int() - b.state[compiled][key].int()).abs().max() <= 1
        else:
            torch.testing.assert_close(a.state[plain][key], b.state[compiled][key], rtol=1e-5, atol=1e-8)


@pytest.fixture
def compiling_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile again: ignore functions that this process has compiled or that are cached on disk."""
    monkeypatch.setattr(adamw, "_can_compile", True)
    adamw._compiled_loop.cache_clear()
    torch.compiler.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield
    adamw._compiled_loop.cache_clear()


def test_without_a_compiler_it_goes_on_operation_by_operation(compiling_anew: None, caplog: pytest.LogCaptureFixture) -> None:
    plain, asked = parameter(100), parameter(100)
    run(ClippedAdamW([plain], **SETTINGS), plain, range(3))
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        run(ClippedAdamW([asked], compile_from=1, **SETTINGS), asked, range(3))
    assert torch.equal(plain, asked) and not adamw._can_compile
    assert "runs uncompiled, several times slower: InvalidCxxCompiler" in caplog.text


@pytest.mark.parametrize("when", ["while it compiles", "in the loop"])
def test_any_other_error_ends_the_step(compiling_anew: None, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The uncompiled loop takes more memory, not less, so continuing with it would only hide the error."""

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        if when == "while it compiles":
            raise torch.OutOfMemoryError("CUDA out of memory")  # as during autotuning
        return lambda *args: torch.empty(2**62, dtype=torch.uint8)

    compiled = torch.compile(adamw._update_chunk, dynamic=True, fullgraph=True, backend=backend)
    monkeypatch.setattr(adamw, "_compiled_loop", cache(lambda: compiled))
    p = parameter(100)
    with pytest.raises(RuntimeError, match="memory"):
        run(ClippedAdamW([p], compile_from=1, **SETTINGS), p, range(1))
    assert torch.equal(p, parameter(100)) and adamw._can_compile


def test_it_learns_as_torchs_does() -> None:
    """200 updates of a small network that learns a function. Final losses are within 2 % of torch's and far below the first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = (x[:, :4] * x[:, 4:]).sum(1, keepdim=True)
    losses = {}
    for name in ("torch", "low_bit"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
        settings = {**SETTINGS, "lr": 3e-3}
        optimizer = (
            ClippedAdamW(net.parameters(), **settings) if name == "low_bit" else torch.optim.AdamW(net.parameters(), **settings)
        )
        history = []
        for _ in range(200):
            loss = nn.functional.mse_loss(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses[name] = history
    assert losses["torch"][-1] < 0.1 * losses["torch"][0]
    assert losses["low_bit"] == pytest.approx(losses["torch"], rel=0.02)
    assert losses["low_bit"] != losses["torch"]


@pytest.mark.parametrize("moments", ["low_bit", "fp32"])
def test_a_huge_gradient_leaves_a_variance_of_five(moments: str) -> None:
    p = nn.Parameter(torch.zeros(2))
    optimizer = ClippedAdamW([p], moments=moments, **{**SETTINGS, "weight_decay": 0.0})
    p.grad = torch.tensor([1e3, 1.0])  # unclipped, the variance would be 0.04 * 1e6 = 40,000
    optimizer.step()
    variance = optimizer.state[p]["exp_avg_sq"]
    variance = decode(variance, FORMAT_0_6_10) if moments == "low_bit" else variance
    assert variance[0] == 5.0 and variance[1] == pytest.approx(0.04, rel=1e-3)
    # the variance is clipped before the parameter is updated; the mean is 100, the bias corrections are 0.1 and 0.04
    assert p[0].item() == pytest.approx(-1e-2 * (100 / 0.1) / (5 / 0.04) ** 0.5, rel=1e-5)
    p.grad = torch.zeros(2)
    optimizer.step()
    variance = optimizer.state[p]["exp_avg_sq"]
    variance = decode(variance, FORMAT_0_6_10) if moments == "low_bit" else variance
    assert variance[0] == pytest.approx(0.96 * 5, rel=1e-3), "the next update starts from the clipped value"


@pytest.mark.parametrize("moments", ["low_bit", "fp32"])
def test_a_recipe_clips_the_variance_with_either_kind_of_moments(moments: str) -> None:
    settings = PriorOptimizerConfig(moments=moments)
    assert settings.variance_clip == 5.0, "the paper's"
    layer = nn.Linear(2, 1, bias=False)
    groups = decay_groups([("layers.0.weight", layer.weight)], 0.0, moments)
    given = OptimizerSettings(1e-2, (0.9, 0.96), 1e-8, 0.0, moments, variance_clip=settings.variance_clip)
    optimizer = build_adamw(groups, given)
    layer.weight.grad = torch.tensor([[1e3, 1.0]])
    optimizer.step()
    variance = optimizer.state[layer.weight]["exp_avg_sq"]
    assert variance.dtype is (torch.int16 if moments == "low_bit" else torch.float32)
    assert (decode(variance, FORMAT_0_6_10) if moments == "low_bit" else variance)[0, 0] == 5.0


def test_state_goes_through_a_file_and_back_as_codes(tmp_path) -> None:
    p = parameter(300)
    optimizer = ClippedAdamW([p], **SETTINGS)
    run(optimizer, p, range(3))
    torch.save({"p": p, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt")
    q = nn.Parameter(saved["p"].detach().clone())
    again = ClippedAdamW([q], **{**SETTINGS, "lr": 1.0})
    again.load_state_dict(saved["optimizer"])
    assert again.param_groups[0]["lr"] == SETTINGS["lr"]
    assert again.state[q]["exp_avg"].dtype is torch.int16 and again.state[q]["step"] == 3
    run(optimizer, p, range(3, 6))
    run(again, q, range(3, 6))
    assert torch.equal(p, q)


def test_moments_of_another_format_are_refused() -> None:
    p, q = parameter(3), parameter(3)
    fp32, low_bit = ClippedAdamW([p], moments="fp32", **SETTINGS), ClippedAdamW([q], **SETTINGS)
    run(fp32, p, range(1))
    state = copy.deepcopy(fp32.state_dict())
    state["param_groups"][0]["moments"] = "low_bit"
    low_bit.load_state_dict(state)
    with pytest.raises(ValueError, match="exp_avg is torch.float32, but the group's moments are low_bit"):
        run(low_bit, q, range(1, 2))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="moments is 'fp8', expected one of fp32, low_bit"):
        ClippedAdamW([{"params": [parameter(1)], "moments": "fp8"}], lr=1.0)
    with pytest.raises(ValueError, match="variance_clip is 9"):
        ClippedAdamW([parameter(1)], lr=1.0, variance_clip=9)
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match=r"bfloat16, expected fp32 \(master weights\)"):
        ClippedAdamW([p], lr=1.0).step()


def test_bytes_are_counted_on_real_tensors() -> None:
    p, q = parameter(100), parameter(10)
    optimizer = ClippedAdamW([{"params": [p]}, {"params": [q], "moments": "fp32"}], lr=1.0)
    assert moment_bytes(optimizer) == 0
    run(optimizer, p, range(1))
    run(optimizer, q, range(1))
    assert moment_bytes(optimizer) == 100 * 4 + 10 * 8
    plain = torch_adamw(p)
    run(plain, p, range(1))
    assert moment_bytes(plain) == 800
