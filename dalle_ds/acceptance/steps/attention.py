"""Sparse attention, for each pattern: as exact as dense attention, against fp64, and faster than the dense causal kernel."""

from collections import Counter

import torch

from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.bench.attention import compare
from dalle_ds.bench.harness.machine import Machine
from dalle_ds.bench.harness.report import mixed
from dalle_ds.bench.harness.settings import AttentionBenchConfig
from dalle_ds.bench.harness.timing import clock_for
from dalle_ds.ops.attention.backends import attention_backend, choose_backend, errors_against_dense
from dalle_ds.ops.attention.masks import Pattern, SparseMask, layer_patterns


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    shape = place.pick({}, {"text_len": 32, "grid": 16, "conv_kernel": 5, "d_head": 16})
    settings = AttentionBenchConfig(
        batch=place.pick(8, 1), n_heads=place.pick(32, 2), dtype=place.pick("fp16", "fp32"), rounds=place.pick(3, 1), **shape
    )
    name = choose_backend(place.device, settings.grid)
    why = "the fast backend of this device; if another was chosen, the log of this step has the reason"
    record.should("backend", name, name == place.pick("flex", "structured"), place.pick("flex", "structured"), why)
    _exactness(record, place, settings, name)
    _speed(record, place, settings)


def _exactness(record: Record, place: Place, settings: AttentionBenchConfig, name: str) -> None:
    why = "relative error against dense attention in fp64, at most twice the error of dense attention in the same dtype"
    for pattern in Pattern:
        mask = SparseMask(pattern, settings.text_len, settings.grid, settings.conv_kernel)
        attend = attention_backend(name, mask, place.device)
        # each combination compiles separately, so only combinations that can reveal different faults are tested
        for dtype, heads in place.pick(((torch.float16, 62), (torch.bfloat16, 2)), ((torch.float32, 2),)):
            errors = errors_against_dense(attend, mask, heads, settings.d_head, dtype, place.device)
            for what, (ours, dense) in errors.items():
                label = f"{pattern}, {str(dtype).removeprefix('torch.')}, {heads} heads: error of {what}"
                record.at_most(label, ours, 2 * dense + 1e-6, why)


def _speed(record: Record, place: Place, settings: AttentionBenchConfig) -> None:
    """Measure forward and backward as `dalle-ds bench attention` does."""
    machine = Machine(place.device, 1, clock_for(place.device, 1))
    seen = {pattern: compare(settings, machine, pattern, with_backward=True) for pattern in Pattern}
    patterns = Counter(layer_patterns(settings.mix_layers))
    why = "the masks exclude most pairs: sparse attention that is slower than causal attention is useless"
    for other in ("dense", "causal"):
        for pattern, turns in seen.items():
            record.tell(f"{pattern}: times faster than {other}", turns.ratio("ours", other).median)
        *_, ratio = mixed(patterns, seen, other)
        label = f"mix of {settings.mix_layers} layers: times faster than {other}"
        record.rate(label, ratio.median, place.pick(1.0, None), 1.0, why)
    for pattern, turns in seen.items():
        record.detail(f"{pattern}_seconds", {side: turns.seconds(side) for side in turns.runs})
