"""Kernels that torch.compile generates for GPUs fit an A100 and an H100, and compute correct numbers. No GPU is needed."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dalle_ds.bench.fake_cuda.stub import stub_problem
from dalle_ds.ops.attention.masks import Pattern
from tests.support.launching import ROOT, run

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is missing: install the extra `kernels` (Linux)"
    ),
    pytest.mark.skipif(stub_problem() is not None, reason=f"no fake CUDA: {stub_problem()}"),
]

SHARED = {"80": 163 << 10, "90": 227 << 10}
"""Maximum bytes of shared memory per block, by compute capability."""
REGISTERS = 1 << 16
"""Registers that the threads of a block share."""
ROUNDED = 2.0**-22
"""Rounding error of an fp32 result, and of the last sum that produces it."""
SPILLED = {("80", "forward"): 128, ("80", "backward"): 256, ("90", "forward"): 320, ("90", "backward"): 0}
"""Limits of spilled bytes per thread of FlexAttention (written plus read), slightly above torch 2.13's. With thousands of bytes
the kernel would be very slow."""


def child(module: str, folder: Path, *, interpret: bool) -> None:
    """Run a module of this folder in a child process, with its own compiler caches."""
    settings = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        "TRITON_INTERPRET": str(int(interpret)),
    }
    done = run([sys.executable, "-m", f"tests.cuda_path.{module}", str(folder)], ROOT, settings)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the kernels generated for both GPUs."""
    folder = tmp_path_factory.mktemp("kernels")
    child("cases.kernels", folder, interpret=True)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """Results of the interpreted kernels, by case."""
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def code(folder: Path) -> dict[str, dict[str, dict[str, list[dict[str, Any]]]]]:
    """Figures of the machine code by compute capability, module and kernel, for each autotuning candidate."""
    child("ptxas", folder, interpret=False)
    return json.loads((folder / "code.json").read_text())


@pytest.mark.parametrize("n_slots", [88, 356, 1280])
@pytest.mark.parametrize("pattern", list(Pattern))
def test_flex_computes_attention_and_its_gradients(pattern: Pattern, n_slots: int, found: dict[str, Any]) -> None:
    """Against fp64, for q, k, v in the layout of the fused projection. The limit is tighter than `verify_attention`'s. Nothing
    copies q, k, v, the result or their gradients."""
    case = found[f"flex {pattern} {n_slots}"]
    for what, (ours, dense) in case["errors"].items():
        assert ours <= 1.6 * dense and ours < 4e-4, what
    assert case["moved"] == []
    # the second kernel sums rows of out * grad
    assert [name.rstrip("_0123456789").removeprefix("triton_") for name in case["kernels"]] == [
        "tem_fused_flex_attention",
        "per_fused_flex_attention_backward",
        "tem_fused_flex_attention_backward",
    ]


@pytest.mark.parametrize("sm", ["80", "90"])
@pytest.mark.parametrize("pattern", list(Pattern))
def test_flex_spills_no_more_than_it_did(pattern: Pattern, sm: str, code: dict[str, Any]) -> None:
    for i, direction in enumerate(("forward", "backward")):
        kernels = code[sm][f"flex {pattern} {i}"]
        ((kernel,),) = (candidates for name, candidates in kernels.items() if name.startswith("triton_tem"))
        assert kernel["spilled"] <= SPILLED[sm, direction], kernel


def test_every_kernel_fits_its_card(code: dict[str, Any]) -> None:
    for sm, modules in code.items():
        for module, kernels in modules.items():
            assert kernels, f"sm_{sm}, {module}: no kernel in it"
            for name, candidates in kernels.items():
                for kernel in candidates:
                    where = f"sm_{sm}, {module}, {name}: {kernel}"
                    assert kernel["sm"] == int(sm), where
                    assert kernel["shared"] <= SHARED[sm], where
                    assert kernel["registers"] * kernel["threads"] <= REGISTERS, where
                    assert kernel["spilled"] == 0 or name.startswith("triton_tem_fused_flex"), where


@pytest.mark.parametrize("moments", ["low_bit", "fp32"])
def test_compiled_adamw_is_eager_adamw(found: dict[str, Any], code: dict[str, Any], moments: str) -> None:
    """Codes of moments are bitwise equal, weights and fp32 moments within one unit in the last place. It is one kernel. No
    instruction flushes subnormals to zero, because the smallest codes are decoded through subnormals."""
    case = found[f"adamw {moments}"]
    assert case["moved"] > 8000 and case["ulp"] <= 1
    assert max(case["moments"]) <= (0 if moments == "low_bit" else 1)
    assert len(case["kernels"]) == 1
    for modules in code.values():
        (candidates,) = modules[f"adamw {moments} 0"].values()
        assert all(kernel["ftz"] == [] for kernel in candidates)


def test_fused_functions_are_as_exact_as_plain_ones(found: dict[str, Any]) -> None:
    for name, case in found.items():
        if "declared" in case:
            for shape, errors in case["errors"].items():
                for error in errors:
                    ours, limit = (error, 0) if isinstance(error, int) else (error[0], 2 * error[1] + ROUNDED)
                    assert ours <= limit, f"{name} of {shape}: {errors}"


def test_fused_functions_are_as_few_kernels_as_they_say(found: dict[str, Any]) -> None:
    """The maximum over the shapes of the paper's runs."""
    cases = {name: case for name, case in found.items() if "declared" in case}
    counted = {name: max(map(len, case["kernels"].values())) for name, case in cases.items()}
    assert counted == {name: case["declared"] for name, case in cases.items()}
