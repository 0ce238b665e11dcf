"""Fused functions run uncompiled on CPUs, and as one compiled call on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_ds.ops import fused as fused_module
from dalle_ds.ops.compiling import VARIANTS
from dalle_ds.ops.fused import FUSED, Fused, fused


@pytest.fixture
def double() -> Any:
    @fused(kernels=1)
    def double(x: Tensor, plus: float) -> Tensor:
        return x * 2 + plus

    yield double
    del FUSED[double.name]


def test_on_cpus_it_is_the_function_itself(double: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_module, "observer", lambda *_: pytest.fail("asked on a CPU"))
    assert double(torch.ones(3), 1.0).tolist() == [3.0] * 3
    assert double.__name__ == "double" and double.kernels == 1


def test_on_cuda_tensors_the_observer_is_asked_instead(double: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda(Tensor):
        is_cuda = True

    seen = []
    monkeypatch.setattr(fused_module, "observer", lambda function, args: seen.append((function.name, args[1])))
    double(torch.ones(3).as_subclass(OnCuda), 2.0)
    assert seen == [(double.name, 2.0)]


def test_where_nothing_can_compile_it_runs_plainly_and_says_so_once(
    double: Fused, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused_module, "compile_problem", lambda: "there is no compiler for this test")
    fused_module._warn_once.cache_clear()
    other = Fused(double.plain, 1, 1)
    assert double._compiled is double.plain and other._compiled is double.plain
    assert caplog.text.count("there is no compiler for this test") == 1


def test_a_compiled_function_takes_many_variants(double: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run needs more variants than Dynamo's default of 8: dtypes, sizes, with and without gradients.
    It would reach the limit in the middle of training."""
    monkeypatch.setattr(fused_module, "compile_problem", lambda: None)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would delete the setting at the end
        compiled = double._compiled
        for n_dims in range(1, 13):
            assert compiled(torch.ones([2] * n_dims), float(n_dims)).flatten()[0] == 2 + n_dims
        assert torch._dynamo.config.recompile_limit == VARIANTS
