"""fp16 matrix products with all strides in use: their errors against fp64, and their rates.

N rows, D width in, E width out.
"""

import torch
from torch import Tensor

from dalle_ds.acceptance import expected
from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.ops.fp16 import batched_matmul_to_fp32, linear_fp16, matmul_to_fp32
from dalle_ds.ops.split import Split, split_matmul

FP32_SUM = 1e-4
"""Relative error of a product with fp32 output. fp32 sums of exact products have errors of 1e-7 to 1e-5, depending on how a
tensor core truncates its addends. A single rounding to fp16 gives 2e-4."""
ONE_ROUNDING = 1.15
"""Error of an fp16 result divided by the error of rounding the exact result. It is 1 if sums are fp32, 1.4 if the bias is added
after a first rounding, and 1.4 or more if partial sums are fp16."""


AS_FP32 = 5e-6
"""Relative error of a product of split factors. 22 bits of each factor give 2e-7; tensor cores that truncate their addends may
multiply this by a few. TF32 would give 3e-4."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    torch.manual_seed(0)
    n, d, e = place.pick((1280, 3968, 4 * 3968), (96, 64, 256))
    x_ND, w_ED, g_NE = (torch.randn(*shape, device=place.device).half() for shape in ((n, d), (e, d), (n, e)))
    bias_E = torch.randn(e, device=place.device).half().float()  # exact in both fp16 and fp32
    why = "the product that gives a weight gradient has fp32 output: fp16 as in the paper would lose small sums"
    grad_ED = matmul_to_fp32(g_NE.t(), x_ND)
    record.equal("weight gradient: dtype", str(grad_ED.dtype), "torch.float32", why)
    record.at_most("weight gradient: relative error", _error(grad_ED, g_NE.double().t() @ x_ND.double()), FP32_SUM, why)
    why = "attention scores in sampling, and their sums, are fp32"
    q, k = (torch.randn(2, 3, *shape, device=place.device).half() for shape in ((4, 64), (64, 33)))
    scores = batched_matmul_to_fp32(q, k)
    record.equal("batched scores: dtype", str(scores.dtype), "torch.float32", why)
    record.at_most("batched scores: relative error", _error(scores, q.double() @ k.double()), FP32_SUM, why)

    scaled_ED = w_ED * d**-0.5
    for name, bias in (("without bias", None), ("with bias", bias_E)):
        true = x_ND.double() @ scaled_ED.double().t() + (0 if bias is None else bias.double())
        ratio = _error(linear_fp16(x_ND, scaled_ED, bias), true) / _error(true.half(), true)
        why = "sums are fp32, bias included, and are rounded once"
        record.at_most(f"linear layer {name}: error, in units of one fp16 rounding", ratio, ONE_ROUNDING, why)
    true = g_NE.double() @ scaled_ED.double()
    ratio = _error(linear_fp16(g_NE, scaled_ED.t(), None), true) / _error(true.half(), true)
    why = "the same product with a transposed weight"
    record.at_most("input gradient: error, in units of one fp16 rounding", ratio, ONE_ROUNDING, why)

    y_ND, w_DV = torch.randn(n, d, device=place.device), 0.02 * torch.randn(d, place.pick(8192, 128), device=place.device)
    true = y_ND.double() @ w_DV.double()
    in_fp32 = _error(y_ND @ w_DV, true)
    why = "logits on fp16 tensor cores are as exact as in fp32, because each factor is split into two fp16 numbers"
    error = _error(split_matmul(Split.of(y_ND), Split.of(w_DV)), true)
    record.at_most("logits: relative error", error, AS_FP32, why)
    record.tell("logits: relative error in fp32", in_fp32)

    _rates(record, place)


def _rates(record: Record, place: Place) -> None:
    """Measure rates for the shapes of a layer of width 2048 with 8 samples."""
    n, d = place.pick((8 * 1280, 2048), (96, 64))
    e = 4 * d
    x_ND, w_ED, g_NE = (torch.randn(*shape, device=place.device).half() for shape in ((n, d), (e, d), (n, e)))
    works = {
        "forward": ((n, e, d), lambda: linear_fp16(x_ND, w_ED, None)),
        "input gradient": ((n, d, e), lambda: linear_fp16(g_NE, w_ED.t(), None)),
        "weight gradient": ((e, d, n), lambda: matmul_to_fp32(g_NE.t(), x_ND)),
    }
    for name, (shape, work) in works.items():
        rate = 2.0 * n * d * e / place.seconds(work) / 1e12
        record.rate(f"{name}, TFLOP/s", rate, expected.product_tflops(place.device, *shape), expected.SLOWER, expected.WHY)
    vocab = place.pick(8192, 256)
    y_ND, w_DV = torch.randn(n, d, device=place.device), torch.randn(d, vocab, device=place.device)
    split = Split.of(y_ND), Split.of(w_DV)
    for name, work in (("fp32", lambda: y_ND @ w_DV), ("split factors", lambda: split_matmul(*split))):
        record.tell(f"logits by {name}, useful TFLOP/s", 2.0 * n * d * vocab / place.seconds(work) / 1e12)
    copied = place.copied_gbps()
    record.rate("memory copied, GB/s", copied, expected.memory_gbps(place.device), 0.8, "half of it read, half written")


def _error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())
