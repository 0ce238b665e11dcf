"""Encode: convert raw shards to a token data set with a dVAE and a tokenizer. Each shard is committed exactly once."""

import json
import logging
import time
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError

from dalle_ds.console import Outcome
from dalle_ds.data.images import CROP_RULE
from dalle_ds.data.manifest import (
    DatasetInfo,
    DatasetManifest,
    InputIdentity,
    ShardManifest,
    done_shards,
    load_dataset_info,
    load_shard_manifests,
    merge,
)
from dalle_ds.data.raw import RawShard, list_raw_shards
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.errors import DataError
from dalle_ds.models.dvae import DVAEConfig
from dalle_ds.ops.devices import gpus_are_wanted
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.names import DATASET_FILE, DVAE_FILE, MANIFEST_FILE, TOKENIZER_FILE
from dalle_ds.storage.weights import read_weights
from preprocessing.configs import EncodeConfig, Engine
from preprocessing.encoding.encode_shard import EncodeJob, code_usage, crop_of, load_dvae
from preprocessing.encoding.encoder import agreement, encoder_of
from preprocessing.executors.journal import Journal
from preprocessing.executors.local import n_cores, run_shards
from preprocessing.executors.ray_cluster import n_of

log = logging.getLogger(__name__)

MAX_CODES = 2**16  # codes are stored in 16 bits
TYPICAL_SAMPLES_PER_MB = 20  # for the progress bar and the disk check, if a shard's number of samples is unknown


def run(config: EncodeConfig) -> Outcome:
    """Encode every unfinished shard, then write the merged manifest.

    Raises:
        DataError: input or dVAE is missing, or disk space is too small.
        FingerprintMismatch: `out` was made with another dVAE, tokenizer or crop rule.
    """
    started = time.monotonic()
    shards = list_raw_shards(config.raw)
    first = len(shards) * config.machine // config.machines % len(shards)  # modulo: indices of Slurm arrays may start at 1
    shards = shards[first:] + shards[:first]
    device = _device(config)
    info = _claim(config, shards, device)
    done = done_shards(config.out)
    if done:
        _require_same_inputs(config, shards, load_shard_manifests(config.out, ShardManifest))
    todo = [shard for shard in shards if shard.name not in done]
    sample_bytes = 2 * info.n_tokens + 256  # 256: approximate size of key and caption
    objects.check_disk_space(config.out, sum(map(_samples, todo)) * sample_bytes, "the token shards")
    if not todo:
        log.info("%s: all %d shards are already encoded; nothing to do", config.out, len(shards))
    job = EncodeJob(config.out, info, config.batch, config.block_samples, config.max_failure_rate, device, config.precision)
    n_workers = config.workers or _n_workers(config.engine, device)
    results, failures = run_shards(
        job,
        todo,
        n_workers=n_workers,
        name=lambda shard: shard.name,
        size=_samples,
        what="encode",
        unit="image",
        journal=Journal(config.out, len(shards)),
        engine=config.engine,
        gpus_each=int(device == "cuda"),
    )
    made = [manifest for manifest in results if manifest is not None]
    manifests = load_shard_manifests(config.out, ShardManifest)
    _require_same_inputs(config, shards, manifests)
    manifest = merge(info, manifests, complete=not failures)
    if not failures:
        _publish(config.out, manifest)
    seconds = time.monotonic() - started
    return Outcome(_summary(config, info, manifest, made, failures, seconds), is_complete=not failures)


def _summary(
    config: EncodeConfig,
    info: DatasetInfo,
    manifest: DatasetManifest,
    made: list[ShardManifest],
    failures: dict[str, str],
    seconds: float,
) -> dict[str, object]:
    n_samples = sum(manifest.n_samples.values())
    n_bytes = sum(part.bytes for shard in manifest.shards for part in shard.splits.values())
    return {
        "out": config.out,
        "shards": len(manifest.shards),
        "shards_made_now": len(made),
        "inputs": sum(shard.n_input for shard in manifest.shards),
        "samples": dict(manifest.n_samples),
        "dropped": manifest.dropped,
        "bytes_per_sample": n_bytes / max(1, n_samples),
        **code_usage(manifest.code_histogram),
        "failed_shards": failures,
        "precision": config.precision,
        "agreement": info.agreement,
        "fingerprint": manifest.fingerprint,
        "seconds": seconds,
        "images_per_second": sum(shard.n_input for shard in made) / seconds,
    }


def _claim(config: EncodeConfig, shards: list[RawShard], device: str) -> DatasetInfo:
    # dataset.json is written first: if two runs encode with different models into one output, the second is refused before
    # it writes anything.
    weights = read_weights(config.dvae, "dvae")
    try:
        dvae = DVAEConfig(**weights.config)
    except ValidationError as error:
        raise DataError(f"{config.dvae}: its config does not match DVAEConfig of this version: {error}") from None
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


def _require_live_codebook(config: EncodeConfig, extra: dict[str, str]) -> None:
    trained = extra.get("validation_fraction")
    if trained is not None and float(trained) < config.validation_fraction:
        log.warning(
            "%s was trained with validation_fraction %s, but encode.validation_fraction is %g: the dVAE was trained on some "
            "images of this validation split",
            config.dvae,
            trained,
            config.validation_fraction,
        )
    if "validation" not in extra:
        log.info("%s has no validation report: its codebook usage is unknown", config.dvae)
        return
    validation = json.loads(extra["validation"])
    used, n_codes = validation["codes_used"], validation["n_codes"]
    if used < config.min_codes_used * n_codes:
        raise DataError(
            f"{config.dvae} used {used} of its {n_codes} codes on validation images, expected at least "
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


def _require_same_inputs(config: EncodeConfig, shards: list[RawShard], manifests: list[ShardManifest]) -> None:
    # Shards are identified by name: shards of another raw folder with the same names must not count as done.
    inputs = {manifest.shard: manifest.input for manifest in manifests}
    for shard in shards:
        made_of = inputs.get(shard.name)
        if made_of is not None and not _is_same_input(made_of, shard):
            raise DataError(
                f"{config.out}: shard {shard.name} was made from {made_of.path} ({made_of.bytes} bytes, checksum "
                f"{made_of.checksum}), which is not {shard.url} ({shard.bytes} bytes, checksum {shard.checksum}); "
                "choose another `encode.out` for another raw set"
            )


def _is_same_input(made_of: InputIdentity, shard: RawShard) -> bool:
    if made_of.bytes != shard.bytes:
        return False
    return made_of.checksum is None or shard.checksum is None or made_of.checksum == shard.checksum


def _publish(out: str, manifest: DatasetManifest) -> None:
    url = objects.join(out, MANIFEST_FILE)
    data = manifest.to_json()
    if not objects.exists(url) or objects.read_bytes(url) != data:
        objects.write_bytes(url, data)


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


def _n_workers(engine: Engine, device: str) -> int:
    if engine == "ray":
        return max(1, n_of("GPU" if device == "cuda" else "CPU"))
    return 1 if device == "cuda" else n_cores()
