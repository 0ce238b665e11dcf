"""Products of fp16 matrices: exact as their format allows, on all strides in use, and at what rate.

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
"""Relative error of a product that leaves in fp32. fp32 sums of exact products come to 1e-7 to 1e-5, whichever way a tensor
core cuts its addends; one rounding to fp16 anywhere is 2e-4."""
ONE_ROUNDING = 1.15
"""Error of an fp16 result over that of rounding the exact one. 1 by definition if sums are fp32; 1.4 where the bias is added
after a first rounding; 1.4 and more where partial sums are fp16."""


AS_FP32 = 5e-6
"""Relative error of a product of split factors: 22 bits of each are 2e-7, tensor cores that cut their addends may add a few of
those. TF32 would be 3e-4."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    torch.manual_seed(0)
    n, d, e = place.pick((1280, 3968, 4 * 3968), (96, 64, 256))
    x_ND, w_ED, g_NE = (torch.randn(*shape, device=place.device).half() for shape in ((n, d), (e, d), (n, e)))
    bias_E = torch.randn(e, device=place.device).half().float()  # which no format has to round
    why = "the gradient of a weight leaves its product in fp32: the paper's fp16 would lose small sums"
    grad_ED = matmul_to_fp32(g_NE.t(), x_ND)
    record.equal("weight gradient: format", str(grad_ED.dtype), "torch.float32", why)
    record.at_most("weight gradient: relative error", _error(grad_ED, g_NE.double().t() @ x_ND.double()), FP32_SUM, why)
    why = "sampling's scores and their sums are fp32"
    q, k = (torch.randn(2, 3, *shape, device=place.device).half() for shape in ((4, 64), (64, 33)))
    scores = batched_matmul_to_fp32(q, k)
    record.equal("batched scores: format", str(scores.dtype), "torch.float32", why)
    record.at_most("batched scores: relative error", _error(scores, q.double() @ k.double()), FP32_SUM, why)

    scaled_ED = w_ED * d**-0.5
    for name, bias in (("without bias", None), ("with bias", bias_E)):
        true = x_ND.double() @ scaled_ED.double().t() + (0 if bias is None else bias.double())
        ratio = _error(linear_fp16(x_ND, scaled_ED, bias), true) / _error(true.half(), true)
        why = "sums are fp32 and round once, bias included"
        record.at_most(f"linear layer {name}: error, in roundings to fp16", ratio, ONE_ROUNDING, why)
    true = g_NE.double() @ scaled_ED.double()
    ratio = _error(linear_fp16(g_NE, scaled_ED.t(), None), true) / _error(true.half(), true)
    why = "the same product with a transposed weight"
    record.at_most("input gradient: error, in roundings to fp16", ratio, ONE_ROUNDING, why)

    y_ND, w_DV = torch.randn(n, d, device=place.device), 0.02 * torch.randn(d, place.pick(8192, 128), device=place.device)
    true = y_ND.double() @ w_DV.double()
    in_fp32 = _error(y_ND @ w_DV, true)
    why = "logits are as exact as fp32's own, on fp16 units: each factor is two fp16 numbers"
    error = _error(split_matmul(Split.of(y_ND), Split.of(w_DV)), true)
    record.at_most("logits: relative error", error, AS_FP32, why)
    record.tell("logits: relative error in fp32", in_fp32)

    _rates(record, place)


def _rates(record: Record, place: Place) -> None:
    """Of the shapes that a 2048-wide layer has at 8 samples."""
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
