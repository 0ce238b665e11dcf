"""`dalle-ds export`: write a checkpoint of the prior as one folder that can be sampled without DeepSpeed."""

from typing import Any

from dalle_ds.commands.settings import ExportConfig
from dalle_ds.training.prior.export import export_checkpoint


def run(config: ExportConfig) -> dict[str, Any]:
    return export_checkpoint(
        config.run,
        config.out,
        tag=config.checkpoint,
        ema=config.ema,
        max_file_bytes=int(config.max_file_gb * 10**9),
        temperature=config.temperature,
        guidance=config.guidance,
    )
