"""How much does our attention speed up a whole layer (attention and MLP), forward and backward?

B batch, L slots, C model width.
"""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy

import torch

from dalle_ds.bench.harness.machine import Machine, in_precision, machine_for
from dalle_ds.bench.harness.report import Report, mixed
from dalle_ds.bench.harness.settings import ResblockBenchConfig
from dalle_ds.bench.harness.timing import Comparison, take_turns
from dalle_ds.console import progress
from dalle_ds.models.attention import SelfAttention, use_attention
from dalle_ds.models.prior import Layer, PriorConfig
from dalle_ds.ops.attention.masks import Pattern, layer_patterns


def run(settings: ResblockBenchConfig) -> Report:
    """Compare each pattern, and the pattern mix of a deep model."""
    counts = Counter(layer_patterns(settings.mix_layers))
    seen = {}
    with machine_for(settings) as machine:
        report = Report("resblock", machine.name)
        for pattern in progress(sorted(counts), what="resblock", unit="pattern"):
            seen[pattern], report.notes["attention"] = compare(settings, machine, pattern)
    for pattern, turns in seen.items():
        report.add(str(pattern), "dense", turns.seconds("ours"), turns.seconds("dense"), turns.ratio("ours", "dense"))
    report.add("mix", "dense", *mixed(counts, seen, "dense"))
    return report


def compare(settings: ResblockBenchConfig, machine: Machine, pattern: Pattern) -> tuple[Comparison, str]:
    """Time the same layer with our attention and with dense attention. Returns the comparison and our attention's name."""
    torch.manual_seed(0)
    config = PriorConfig(
        n_heads=settings.n_heads,
        d_head=settings.d_head,
        text_len=settings.text_len,
        grid=settings.grid,
        conv_kernel=settings.conv_kernel,
    )
    dense = Layer(config, SelfAttention(config.n_heads, config.d_head, config.mask(pattern))).to(machine.device)
    precision = in_precision(dense, settings.dtype, machine.device)
    ours = deepcopy(dense)
    chosen = use_attention(ours, "auto", machine.device)
    use_attention(dense, "dense", machine.device)
    x_BLC = torch.randn(settings.batch, config.n_slots, config.d_model, device=machine.device, requires_grad=True)
    grad_BLC = torch.randn_like(x_BLC)

    def training(layer: Layer) -> Callable[[], None]:
        def step() -> None:
            layer.zero_grad()
            x_BLC.grad = None
            with precision:
                y_BLC = layer(x_BLC)
            y_BLC.backward(grad_BLC)

        return step

    turns = take_turns({"dense": training(dense), "ours": training(ours)}, "dense", settings.rounds, machine.clock)
    return turns, chosen
