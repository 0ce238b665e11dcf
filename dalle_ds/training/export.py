"""Export: from a sharded checkpoint to one folder that samples on any machine, proved to give the engine's losses."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dalle_ds.data import storage
from dalle_ds.data.fingerprint import require_same
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.data.weights import read_weights, write_weights
from dalle_ds.errors import DataError
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.parallel.consolidate import trained_weights, whole_parameter
from dalle_ds.precision.half import use_fp16_branches
from dalle_ds.training.checkpoint import CheckpointStore, read_commit
from dalle_ds.training.prior_state import average_file
from dalle_ds.training.prior_trainer import PARITY_FILE

log = logging.getLogger(__name__)

MAX_NLL_DIFFERENCE = 1e-3
"""Nats a token by which export and engine may differ on one token: fp16 rounding in another order of summation."""


def export_checkpoint(
    run_folder: str | Path, out: str | Path, *, tag: str | None = None, averaged: bool = True
) -> dict[str, Any]:
    """Write the export folder of a run's checkpoint: prior, config, tokenizer, dVAE and the proof of parity.

    Args:
        run_folder: folder of the training run.
        out: the export's folder, a path or s3:// url.
        tag: name of the checkpoint, e.g. "update_00000500"; None: the newest.
        averaged: the averaged weights (what the paper samples from), or the last ones.

    Raises:
        DataError: no such checkpoint, or one whose files don't fit each other; the exported model does not give the losses
            that the engine had when it saved.
    """
    checkpoint = _find(Path(run_folder), tag)
    about = read_commit(checkpoint)["about"]
    config = PriorConfig(**about["model"])
    dataset = _absolute(about["dataset"])
    tokenizer_bytes = _copied_input(dataset, "tokenizer.model", CaptionTokenizer, about["tokenizer"])
    dvae_bytes = _copied_input(dataset, "dvae.safetensors", lambda url: read_weights(url, "dvae"), about["dvae"])

    state = _averaged_weights(checkpoint, config) if averaged else trained_weights(checkpoint)
    # only the average has its losses in the checkpoint
    parity = _prove_parity(checkpoint, config, state, fp16_branches=about["fp16_branches"]) if averaged else None
    fingerprint = write_weights(storage.join(out, "model.safetensors"), kind="prior", config=config.model_dump(), state=state)
    info = {
        "fingerprint": fingerprint, "update": read_commit(checkpoint)["update"], "averaged": averaged, "dvae": about["dvae"],
        "tokenizer": about["tokenizer"], "data": {"url": dataset, "fingerprint": about["data"], "content": about["content"]},
        "caption_dropout": about.get("caption_dropout", 0.0),  # checkpoints from before the option lack it
        "mlflow": about["mlflow"], "checkpoint": str(checkpoint.resolve()),
    }  # fmt: skip
    storage.write_bytes(storage.join(out, "tokenizer.model"), tokenizer_bytes)
    storage.write_bytes(storage.join(out, "dvae.safetensors"), dvae_bytes)
    storage.write_bytes(storage.join(out, "parity.json"), json.dumps(parity, indent=1).encode())
    # last: a folder without config.json is not taken for an export
    storage.write_bytes(storage.join(out, "config.json"), json.dumps(info, indent=1).encode())
    return {
        "export": str(out),
        **{key: info[key] for key in ("fingerprint", "update", "averaged", "checkpoint")},
        "parity": parity,
    }


def _find(run_folder: Path, tag: str | None) -> Path:
    checkpoints = CheckpointStore(run_folder / "checkpoints", keep=1).committed()
    names = [path.name for path in checkpoints]
    if not names:
        raise DataError(f"{run_folder} has no committed checkpoint; `deepspeed launchers/train_prior.sh` writes them")
    if tag is not None and tag not in names:
        raise DataError(f"{run_folder} has no checkpoint {tag!r}; there are {', '.join(names)}")
    return checkpoints[-1] if tag is None else checkpoints[names.index(tag)]


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).resolve())


def _copied_input(dataset: str, name: str, open_it: Any, expected: str) -> bytes:
    """Bytes of a file of the data set, once it is known to be the one that the run was trained with."""
    url = storage.join(dataset, name)
    require_same(f"{name} of data set {dataset}", expected, open_it(url).fingerprint, "The run was trained with the former.")
    return storage.read_bytes(url)


def _averaged_weights(checkpoint: Path, config: PriorConfig) -> dict[str, Tensor]:
    world_size = read_commit(checkpoint)["world_size"]
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Prior(config).named_parameters()}
    files = [checkpoint / average_file(rank, world_size) for rank in range(world_size)]
    opened = [safe_open(file, framework="pt") for file in files]
    missing = shapes.keys() - set(opened[0].keys())
    if missing:
        raise DataError(f"{files[0]} lacks {', '.join(sorted(missing))}")
    return {name: whole_parameter([file.get_tensor(name) for file in opened], shape) for name, shape in shapes.items()}


@torch.no_grad()
def _prove_parity(checkpoint: Path, config: PriorConfig, state: dict[str, Tensor], fp16_branches: bool) -> dict[str, Any]:
    """Losses of the exported weights on the batch that the engine scored when it saved."""
    saved = load_file(checkpoint / PARITY_FILE)
    with torch.device("meta"):
        prior = Prior(config)
    prior.load_state_dict(state, assign=True)
    fp32_BN = prior.image_nll(saved["text"], saved["image"])
    if fp16_branches:
        use_fp16_branches(prior)
    same_format_BN = prior.image_nll(saved["text"], saved["image"])
    difference = (same_format_BN - saved["image_nll"]).abs().max().item()
    if not difference <= MAX_NLL_DIFFERENCE:
        raise DataError(
            f"export of {checkpoint} differs from the engine by {difference:.2e} nats on a token, "
            f"expected at most {MAX_NLL_DIFFERENCE:.0e}"
        )
    parity = {
        "samples": len(fp32_BN), "tokens": fp32_BN.numel(), "engine_mean_image_nll": saved["image_nll"].mean().item(),
        "max_difference_same_format": difference, "max_difference_fp32": (fp32_BN - saved["image_nll"]).abs().max().item(),
    }  # fmt: skip
    log.info("export equals the engine: largest difference %.1e nats on %d tokens", difference, parity["tokens"])
    return parity
