"""How many image tokens per second do we sample, compared with a dense key-value cache and with no cache?"""

import torch

from dalle_ds.bench.harness.decoding import DenseSampler, OurSampler, UncachedSampler, position_weights
from dalle_ds.bench.harness.machine import Machine, machine_for
from dalle_ds.bench.harness.model import build_prior
from dalle_ds.bench.harness.report import Report, mixed
from dalle_ds.bench.harness.settings import SampleBenchConfig
from dalle_ds.bench.harness.timing import Comparison, take_turns
from dalle_ds.console import progress
from dalle_ds.models.prior import Prior

Seen = dict[str, dict[int, Comparison]]
"""Keys: the other side, then the position."""


def run(settings: SampleBenchConfig) -> Report:
    """Compare the sides twice: with many candidates of one caption, and with one image for each of many captions."""
    weights = position_weights(settings.positions, settings.grid**2)
    forms = {f"1x{settings.batch}": (1, settings.batch), f"{settings.batch}x1": (settings.batch, 1)}
    with machine_for(settings) as machine, torch.inference_mode():
        report = Report("sample", machine.name).note(captions_x_candidates=list(forms))
        prior = build_prior(settings, machine, settings.n_layers, settings.n_heads)
        for form, (captions, candidates) in forms.items():
            seen = compare(settings, machine, prior, captions, candidates)
            for other in ("dense_cache", "no_cache") if settings.uncached else ("dense_cache",):
                ours_seconds, other_seconds, ratio = mixed(weights, seen[other], other)
                report.add(f"token_{form}", other, ours_seconds, other_seconds, ratio)
                report.note(**{f"tokens_per_second_{form}_{other}": settings.batch / other_seconds})
            ours_seconds, *_ = mixed(weights, seen["dense_cache"], "dense_cache")
            report.note(**{f"tokens_per_second_{form}_ours": settings.batch / ours_seconds})
    return report


def compare(settings: SampleBenchConfig, machine: Machine, prior: Prior, captions: int, candidates: int) -> Seen:
    """Time the dense cache and ours in turns at each position. Sampling without a cache is slow and gets only one round."""
    samplers = {"dense_cache": DenseSampler(prior, captions, candidates), "ours": OurSampler(prior, captions, candidates)}
    uncached = UncachedSampler(prior, captions, candidates)
    seen: Seen = {"dense_cache": {}, "no_cache": {}}
    for position in progress(settings.positions, what=f"{captions} captions x {candidates}", unit="position"):
        for sampler in samplers.values():
            sampler.go_to(position)
        steps = {side: sampler.step for side, sampler in samplers.items()}
        seen["dense_cache"][position] = take_turns(steps, "dense_cache", settings.rounds, machine.clock)
        if settings.uncached:
            uncached.go_to(position)
            turns = {**steps, "no_cache": uncached.step}
            seen["no_cache"][position] = take_turns(turns, "dense_cache", 1, machine.clock, warm_up=False)
    return seen
