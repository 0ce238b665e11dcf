"""`dalle-ds import-dvae`: convert OpenAI's released dVAE into a weights file of this project."""

from typing import Any

from dalle_ds.commands.settings import ImportDVAEConfig
from dalle_ds.pretrained.openai_dvae import import_openai


def run(config: ImportDVAEConfig) -> dict[str, Any]:
    return import_openai(config.encoder, config.decoder, config.out, config.image_size)
