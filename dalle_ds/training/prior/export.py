"""Export: convert a sharded checkpoint to one folder that any machine can sample from, in memory for two of its tensors.

Threads read the ranks' files, each once, and write the parts that they hold to their places in the export. Fingerprint and
parity check then read the written files.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from dalle_ds.console import progress
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.errors import ConfigError, Damaged, DataError
from dalle_ds.models.prior import Prior
from dalle_ds.parallel.checkpoint_layout import AVERAGE, WEIGHTS
from dalle_ds.parallel.checkpoint_tensors import ENGINE_FILE
from dalle_ds.parallel.saved_state import Put, SavedState, open_state
from dalle_ds.recipe_yaml import read_yaml
from dalle_ds.recipes import from_values
from dalle_ds.sampling.export_record import RECORD_FILE, ExportRecord
from dalle_ds.sampling.settings import PriorSamplingConfig
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.leftovers import remove_old_leftovers
from dalle_ds.storage.names import DVAE_FILE, PRIOR_FILE, TOKENIZER_FILE
from dalle_ds.storage.weights import PutPart, open_weights, pour_weights, verified_fingerprint
from dalle_ds.training.checkpoint import Checkpoint, CheckpointStore
from dalle_ds.training.prior.parity import PARITY_FILE, prove_parity
from dalle_ds.training.prior.state import PriorAbout
from dalle_ds.training.prior.throughput import peak_gigabytes

log = logging.getLogger(__name__)

READING_THREADS = 8
"""State files read at the same time. On s3:// each takes up to 200 MB of memory."""
MAX_FILE_BYTES = 5 * 10**9
"""A larger model is split into several files. 5 GB is common: some file systems and object stores limit one upload to it."""


def export_checkpoint(
    run_folder: str | Path,
    out: str | Path,
    *,
    tag: str | None = None,
    ema: bool = True,
    max_file_bytes: int = MAX_FILE_BYTES,
    temperature: float | None = None,
    guidance: float | None = None,
) -> dict[str, Any]:
    """Write the export folder of a run's checkpoint: prior, config, tokenizer, dVAE and the result of the parity check.

    Args:
        run_folder: folder of the training run, or the s3:// url of its checkpoints.
        out: folder of the export, a path or s3:// url.
        tag: name of the checkpoint, e.g. "update_00000500"; None: the newest.
        ema: export the EMA weights (the paper samples from them) instead of the non-averaged ones.
        max_file_bytes: a larger model is split into several files with an index.
        temperature, guidance: settings that samples of the export are meant for. None: those of the run's recipe.

    Returns:
        The export's url, parts of its record, the parity result (None without `ema`), its size and the peak memory.

    Raises:
        ConfigError: guidance for a prior that was trained without caption dropout.
        DataError: there is no such checkpoint, a file of it has changed, its files do not match each other, or the exported
            model does not reproduce the losses that the engine computed at the save.
        FingerprintMismatch: tokenizer or dVAE of the data set are not those that the run was trained with.
    """
    checkpoints = CheckpointStore(_checkpoint_folder(str(run_folder)), PriorAbout, keep=1)
    checkpoint = checkpoints.find(tag)
    about = checkpoint.about
    sampling = _sampling(checkpoint, {"temperature": temperature, "guidance": guidance})
    sets = [objects.absolute(one.dataset) for one in about.sets]
    dataset = sets[0]
    inputs = {name: objects.join(dataset, name) for name in (TOKENIZER_FILE, DVAE_FILE)}
    tokenizer, dvae = CaptionTokenizer(inputs[TOKENIZER_FILE]), verified_fingerprint(inputs[DVAE_FILE], "dvae")
    for name, expected, found in ((TOKENIZER_FILE, about.tokenizer, tokenizer.fingerprint), (DVAE_FILE, about.dvae, dvae)):
        require_same(f"{name} of data set {dataset}", expected, found, "The run was trained with the expected one.")
    checkpoints.require_whole(checkpoint, [ENGINE_FILE, PARITY_FILE])
    saved = _open_state(checkpoint)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in saved.shapes.items()}
    kind = AVERAGE if ema else WEIGHTS
    ranges = {kind: {name: (0, tensor.numel()) for name, tensor in tensors.items()}}
    read = saved.files_with(ranges)

    def pour(put: PutPart) -> None:
        def take(of: str, name: str, _dtype: torch.dtype) -> Put | None:
            return (lambda at, values: put(name, at, values.float())) if of == kind else None

        # each file is verified while it is read, since the parity check would not notice a changed low bit of a weight
        saved.pour(ranges, take, threads=READING_THREADS, read=bar.update)
        # config.json is deleted before a file of the model is replaced, and written last: without it, a partly written folder
        # does not count as an export
        objects.delete(objects.join(out, RECORD_FILE))

    remove_old_leftovers(out)
    model, n_bytes = objects.join(out, PRIOR_FILE), sum(tensor.nbytes for tensor in tensors.values())
    n_read = sum(file.bytes for name, file in checkpoint.data_files.items() if name in read)
    try:
        with progress(total=n_read + n_bytes, what="export", unit="B", unit_scale=True) as bar:
            fingerprint = pour_weights(
                model,
                kind="prior",
                config=about.model.model_dump(),
                tensors=tensors,
                pour=pour,
                max_file_bytes=max_file_bytes,
                hashed=bar.update,
            )
    except Damaged as error:
        raise checkpoints.refusal(checkpoint, str(error)) from None
    parity = _parity(checkpoint, model) if ema else None  # checkpoints hold losses of the EMA weights only
    record = ExportRecord(
        format=3,
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
        sampling=sampling,
    )
    for name, url in inputs.items():
        with objects.local_copy(url) as file:
            objects.put_file(file, objects.join(out, name))
    objects.write_bytes(objects.join(out, "parity.json"), json.dumps(parity, indent=1).encode())
    objects.write_bytes(objects.join(out, RECORD_FILE), record.to_json())
    return {
        "export": str(out),
        **record.model_dump(include={"fingerprint", "update", "ema", "checkpoint"}),
        **sampling.model_dump(),
        "parity": parity,
        "gigabytes": round(n_bytes / 1e9, 3),
        "peak_memory_gigabytes": peak_gigabytes(torch.device("cpu")).get("memory/cpu_peak_gigabytes"),
    }


