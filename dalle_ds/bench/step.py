"""How much does our attention speed up a whole training step, and how much of the device's peak does the step use?"""

from dalle_ds.bench.harness.machine import in_precision, machine_for
from dalle_ds.bench.harness.model import prior_step, prior_to_train
from dalle_ds.bench.harness.report import Report
from dalle_ds.bench.harness.settings import StepBenchConfig
from dalle_ds.bench.harness.timing import take_turns
from dalle_ds.models.attention import use_attention
from dalle_ds.planning.arithmetic import forward_flops


def run(settings: StepBenchConfig) -> Report:
    """Compare a training step (forward, loss, backward, AdamW) of the same prior, with our attention and dense attention."""
    with machine_for(settings) as machine:
        steps, names = {}, {}
        for side, attention in (("dense", "dense"), ("ours", "auto")):
            prior = prior_to_train(settings, machine)
            names[side] = use_attention(prior, attention, machine.device)
            precision = in_precision(prior, settings.dtype, machine.device)
            steps[side] = prior_step(prior, settings.batch, precision)
        turns = take_turns(steps, "dense", settings.rounds, machine.clock)
        report = Report("step", machine.name)
        report.note(attention=names["ours"], n_layers=prior.config.n_layers, d_model=prior.config.d_model)
    report.add("step", "dense", turns.seconds("ours"), turns.seconds("dense"), turns.ratio("ours", "dense"))
    # Useful FLOPs only, as `dalle-ds plan` counts them: both sides count only the reachable keys of sparse attention
    flops = 3 * forward_flops(prior.config) * settings.batch
    for side in ("ours", "dense"):
        rate = flops / turns.seconds(side) / 1e12
        tokens = settings.batch * prior.config.n_slots / turns.seconds(side)
        report.note(**{f"tokens_per_second_{side}": tokens, f"tflops_{side}": rate})
        if settings.peak_tflops is not None:
            report.note(**{f"mfu_{side}": rate / settings.peak_tflops})
    return report
