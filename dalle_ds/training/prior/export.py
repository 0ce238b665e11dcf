"""Export: convert a sharded checkpoint to one folder that any machine can sample from, in memory for two of its tensors.

Tensors are copied one at a time from the ranks' files to the export. The parity check then reads the written files.
"""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from dalle_ds.console import progress
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.errors import DataError
from dalle_ds.models.prior import Prior
from dalle_ds.parallel.checkpoint_tensors import AVERAGE, WEIGHTS, SavedState
from dalle_ds.sampling.export_record import RECORD_FILE, ExportRecord
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.names import DVAE_FILE, PRIOR_FILE, TOKENIZER_FILE
from dalle_ds.storage.stored_tensors import StoredTensor
from dalle_ds.storage.weights import open_weights, verified_fingerprint, write_weights
from dalle_ds.training.checkpoint import Checkpoint, CheckpointStore
from dalle_ds.training.prior.parity import prove_parity
from dalle_ds.training.prior.state import PriorAbout
from dalle_ds.training.prior.throughput import peak_gigabytes

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 5 * 10**9
"""A larger model is split into several files. 5 GB is common: some file systems and object stores limit one upload to it."""


def export_checkpoint(
    run_folder: str | Path, out: str | Path, *, tag: str | None = None, ema: bool = True, max_file_bytes: int = MAX_FILE_BYTES
) -> dict[str, Any]:
    """Write the export folder of a run's checkpoint: prior, config, tokenizer, dVAE and the result of the parity check.

    Args:
        run_folder: folder of the training run, or the s3:// url of its checkpoints.
        out: folder of the export, a path or s3:// url.
        tag: name of the checkpoint, e.g. "update_00000500"; None: the newest.
        ema: export the EMA weights (the paper samples from them) instead of the non-averaged ones.
        max_file_bytes: a larger model is split into several files with an index.

    Returns:
        The export's url, parts of its record, the parity result (None without `ema`), its size and the peak memory.

    Raises:
        DataError: there is no such checkpoint, its files do not match each other, or the exported model does not reproduce
            the losses that the engine computed at the save.
        FingerprintMismatch: tokenizer or dVAE of the data set are not those that the run was trained with.
    """
    checkpoint = CheckpointStore(_checkpoint_folder(str(run_folder)), PriorAbout, keep=1).find(tag)
    about = checkpoint.about
    sets = [objects.absolute(one.dataset) for one in about.sets]
    dataset = sets[0]
    inputs = {name: objects.join(dataset, name) for name in (TOKENIZER_FILE, DVAE_FILE)}
    tokenizer, dvae = CaptionTokenizer(inputs[TOKENIZER_FILE]), verified_fingerprint(inputs[DVAE_FILE], "dvae")
    for name, expected, found in ((TOKENIZER_FILE, about.tokenizer, tokenizer.fingerprint), (DVAE_FILE, about.dvae, dvae)):
        require_same(f"{name} of data set {dataset}", expected, found, "The run was trained with the expected one.")
    state = _weights(checkpoint, ema)
    n_bytes = sum(tensor.nbytes for tensor in state.values())

    # config.json is deleted first and written last: without it, a partly written folder does not count as an export
    objects.delete(objects.join(out, RECORD_FILE))
    model = objects.join(out, PRIOR_FILE)
    with progress(total=n_bytes, what="export", unit="B", unit_scale=True) as bar:
        fingerprint = write_weights(
            model, kind="prior", config=about.model.model_dump(), state=state, max_file_bytes=max_file_bytes, wrote=bar.update
        )
    parity = _parity(checkpoint, model) if ema else None  # checkpoints hold losses of the EMA weights only
    record = ExportRecord(
        format=2,
        fingerprint=fingerprint,
        dvae=about.dvae,
        tokenizer=about.tokenizer,
        update=checkpoint.update,
        ema=ema,
        caption_dropout=about.caption_dropout,
        data_fingerprint=about.data,
        data_content=about.content,
        data_urls=tuple(sets),
        checkpoint=objects.absolute(checkpoint.url),
        mlflow=about.mlflow,
    )
    for name, url in inputs.items():
        with objects.local_copy(url) as file:
            objects.put_file(file, objects.join(out, name))
    objects.write_bytes(objects.join(out, "parity.json"), json.dumps(parity, indent=1).encode())
    objects.write_bytes(objects.join(out, RECORD_FILE), record.to_json())
    return {
        "export": str(out),
        **record.model_dump(include={"fingerprint", "update", "ema", "checkpoint"}),
        "parity": parity,
        "gigabytes": round(n_bytes / 1e9, 3),
        "peak_memory_gigabytes": peak_gigabytes(torch.device("cpu")).get("memory/cpu_peak_gigabytes"),
    }


def _checkpoint_folder(run_folder: str) -> str:
    if objects.is_s3(run_folder):
        return run_folder
    with suppress(FileNotFoundError):  # the merged recipe in the run folder
        recipe = yaml.safe_load(Path(run_folder, "recipe.yaml").read_text(encoding="utf-8"))
        if "prior" not in recipe:
            raise DataError(
                f"{run_folder} is not the folder of a prior run: its recipe.yaml has the sections {', '.join(recipe)}, "
                "expected `prior`"
            )
        if folder := recipe["prior"]["checkpoint"]["folder"]:
            return folder
    return objects.join(run_folder, "checkpoints")


def _weights(checkpoint: Checkpoint[PriorAbout], ema: bool) -> dict[str, StoredTensor]:
    """Return the stored weights, not yet read. Raises DataError if their names or shapes are not those of the model."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Prior(checkpoint.about.model).named_parameters()}
    tensors = SavedState(checkpoint.data).of_kind(AVERAGE if ema else WEIGHTS)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != shapes:
        different = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        named = ", ".join(different[:5])
        raise DataError(f"the tensors of {checkpoint.url} do not match the model of its checkpoint.json: {named} differ")
    return tensors


def _parity(checkpoint: Checkpoint[PriorAbout], model: str) -> dict[str, Any]:
    about, tensors = checkpoint.about, open_weights(model, "prior").tensors
    dtype = getattr(torch, about.weight_dtype)
    n_passes = 1 if not about.fp16_branches and dtype is torch.float32 else 2
    n_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("heads.text."))
    with progress(total=n_bytes * n_passes, what="parity", unit="B", unit_scale=True) as bar:
        parity = prove_parity(
            checkpoint.data, about.model, tensors, fp16_branches=about.fp16_branches, dtype=dtype, read=bar.update
        )
    difference = parity["max_difference_same_format"]
    log.info("export reproduces the engine's losses: largest difference %.1e nats on %d tokens", difference, parity["tokens"])
    return parity
