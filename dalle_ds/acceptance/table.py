"""The steps of an acceptance run, in the order of their worth: a run that ends early has seen the most important ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One process. `module` has `run(record, place)`; none of it is imported before."""

    name: str
    module: str
    seconds: int
    """After which it counts as hung, on a GPU."""
    settles: str


REHEARSAL_SECONDS = 600
"""The same of every step of a rehearsal: a busy machine may take that long for what is seconds of CPU time."""

_ROOM = "dalle_ds.acceptance.steps"

STEPS = (
    Step("environment", f"{_ROOM}.environment", 40, "versions, flags, what the machine has"),
    Step("products", f"{_ROOM}.products", 30, "fp16 products with fp32 sums: exact, and at what rate"),
    Step("attention", f"{_ROOM}.attention", 120, "FlexAttention against fp64; its speed against dense and causal"),
    Step("fused", f"{_ROOM}.fused", 60, "fused functions against their plain forms; their kernels"),
    Step("engine", f"{_ROOM}.engine", 120, "updates against plain fp32, a resume, a skipped update, other batch sizes"),
    Step("ranks", f"{_ROOM}.ranks", 180, "the engine on all GPUs, and on one fewer"),
    Step("speed", f"{_ROOM}.speed", 180, "time, MFU and memory of a 2048-wide stack in several settings"),
    Step("launches", f"{_ROOM}.launches", 60, "kernels and host waits of a layer, the longest kernels"),
    Step("optimizer", f"{_ROOM}.optimizer", 45, "low-bit AdamW: compiled against plain, and its rate"),
    Step("sample", f"{_ROOM}.sample", 60, "drawn tokens equal to the CPU's; tokens a second"),
    Step("parity", f"{_ROOM}.parity", 60, "an export gives the engine's losses on a CPU"),
    Step("dvae", f"{_ROOM}.dvae", 60, "training step, memory of a validation, tokens equal to the CPU's"),
    Step("encoder", f"{_ROOM}.encoder", 100, "images a second of the encode stage"),
)
