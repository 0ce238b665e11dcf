"""Encode: convert raw shards to a token data set with a dVAE and a tokenizer. Each shard is committed exactly once."""

import logging
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from dalle_ds.console import Outcome
from dalle_ds.data.images import CROP_RULE
from dalle_ds.data.manifest import (
    DatasetInfo,
    ShardManifest,
    done_shards,
    iterate_shards,
    load_dataset_info,
    load_shard_manifest,
    spread,
)
from dalle_ds.data.raw.shards import RawShard, list_raw_shards
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.data.tokens.dataset_files import DatasetManifest
from dalle_ds.errors import DataError
from dalle_ds.ops.devices import gpus_are_wanted
from dalle_ds.pretrained.stored_weights import dvae_config_of
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.leftovers import remove_old_leftovers
from dalle_ds.storage.names import DATASET_FILE, DVAE_FILE, TOKENIZER_FILE
from dalle_ds.storage.record import Record, parse
from dalle_ds.storage.weights import number_of, read_weights
from preprocessing.configs import EncodeConfig, Engine
from preprocessing.encoding.encode_shard import EncodeJob, code_usage, crop_of, load_dvae
from preprocessing.encoding.encoder import agreement, encoder_of
from preprocessing.encoding.publication import publish_shards, require_same_inputs
from preprocessing.executors.journal import Journal
from preprocessing.executors.local import n_cores, run_shards
from preprocessing.executors.ray_cluster import n_of, n_places
from preprocessing.executors.sharing import forget_claims, shared_shards, state_of_input

log = logging.getLogger(__name__)

MAX_CHECKED = 64  # finished shards whose inputs are compared with the raw shards at the start
MAX_CODES = 2**16  # codes are stored in 16 bits
TYPICAL_SAMPLES_PER_MB = 20  # for the progress bar and the disk check, if a shard's number of samples is unknown


def run(config: EncodeConfig) -> Outcome:
    """Encode every unfinished shard, then publish the finished ones. Failed shards are named, and may be encoded later.

    Raises:
        DataError: input or dVAE is missing, or disk space is too small.
        FingerprintMismatch: `out` was made with another dVAE, tokenizer or crop rule.
    """
    started = time.monotonic()
    remove_old_leftovers(config.out)
    shards = list_raw_shards(config.raw)
    device = _device(config)
    info = _claim(config, shards, device)
    done = done_shards(config.out)
    _check_some_inputs(config, shards, done)
    todo = [shard for shard in shards if shard.name not in done]
    sample_bytes = config.crops * (2 * info.n_tokens + 256)  # 256: approximate size of key and caption
    objects.check_disk_space(config.out, sum(map(_samples, todo)) * sample_bytes, "the token shards")
    if not todo:
        log.info("%s: all %d shards are already encoded; nothing to do", config.out, len(shards))
    job = EncodeJob(config.out, info, config.batch, config.block_samples, config.max_failure_rate, device, config.precision)
    gpus = _gpus() if device == "cuda" and config.engine == "local" else []
    cpus_each = config.worker_cpus or (8 if device == "cuda" else 1)
    by_name = {shard.name: shard for shard in shards}
    shares = shared_shards(
        list(by_name), done, config.machine, config.machines, config.out, lambda name: _state(config, by_name[name])
    )
    results, failures = run_shards(
        job,
        todo,
        n_workers=config.workers or _n_workers(config.engine, device, len(gpus), cpus_each),
        name=lambda shard: shard.name,
        size=_samples,
        what="encode",
        unit="image",
        journal=Journal(config.out, len(shards)),
        engine=config.engine,
        cpus_each=cpus_each,
        gpus_each=int(device == "cuda"),
        gpus=gpus,
        shares=shares,
        looks_ahead=objects.local_path(config.raw) is None,
    )
    made = [n_input for n_input in results if n_input is not None]
    manifest = publish_shards(config.out, info, shards, config.machine, config.machines)
    if manifest.complete:
        forget_claims(config.out)
        if not any(manifest.n_samples.values()):
            log.warning("%s: no sample in any of %d shards: all were dropped before", config.out, len(shards))
    seconds = time.monotonic() - started
    return Outcome(_summary(config, info, manifest, made, failures, seconds), is_complete=not failures)


