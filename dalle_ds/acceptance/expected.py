"""What `dalle-ds plan` expects of one GPU, for the steps that measure time and memory."""

from dataclasses import dataclass

import torch

from dalle_ds.models.prior import PriorConfig
from dalle_ds.training.plan import PlanSettings, forward_flops, plan
from dalle_ds.training.throughput import known_peak_tflops


@dataclass(frozen=True)
class Expected:
    """Of one micro-batch on one GPU; None: `plan` knows nothing of this device."""

    seconds: float | None
    mfu: float | None
    memory_gib: float | None


def micro_batch(
    config: PriorConfig, device: torch.device, *, samples: int, accumulation: int, recompute: bool, moments: str
) -> Expected:
    """`samples` at once, `accumulation` times an update."""
    peak = known_peak_tflops(device)
    if peak is None:
        return Expected(None, None, None)
    settings = PlanSettings.model_validate(
        {"gpus": 1, "micro_batch": samples, "global_batch": samples * accumulation, "tflops": peak, "moments": moments}
    )
    told = plan(config, settings)
    seconds = told["seconds_per_update_estimate"] / accumulation
    mfu = useful_flops(config, samples) / seconds / peak / 1e12
    return Expected(seconds, mfu, told["memory_gib_per_gpu_estimate"] if recompute else None)


def useful_flops(config: PriorConfig, samples: int) -> float:
    """Forward and backward, what is recomputed not counted."""
    return 3.0 * forward_flops(config) * samples
