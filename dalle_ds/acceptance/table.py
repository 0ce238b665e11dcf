"""The steps of an acceptance run, the most important first, so that a run that ends early has checked these."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A step, which runs in its own process. `module` has `run(record, is_rehearsal)` and is only imported in that process."""

    name: str
    module: str
    seconds: int
    """Time limit on a GPU, after which the step counts as hung."""
    settles: str


REHEARSAL_SECONDS = 600
"""Time limit of every step in a rehearsal: on a busy machine, a few seconds of CPU time may take that long."""

_ROOM = "dalle_ds.acceptance.steps"

STEPS = (
    Step("environment", f"{_ROOM}.environment", 40, "versions, flags, hardware"),
    Step("products", f"{_ROOM}.products", 30, "fp16 products with fp32 sums: errors and rates"),
    Step("attention", f"{_ROOM}.attention", 120, "FlexAttention: errors against fp64, speed against dense and causal"),
    Step("fused", f"{_ROOM}.fused", 60, "fused functions against their eager forms; their kernels"),
    Step("engine", f"{_ROOM}.engine", 120, "updates against plain fp32, a resume, a skipped update, other batch sizes"),
    Step("ranks", f"{_ROOM}.ranks", 180, "the engine on all GPUs and on one fewer"),
    Step("speed", f"{_ROOM}.speed", 180, "time, MFU and memory of layers of width 2048 in several settings"),
    Step("launches", f"{_ROOM}.launches", 60, "kernels and host waits of a layer, the longest kernels"),
    Step("optimizer", f"{_ROOM}.optimizer", 45, "AdamW: compiled against plain, and its rate"),
    Step("sample", f"{_ROOM}.sample", 60, "sampled tokens equal to the CPU's; tokens per second"),
    Step("parity", f"{_ROOM}.parity", 60, "an export gives the engine's losses on a CPU"),
    Step("dvae", f"{_ROOM}.dvae", 60, "training step, memory of a validation, tokens equal to the CPU's"),
    Step("encoder", f"{_ROOM}.encoder", 100, "images per second of the encode stage"),
)