def _summary(
    config: EncodeConfig,
    info: DatasetInfo,
    manifest: DatasetManifest,
    made: list[int],
    failures: dict[str, str],
    seconds: float,
) -> dict[str, object]:
    n_samples = sum(manifest.n_samples.values())
    return {
        "out": config.out,
        "shards": manifest.n_shards,
        "shards_made_now": len(made),
        "inputs": manifest.n_input,
        "samples": dict(manifest.n_samples),
        "dropped": manifest.dropped,
        "masked": manifest.masked,
        "no_longer_listed": manifest.no_longer_listed,
        "crops": config.crops,
        "bytes_per_sample": manifest.n_bytes / max(1, n_samples),
        **code_usage(manifest.code_histogram),
        "failed_shards": failures,
        "precision": config.precision,
        "agreement": info.agreement,
        "fingerprint": manifest.fingerprint,
        "seconds": seconds,
        "images_per_second": sum(made) / seconds,
    }


def _claim(config: EncodeConfig, shards: list[RawShard], device: str) -> DatasetInfo:
    # dataset.json is written first: if two runs encode with different models into one output, the second is refused before
    # it writes anything.
    weights = read_weights(config.dvae, "dvae")
    dvae = dvae_config_of(weights, config.dvae)
    _require_live_codebook(config, weights.extra)
    if dvae.n_codes > MAX_CODES:
        raise DataError(f"{config.dvae}: {dvae.n_codes} codes, expected at most {MAX_CODES}")
    tokenizer = CaptionTokenizer(config.tokenizer)
    precision = _checked_precision(config, shards, device)
    info = DatasetInfo(
        image_size=dvae.image_size,
        grid=dvae.grid,
        n_codes=dvae.n_codes,
        dvae=weights.fingerprint,
        tokenizer=tokenizer.fingerprint,
        crop=CROP_RULE,
        validation_fraction=config.validation_fraction,
        crops=config.crops if config.crops > 1 else None,
        **precision,
    ).sealed()
    if not objects.create_exclusive(objects.join(config.out, DATASET_FILE), info.to_json()):
        _require_same_making(config.out, load_dataset_info(config.out), info)
    for name, source in ((DVAE_FILE, config.dvae), (TOKENIZER_FILE, config.tokenizer)):
        if not objects.exists(objects.join(config.out, name)):
            with objects.local_copy(source) as file:
                objects.put_file(file, objects.join(config.out, name))
    return info


def _checked_precision(config: EncodeConfig, shards: list[RawShard], device: str) -> dict[str, Any]:
    if config.tf32 and device != "cuda":
        raise DataError(f"encode.tf32 is true on {device}, which has no TF32; expected false")
    if config.precision == "fp32" and not config.tf32:
        return {}
    if config.precision == "fp16" and device != "cuda":
        raise DataError(f"encode.precision is fp16 on {device}; expected fp32 or bf16")
    dvaes = [load_dvae(config.dvae)[0] for _ in range(2)]
    sides = encoder_of(dvaes[0], "fp32", device), encoder_of(dvaes[1], config.precision, device, config.tf32)
    size = dvaes[0].config
    share = agreement(shards, size.n_tokens, partial(crop_of, image_size=size.image_size), config.batch, sides)
    what = config.precision + " with TF32" * config.tf32
    log.info("%s: %.2f%% of the tokens of the first images equal those of fp32", what, 100 * share)
    if share < config.min_agreement:
        raise DataError(
            f"encode.precision {what}: {share:.2%} of the tokens of the first images equal those of "
            f"fp32, encode.min_agreement expects {config.min_agreement:.2%}; use fp32"
        )
    # Default values are stored as None and omitted, so data sets that predate these fields keep their fingerprints.
    return {
        "precision": None if config.precision == "fp32" else config.precision,
        "tf32": config.tf32 or None,
        "agreement": round(share, 5),
    }


