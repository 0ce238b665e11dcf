"""A small export for tests: a prior with random weights, and the dVAE and tokenizer of a synthetic data set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.models.prior import Prior, PriorConfig, initialise
from dalle_ds.sampling.export import Export
from dalle_ds.sampling.export_record import ExportRecord
from dalle_ds.sampling.folder import SampleFolder
from dalle_ds.sampling.image_prompt import ImagePrompt
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.settings import SamplingConfig
from dalle_ds.storage import objects
from dalle_ds.storage.weights import read_weights, write_weights
from tests.data.token_sets import make_token_set


def make_export(folder: Path, *, mlflow: dict[str, Any] | None = None, seed: int = 0, **data_options: Any) -> Path:
    """Write folder/tokens (a data set) and folder/export, and return the latter. The untrained prior is far from uniform."""
    return make_export_of(make_token_set(folder / "tokens", **data_options), folder, mlflow=mlflow, seed=seed)


def make_export_of(data: str, folder: Path, *, mlflow: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Write folder/export with an untrained prior for the data set at `data`, and return it."""
    export = folder / "export"
    tokenizer = CaptionTokenizer(objects.join(data, "tokenizer.model"))
    dvae = read_weights(objects.join(data, "dvae.safetensors"), "dvae")
    grid = dvae.config["image_size"] >> (dvae.config["n_groups"] - 1)
    config = PriorConfig(
        n_layers=3,
        n_heads=2,
        d_head=8,
        text_len=16,
        grid=grid,
        vocab_size=tokenizer.vocab_size,
        n_codes=dvae.config["n_codes"],
        conv_kernel=3,
    )
    prior = Prior(config)
    initialise(prior, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # scale heads and text embeddings up, so that tokens depend on captions and on each other
        prior.heads.image.weight.mul_(15)
        prior.embed.text.weight.mul_(40)
    mark = write_weights(export / "model.safetensors", kind="prior", config=config.model_dump(), state=prior.state_dict())
    for name in ("tokenizer.model", "dvae.safetensors"):
        objects.write_bytes(export / name, objects.read_bytes(objects.join(data, name)))
    record = ExportRecord(
        format=3,
        fingerprint=mark,
        dvae=dvae.fingerprint,
        tokenizer=tokenizer.fingerprint,
        update=7,
        ema=True,
        caption_dropout=0.0,
        data_fingerprint="d",
        data_content="c",
        data_urls=(data,),
        checkpoint=str(folder / "run" / "checkpoints" / "update_00000007"),
        mlflow=mlflow,
    )
    (export / "config.json").write_bytes(record.to_json())
    return export


def draw_samples(
    export: Export,
    captions: Sequence[str],
    settings: SamplingConfig,
    out: Path,
    *,
    image_prompt: ImagePrompt | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Sample captions into `out` as the command does. Returns the content of samples.json."""
    return SampleFolder(export, Request(tuple(captions), settings, image_prompt), out, **options).run()


def repeat_samples(export: Export, record_file: Path, out: Path) -> dict[str, Any]:
    """Reproduce the images of a samples.json in another folder."""
    return SampleFolder.repeating(export, record_file, out).run()


def edit_config(export: Path, **changes: Any) -> None:
    """Replace entries of an export's config.json."""
    file = export / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
