"""Is our attention faster than dense attention (same mask, causal mask), for each pattern and for a model's pattern mix?

B batch, L slots, H heads, D head width, F fused: the 3 of queries, keys and values.
"""

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.bench.harness.machine import DTYPES, Machine, machine_for
from dalle_ds.bench.harness.report import Report, mixed
from dalle_ds.bench.harness.settings import AttentionBenchConfig
from dalle_ds.bench.harness.timing import Comparison, take_turns
from dalle_ds.console import progress
from dalle_ds.ops.attention.backends import attention_backend, choose_backend
from dalle_ds.ops.attention.masks import Pattern, SparseMask, layer_patterns, transpose_grid

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(settings: AttentionBenchConfig) -> Report:
    """Time forward alone, and forward with backward ("training")."""
    counts = Counter(layer_patterns(settings.mix_layers))
    with machine_for(settings) as machine, progress(total=2 * len(counts), what="attention", unit="pattern") as bar:
        report = Report("attention", machine.name)
        for mode in ("forward", "training"):
            seen = {}
            for pattern in sorted(counts):
                seen[pattern] = compare(settings, machine, pattern, with_backward=mode == "training")
                bar.update()
            for other in ("dense", "causal"):
                for pattern, turns in seen.items():
                    ratio = turns.ratio("ours", other)
                    report.add(f"{pattern}_{mode}", other, turns.seconds("ours"), turns.seconds(other), ratio)
                report.add(f"mix_{mode}", other, *mixed(counts, seen, other))
    return report


def compare(settings: AttentionBenchConfig, machine: Machine, pattern: Pattern, *, with_backward: bool) -> Comparison:
    """Time ours, masked dense and causal dense attention in turns, on views of one projection output as in the model."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.n_slots, 3, settings.n_heads, settings.d_head)
    fused = torch.randn(shape, generator=generator).to(machine.device, DTYPES[settings.dtype]).requires_grad_(with_backward)
    grad_BHLD = torch.randn_like(fused[:, :, 0]).transpose(1, 2)

    def runs(attend: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def forward() -> None:
            attend(fused)

        def training() -> None:
            fused.grad = None
            attend(fused).backward(grad_BHLD)

        return training if with_backward else forward

    mask = SparseMask(pattern, settings.text_len, settings.grid, settings.conv_kernel)
    chosen = choose_backend(machine.device, settings.grid) if settings.backend == "auto" else settings.backend
    variants = {
        "dense": runs(on_fused(attention_backend("dense", mask, machine.device), settings)),
        "ours": runs(on_fused(attention_backend(chosen, mask, machine.device), settings)),
        "causal": runs(on_fused(_causal, settings)),
    }
    return take_turns(variants, "dense", settings.rounds, machine.clock)


def on_fused(attend: Attend, settings: AttentionBenchConfig) -> Callable[[Tensor], Tensor]:
    """Returns attention as a function of fused (B, L, F, H, D) that returns (B, H, L, D), both in raster order.

    A backend that needs image slots column by column pays for the two permutations here. In a model the permutations are
    cheaper, since they work on states a third as wide.
    """
    n_text, grid = settings.text_len, settings.grid

    def raster(fused_BLFHD: Tensor) -> Tensor:
        return attend(*fused_BLFHD.transpose(1, 3).unbind(2))

    def columns(fused_BLFHD: Tensor) -> Tensor:
        out_BHLD = raster(transpose_grid(fused_BLFHD, n_text, grid))
        return transpose_grid(out_BHLD.transpose(1, 2), n_text, grid).transpose(1, 2)

    return columns if getattr(attend, "columns_first", False) else raster


def _causal(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
    # The wrong mask: it allows more keys than any pattern. It has its own row because it is the fastest dense kernel.
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=True)