def _sampling(checkpoint: Checkpoint[PriorAbout], named: dict[str, float | None]) -> PriorSamplingConfig:
    about = checkpoint.about
    of_run = (about.sampling or PriorSamplingConfig()).model_dump()
    given = {key: value for key, value in named.items() if value is not None}
    sampling = from_values(PriorSamplingConfig, of_run | given, "export")
    if sampling.guidance != 1 and about.caption_dropout == 0:
        raise ConfigError(
            f"guidance {sampling.guidance:g} requires a prior trained with data.caption_dropout above 0, but {checkpoint.url} "
            "was trained with data.caption_dropout 0; export it with guidance 1"
        )
    return sampling


def _checkpoint_folder(run_folder: str) -> str:
    if objects.is_s3(run_folder):
        return run_folder
    file = Path(run_folder, "recipe.yaml")  # the merged recipe of the run
    if file.exists():
        recipe = read_yaml(file)
        if "prior" not in recipe:
            raise DataError(
                f"{run_folder} is not the folder of a prior run: its recipe.yaml has the sections {', '.join(recipe)}, "
                "expected `prior`"
            )
        try:
            folder = recipe["prior"]["checkpoint"]["folder"]
        except (KeyError, TypeError):
            raise DataError(f"{file} is not the recipe of a prior run: it lacks prior.checkpoint.folder") from None
        if folder:
            return str(folder)
    return objects.join(run_folder, "checkpoints")


def _open_state(checkpoint: Checkpoint[PriorAbout]) -> SavedState:
    """Open the state. Raises DataError if names or shapes of its tensors are not those of the model."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Prior(checkpoint.about.model).named_parameters()}
    saved = open_state(checkpoint.data, checkpoint.data_files)
    if saved.shapes != shapes:
        different = sorted(n for n in shapes.keys() | saved.shapes.keys() if shapes.get(n) != saved.shapes.get(n))
        named = ", ".join(different[:5])
        raise DataError(f"the tensors of {checkpoint.url} do not match the model of its checkpoint.json: {named} differ")
    return saved


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
