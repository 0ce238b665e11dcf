"""Kernels that torch.compile generates for GPUs, computed by Triton's interpreter and compared. Child process of
test_kernels.py:

    TRITON_INTERPRET=1 python -m tests.cuda_path.cases.kernels FOLDER

Writes errors and names of kernels to FOLDER/found.json, and Inductor's sources for compute capabilities 8.0 and 9.0 to
FOLDER/80 and FOLDER/90. Kernels for an H100 are computed. Kernels for an A100, which have other tile sizes, are only generated.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.ops import kernel_compiler
from dalle_ds.ops.attention.backends import errors_against_dense
from dalle_ds.ops.attention.flex import FlexAttention
from dalle_ds.ops.attention.masks import Pattern, SparseMask
from dalle_ds.ops.fused import FUSED, Fused
from dalle_ds.ops.low_bit import FORMAT_0_6_10, FORMAT_1_6_9, decode, encode
from dalle_ds.optim import adamw
from tests.cuda_path import interpreter
from tests.cuda_path.pretended_gpu import CPU, PretendedGPU, Record
from tests.support.launching import ROOT

PAPER = (256, 32, 11)
GEOMETRIES = {(24, 8, 5): (2, 2), (100, 16, 7): (1, 1), PAPER: (1, 1)}
"""(n_text, grid, conv_kernel): (batch, heads). Sequences: shorter than one block, with partly filled blocks, the paper's."""
D_HEAD = 64
WIDTHS, SLOTS = (2048, 3968), 1280
ADAMW = {"betas": (0.9, 0.96), "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.045, "variance_clip": 5.0}

Draw = Callable[..., Tensor]
"""Draws normally distributed numbers of a given shape."""


class Flex:
    """The project's FlexAttention, with its block mask on the pretended GPU. `moved` names tensors that reached the kernels as
    a copy, or left them with another order of dimensions than q, k, v."""

    def __init__(self, gpu: PretendedGPU, mask: SparseMask, record: Record) -> None:
        self.gpu, self.record = gpu, record
        self.moved: list[str] = []
        self.grads: list[Tensor] = []
        self.flex = FlexAttention(mask, CPU)
        self.columns_first = self.flex.columns_first
        block_mask = self.flex.block_mask
        for name, value in vars(block_mask).items():
            if isinstance(value, Tensor):
                setattr(block_mask, name, gpu.put(value))

    def __call__(self, *qkv_BHLD: Tensor) -> Tensor:
        out_BHLD = self.flex(*map(self.gpu.put, qkv_BHLD))
        self._joined("out", out_BHLD)
        for name, part_BHLD in zip("qkv", qkv_BHLD, strict=True):
            self.read(name, part_BHLD)
            part_BHLD.register_hook(lambda grad_BHLD, name=name: self._joined(f"gradient of {name}", grad_BHLD))
        out_BHLD.register_hook(self.grads.append)
        return out_BHLD

    def read(self, name: str, tensor: Tensor) -> None:
        if tensor.data_ptr() not in self.record.read:
            self.moved.append(name)

    def _joined(self, name: str, tensor_BHLD: Tensor) -> None:
        if not tensor_BHLD.transpose(1, 2).is_contiguous():
            self.moved.append(name)


def flex(gpu: PretendedGPU, found: dict[str, Any] | None) -> None:
    for geometry, (batch, heads) in GEOMETRIES.items():
        if found is None and geometry != PAPER:
            continue
        for pattern in Pattern:
            mask = SparseMask(pattern, *geometry)
            with gpu.recording(computing=found is not None) as record:
                attend = Flex(gpu, mask, record)
                errors = errors_against_dense(attend, mask, heads, D_HEAD, torch.float16, CPU, batch)
                attend.read("gradient", *attend.grads)
            if geometry == PAPER:
                gpu.save(record, f"flex {pattern}")
            if found is not None:
                found[f"flex {pattern} {mask.n_slots}"] = {"errors": errors, "kernels": record.launched, "moved": attend.moved}


def clipped_adamw(gpu: PretendedGPU, found: dict[str, Any] | None) -> None:
    n, generator = 8192 + 100, torch.Generator().manual_seed(0)  # the last block is not full
    size = torch.exp2(torch.linspace(-40, 1, n))
    parameter, grad, mean, deviation = torch.randn(4, n, generator=generator) * torch.stack([torch.ones(n), size, size, size])
    moments = {"low_bit": [encode(mean, FORMAT_1_6_9), encode(deviation**2, FORMAT_0_6_10)], "fp32": [mean, deviation**2]}
    scalars = adamw.scalars_of(7.0, ADAMW)
    for kind, state in moments.items():
        eager, ours = ([tensor.clone() for tensor in (parameter, grad, *state)] for _ in range(2))
        adamw._update_chunk(*eager, scalars, kind == "low_bit")
        with gpu.recording(computing=found is not None) as record:
            adamw._compiled_update(*map(gpu.put, ours), gpu.put(scalars), kind == "low_bit")
        gpu.save(record, f"adamw {kind}")
        if found is not None:
            found[f"adamw {kind}"] = {
                "kernels": record.launched,
                "moved": int((ours[0] != parameter).sum()),
                "ulp": _ulp(ours[0], eager[0]),
                "moments": [
                    int((a != b).sum()) if kind == "low_bit" else _ulp(a, b) for a, b in zip(ours[2:], eager[2:], strict=True)
                ],
            }


def _ulp(a: Tensor, b: Tensor) -> int:
    """Largest distance of fp32 values, in units in the last place."""
    return int((a.view(torch.int32) - b.view(torch.int32)).abs().max())


class Case(NamedTuple):
    """Test case of one fused function."""

    arguments: Callable[[Draw, tuple[int, ...]], tuple[Any, ...]]
    exact: Callable[..., tuple[Tensor, ...]] | None = None
    """Computes its results in fp64. None: the function is elementwise, and must be bitwise equal to its eager form."""
    by_row: bool = False
    """Whether it sums over rows. If so, the compiler generates other kernels for another width and another number of rows."""

    @property
    def trained(self) -> list[tuple[int, ...]]:
        """Shapes of training runs."""
        return [(batch, SLOTS, d) for d in WIDTHS for batch in (1, 8)] if self.by_row else [(8, SLOTS, WIDTHS[1])]

    @property
    def computed(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Pairs of shapes. The first compiles a static variant; the second compiles a variant for any number of rows."""
        widths = zip(WIDTHS, WIDTHS, strict=True) if self.by_row else [WIDTHS]
        return [((2, 3, first), (1, 5, second)) for first, second in widths]


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    mean, variance = x.double().mean(-1, keepdim=True), x.double().var(-1, correction=0, keepdim=True)
    h = F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), eps)
    return h, mean, (variance + eps).rsqrt()


def _norm_backward(
    grad_h: Tensor, grad_x: Tensor, scale: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    F.layer_norm(x, weight.shape, weight, bias, 1e-5).backward(grad_h.double())
    finite = torch.nan_to_num(x.grad, nan=0.0, posinf=0.0, neginf=0.0)
    return grad_x.double() + finite / scale.double(), weight.grad, bias.grad


def _norm_backward_arguments(draw: Draw, shape: tuple[int, ...]) -> tuple[Any, ...]:
    x, weight, bias = 3 * draw(*shape) + 1, draw(shape[-1]), draw(shape[-1])
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    grad_h = draw(*shape).half()
    return grad_h, draw(*shape), torch.tensor(48.0), x, mean, (variance + 1e-5).rsqrt(), weight, bias


def _codes(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return (8000 * draw(*shape)).to(torch.int16)  # any bit pattern is a valid code


CASES = {
    "norm_to_half": Case(
        lambda draw, shape: (3 * draw(*shape) + 1, draw(shape[-1]), draw(shape[-1]), 1e-5), _norm, by_row=True
    ),
    "norm_to_half_backward": Case(_norm_backward_arguments, _norm_backward, by_row=True),
    "add_half": Case(lambda draw, shape: (draw(*shape), draw(*shape).half())),
    "scale_to_half": Case(lambda draw, shape: (1e4 * draw(*shape), torch.tensor(3.7))),
    "high_and_low": Case(lambda draw, shape: (draw(*shape) * torch.exp2(torch.linspace(-30, 12, shape[-1])),)),
    "added_to_codes": Case(lambda draw, shape: (_codes(draw, shape), draw(*shape))),
    "squares_of_codes": Case(
        lambda draw, shape: (_codes(draw, shape),), lambda codes: (decode(codes, FORMAT_1_6_9).double().square().sum(),)
    ),
    "updated_half": Case(
        lambda draw, shape: (
            0.02 * draw(shape[-1]).half(),
            _codes(draw, shape[-1:]),
            _codes(draw, shape[-1:]),
            _codes(draw, shape[-1:]),
            torch.tensor(2.0**-9),
            adamw.scalars_of(7.0, ADAMW),
            torch.tensor([12345, -98765], dtype=torch.int32),
        )
    ),
}
"""One case for each function in `FUSED`."""


def fused(gpu: PretendedGPU, found: dict[str, Any] | None) -> None:
    for path in (ROOT / "dalle_ds").rglob("*.py"):
        if "@fused(" in path.read_text():
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name, function in FUSED.items():
        case = CASES[name]
        kernels = {}
        for shape in case.trained:
            torch._dynamo.reset()  # without this, the second shape would compile a dynamic variant
            with torch.device("meta"):  # gigabytes, whose values are not read
                arguments = case.arguments(torch.empty, shape)
            with gpu.recording(computing=False) as record:
                function(*_on(gpu, arguments))
            gpu.save(record, f"{name} {shape}")
            kernels[str(shape)] = record.launched
        if found is not None:
            found[name] = {"declared": function.kernels, "kernels": kernels, "errors": _errors(gpu, function, case)}


def _errors(gpu: PretendedGPU, function: Fused, case: Case) -> dict[str, list[Any]]:
    """Returns, by shape and for each result, our error and the eager form's error on the CPU, both against fp64. For an
    elementwise function: the number of values that differ."""
    generator, errors = torch.Generator().manual_seed(0), {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for shapes in case.computed:
        torch._dynamo.reset()
        for shape in shapes:
            arguments = case.arguments(draw, shape)
            with gpu.recording(computing=True):
                ours = _tuple(function(*_on(gpu, arguments)))
            plain = _tuple(function.plain(*arguments))
            if case.exact is None:
                errors[str(shape)] = [int((a != b).sum()) for a, b in zip(ours, plain, strict=True)]
            else:
                true = case.exact(*arguments)
                errors[str(shape)] = [(_error(a, t), _error(b, t)) for a, b, t in zip(ours, plain, true, strict=True)]
    return errors


def _on(gpu: PretendedGPU, arguments: tuple[Any, ...]) -> list[Any]:
    def put(tensor: Tensor) -> Tensor:
        return gpu.put(torch.empty_like(tensor, device=CPU) if tensor.is_meta else tensor)

    return [put(value) if isinstance(value, Tensor) else value for value in arguments]


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _error(ours: Tensor, true: Tensor) -> float:
    return float((ours.double() - true).norm() / true.norm())


def main(folder: Path) -> None:
    interpreter.complete()
    kernel_compiler.launcher_problem = lambda: None  # nothing is launched
    found: dict[str, Any] = {}
    gpu = PretendedGPU(90, folder / "90")
    for cases in (flex, clipped_adamw, fused):
        cases(gpu, found)
    (folder / "found.json").write_text(json.dumps(found, indent=1))
    gpu.become(80, folder / "80")
    for cases in (flex, clipped_adamw, fused):
        cases(gpu, None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