class CodebookUsage(Record):
    """What is read of the validation report in a dVAE's metadata."""

    codes_used: int
    n_codes: int


def _require_live_codebook(config: EncodeConfig, extra: Mapping[str, Any]) -> None:
    trained = number_of(extra, "validation_fraction", config.dvae)
    if trained is not None and trained < config.validation_fraction:
        log.warning(
            "%s was trained with validation_fraction %g, but encode.validation_fraction is %g: the dVAE was trained on some "
            "images of this validation split",
            config.dvae,
            trained,
            config.validation_fraction,
        )
    if "validation" not in extra:
        log.info("%s has no validation report: its codebook usage is unknown", config.dvae)
        return
    usage = parse(CodebookUsage, str(extra["validation"]).encode(), f"validation report of {config.dvae}")
    if usage.codes_used < config.min_codes_used * usage.n_codes:
        raise DataError(
            f"{config.dvae} used {usage.codes_used} of its {usage.n_codes} codes on validation images, expected at least "
            f"{config.min_codes_used:.0%}: a prior would learn little from its tokens. Improve the dVAE, or lower "
            "encode.min_codes_used"
        )


def _require_same_making(out: str, there: DatasetInfo, ours: DatasetInfo) -> None:
    hint = "Choose another `encode.out` for another data set."
    for part in ("dvae", "tokenizer"):
        require_same(f"{part} of data set {out}", getattr(there, part), getattr(ours, part), hint)
    differing = {name: (value, getattr(ours, name)) for name, value in there if value != getattr(ours, name)}
    for figure in ("fingerprint", "agreement"):
        differing.pop(figure, None)
    told = ", ".join(f"{name} was {old!r}, is now {new!r}" for name, (old, new) in differing.items())
    require_same(f"data set {out} ({told})", there.fingerprint, ours.fingerprint, hint)


def _check_some_inputs(config: EncodeConfig, shards: list[RawShard], done: set[str]) -> None:
    # Some shards suffice to notice another raw folder, and `publish_shards` checks all of them. Here the GPUs would wait for
    # minutes until all manifests are read.
    there = [shard for shard in shards if shard.name in done]
    chosen = {shard.name: shard for shard in spread(there, MAX_CHECKED)}
    manifests = iterate_shards(sorted(chosen), partial(load_shard_manifest, config.out, ShardManifest))
    require_same_inputs(config.out, chosen, ((manifest.shard, manifest.input) for manifest in manifests))


def _state(config: EncodeConfig, shard: RawShard) -> str:
    return state_of_input(shard.url, checksum=shard.checksum, bytes=shard.bytes, max_failure_rate=config.max_failure_rate)


def _samples(shard: RawShard) -> int:
    return shard.n_samples if shard.n_samples is not None else max(1, shard.bytes * TYPICAL_SAMPLES_PER_MB // 2**20)


def _device(config: EncodeConfig) -> str:
    has_gpu = n_of("GPU") > 0 if config.engine == "ray" else torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        where = "the Ray cluster has no GPU" if config.engine == "ray" else "torch sees no CUDA device"
        raise DataError(f"encode.device is cuda but {where}; expected cpu or auto")
    if config.device == "auto":
        return "cuda" if has_gpu and gpus_are_wanted() else "cpu"
    return config.device


def _n_workers(engine: Engine, device: str, n_gpus: int, cpus_each: int) -> int:
    if engine == "ray":
        return n_places(cpus_each, int(device == "cuda"))
    return n_gpus if device == "cuda" else n_cores()


def _gpus() -> list[str]:
    """The GPUs of this machine that the process may use, as CUDA_VISIBLE_DEVICES names them."""
    n_gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:n_gpus] if visible else [str(number) for number in range(n_gpus)]
