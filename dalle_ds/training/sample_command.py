"""`dalle-ds sample`, as a process alone or as every rank of a launcher runs it."""

import logging
import os
from pathlib import Path
from typing import Any

from dalle_ds.console import print_summary, setup_logging
from dalle_ds.parallel.launch import prepare_rank


def main(
    settings: dict[str, Any], source: dict[str, Any], url: str, out: Path, clip: str | None, device: str,
    environment: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Sample; alone, there is no process group, and deepspeed is not imported.

    Exit code 0: finished; 2: a mistake in the input; 75: another rank was lost, to be started again; 143: asked to stop.
    """
    prepare_rank(environment)
    if os.environ.get("RANK", "0") != "0":
        setup_logging(logging.WARNING)
    # read where torch is imported; else the ranks that are left by another one bury its name under frames of C++
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dalle_ds.parallel.ranks import Ranks
    from dalle_ds.recipes import from_options
    from dalle_ds.sampling.sampler import SampleSettings
    from dalle_ds.training.job import on_all_ranks
    from dalle_ds.training.report import ALONE, SampleSource, sample_export

    def work(ranks: Ranks) -> dict[str, Any]:
        checked = from_options(SampleSettings, settings)
        return sample_export(url, out, checked, SampleSource(**source), clip=clip, device=device, ranks=ranks)

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        on_all_ranks(work, as_json)
    else:
        print_summary(work(ALONE), as_json)
