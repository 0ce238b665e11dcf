"""Plan: estimate size, time and cost of preprocessing a number of pairs, from a finished encode or from given rates."""

from dalle_ds.console import Outcome
from dalle_ds.data.manifest import load_dataset_info
from dalle_ds.data.tokens.dataset_files import load_manifest
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.storage import objects
from dalle_ds.storage.names import DATASET_FILE
from preprocessing.configs import DataPlanConfig

TOKENS, CODE_BYTES = 1024, 2
OTHER_BYTES = 90  # per sample, in addition to the codes: key, caption, group, tar headers, and manifest bytes / samples


def run(config: DataPlanConfig) -> Outcome:
    """Shards, bytes and hours for `config.pairs` raw pairs. Given values override measured ones.

    Raises:
        ConfigError: a value is out of range, or no rate is given or measured.
        DataError: nothing is finished under `config.measured`.
    """
    pairs, measured, gpu_rate, price = config.pairs, config.measured, config.gpu_rate, config.price
    samples_per_shard, workers = config.samples_per_shard, config.workers
    found = _measured(measured) if measured else {}
    given = {"rate": config.rate, "raw_bytes": config.raw_bytes, "accepted": config.accepted}
    figures = {name: found.get(name) if value is None else value for name, value in given.items()}
    if figures["rate"] is None and gpu_rate is None:
        raise ConfigError("no rate: give --measured OUT (a finished encode), --rate or --gpu-rate")
    figures["accepted"] = 1.0 if figures["accepted"] is None else figures["accepted"]
    bounds = {
        "--pairs": pairs,
        "--rate": figures["rate"],
        "--gpu-rate": gpu_rate,
        "--raw-bytes": figures["raw_bytes"],
        "--accepted": figures["accepted"],
        "--samples-per-shard": samples_per_shard,
        "--workers": workers,
        "--price": price,
    }
    for name, value in bounds.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value}, expected a number above 0")
    if figures["accepted"] > 1:
        raise ConfigError(f"--accepted is {figures['accepted']}, expected a fraction of at most 1")
    samples = pairs * figures["accepted"]
    crops = config.crops or int(found.get("crops", 1))
    sample_bytes = crops * found.get("crop_bytes", TOKENS * CODE_BYTES + OTHER_BYTES)
    worker_hours = crops * pairs / figures["rate"] / 3600 if figures["rate"] else None
    gpu_hours = crops * pairs / gpu_rate / 3600 if gpu_rate else None
    paid_hours = gpu_hours if gpu_hours is not None else worker_hours
    return Outcome(
        {
            "pairs": round(pairs),
            "samples": round(samples),
            "shards": -int(-pairs // samples_per_shard),
            "raw_terabytes": pairs * figures["raw_bytes"] / 1e12 if figures["raw_bytes"] else None,
            "token_gigabytes": samples * sample_bytes / 1e9,
            "crops": crops,
            "bytes_per_sample": sample_bytes,
            "crops_per_second_worker": figures["rate"],
            "worker_hours": worker_hours,
            "days_with_workers": worker_hours / workers / 24 if worker_hours else None,
            "workers": workers,
            "gpu_hours": gpu_hours,
            "cost": paid_hours * price if price is not None and paid_hours is not None else None,
            "from": {
                name: "given" if value is not None else f"measured in {measured}" if name in found else "assumed"
                for name, value in {**given, "crop_bytes": None}.items()
            },
        }
    )


def _measured(root: str) -> dict[str, float]:
    if not objects.exists(objects.join(root, DATASET_FILE)):
        raise DataError(f"{root}: no token data set; --measured expects the output of `dalle-ds data encode`")
    manifest = load_manifest(root)
    n_input, seconds = manifest.n_input, manifest.seconds
    n_samples = sum(manifest.n_samples.values())
    if not n_samples or seconds <= 0:
        raise DataError(f"{root}: {n_samples} samples in {seconds} s of work; expected above 0, to compute a rate")
    n_crops = load_dataset_info(root).n_crops("train")
    return {
        "crops": n_crops,
        "rate": n_crops * n_input / seconds,
        "accepted": n_samples / n_input,
        "crop_bytes": manifest.n_bytes / n_samples / n_crops,
        "raw_bytes": manifest.input_bytes / n_input,
    }
