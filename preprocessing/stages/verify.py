"""Verify: read back every manifest and every object that it names, and report every deviation."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from dalle_ds.console import Outcome
from dalle_ds.data.images import seed_of
from dalle_ds.data.manifest import (
    DatasetInfo,
    DatasetManifest,
    Part,
    RawShardManifest,
    ShardManifest,
    load_dataset_info,
    load_shard_manifests,
    merge,
    parse,
)
from dalle_ds.data.raw import Dropped, RawShard, read_raw_shard, split_of
from dalle_ds.data.shards import parse_record
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.errors import DataError, UserError
from dalle_ds.models.dvae import DVAE
from dalle_ds.storage import objects
from dalle_ds.storage.names import DATASET_FILE, DVAE_FILE, MANIFEST_FILE, TOKENIZER_FILE
from dalle_ds.storage.weights import read_weights
from preprocessing.configs import VerifyConfig
from preprocessing.encoding.encode_shard import load_dvae
from preprocessing.encoding.reconstruct import MIN_SAME_TOKENS, Pair, draw, pairs_of
from preprocessing.executors.local import n_cores, run_shards
from preprocessing.stages.ingest import RAW_INFO, RawInfo

log = logging.getLogger(__name__)

MAX_TOLD = 100
IMAGE = "verify/images.png"


@dataclass(frozen=True)
class ShardReport:
    """Result of checking one shard."""

    problems: list[str]
    n_samples: int
    key_hashes: np.ndarray  # 64 bits of each sample's key
    pairs: list[Pair] = field(default_factory=list)


@dataclass(frozen=True)
class VerifyJob:
    """One worker's task. `info` is None for raw shards."""

    root: str
    info: DatasetInfo | None
    fingerprint: str
    images_per_shard: int = 0

    def start(self, n_threads: int) -> Callable[[ShardManifest | RawShardManifest], ShardReport]:
        if self.info is None or not self.images_per_shard:
            return lambda manifest: check_shard(self, manifest)
        torch.set_num_threads(n_threads)
        try:
            dvae = load_dvae(objects.join(self.root, DVAE_FILE))[0].eval()
        except UserError:  # _check_dataset reports it with the data set's other files
            dvae = None
        return lambda manifest: check_shard(self, manifest, dvae)


def run(config: VerifyConfig) -> Outcome:
    """Check everything under the root. The outcome is complete only if there are no problems.

    Raises:
        DataError: there are neither raw shards nor a token data set.
    """
    started = time.monotonic()
    problems: list[str] = []
    is_tokens = objects.exists(objects.join(config.root, DATASET_FILE))
    if is_tokens:
        info = load_dataset_info(config.root)
        mark = info.fingerprint
        manifests: list[ShardManifest] | list[RawShardManifest] = load_shard_manifests(config.root, ShardManifest)
        problems += _check_dataset(config.root, info, manifests)
    else:
        info, mark = None, _raw_fingerprint(config.root)
        manifests = load_shard_manifests(config.root, RawShardManifest)
    if not manifests:
        problems.append(f"{config.root}: no shard is finished")
    job = VerifyJob(config.root, info, mark, config.images_per_shard)
    reports, failures = run_shards(
        job,
        manifests,
        n_workers=config.workers or n_cores(),
        name=lambda manifest: manifest.shard,
        size=lambda manifest: manifest.n_samples,
        what="verify",
        unit="sample",
    )
    problems += [problem for report in reports for problem in report.problems]
    problems += [f"shard {name}: {why}" for name, why in failures.items()]
    problems += _repeated_keys(reports)
    orphans = _orphans(config.root, manifests)
    if config.delete_orphans:
        for url in orphans:
            objects.delete(url)
    pairs = [pair for report in reports for pair in report.pairs]
    if pairs:
        objects.write_bytes(objects.join(config.root, IMAGE), draw(pairs))
    summary = {
        "root": config.root,
        "kind": "tokens" if is_tokens else "raw",
        "shards": len(manifests),
        "samples": sum(report.n_samples for report in reports),
        "images_compared": len(pairs),
        "psnr_mean": float(np.mean([pair.psnr for pair in pairs])) if pairs else None,
        "psnr_min": min((pair.psnr for pair in pairs), default=None),
        "image": objects.join(config.root, IMAGE) if pairs else None,
        "n_problems": len(problems),
        "problems": problems[:MAX_TOLD],
        "orphans": len(orphans),
        "orphan_bytes": sum(orphans.values()),
        "orphans_deleted": config.delete_orphans,
        "fingerprint": mark,
        "seconds": time.monotonic() - started,
    }
    return Outcome(summary, is_complete=not problems, problems=problems[:MAX_TOLD])


def check_shard(job: VerifyJob, manifest: ShardManifest | RawShardManifest, dvae: DVAE | None = None) -> ShardReport:
    """Read one shard back as a reader would, and compare it with its manifest. With a dVAE, compare it with its source too."""
    problems: list[str] = []
    pairs: list[Pair] = []
    if manifest.fingerprint != job.fingerprint:
        problems.append(f"shard {manifest.shard}: fingerprint {manifest.fingerprint}, expected {job.fingerprint}")
    if manifest.n_input != manifest.n_samples + sum(manifest.dropped.values()):
        problems.append(
            f"shard {manifest.shard}: {manifest.n_input} inputs, expected the sum of {manifest.n_samples} samples and "
            f"{sum(manifest.dropped.values())} dropped samples"
        )
    try:
        if isinstance(manifest, ShardManifest):
            assert job.info is not None
            keys = _check_tokens(job.root, job.info, manifest, problems)
            if dvae is not None:
                pairs = pairs_of(job.root, manifest, dvae, job.images_per_shard, problems)
                problems += [
                    f"shard {manifest.shard}, sample {pair.key}: {pair.same_tokens:.1%} of its tokens equal those of "
                    f"its source image, expected at least {MIN_SAME_TOKENS:.0%}"
                    for pair in pairs
                    if pair.same_tokens < MIN_SAME_TOKENS
                ]
        else:
            keys = _check_raw(job.root, manifest, problems)
    except (UserError, OSError) as error:
        problems.append(str(error))
        keys = []
    return ShardReport(problems, len(keys), np.array([seed_of(key) for key in keys], dtype=np.uint64), pairs)


def _check_tokens(root: str, info: DatasetInfo, manifest: ShardManifest, problems: list[str]) -> list[str]:
    keys: list[str] = []
    histogram = np.zeros(info.n_codes, dtype=np.int64)
    for split, part in manifest.splits.items():
        url = objects.join(root, part.path)
        data = _whole_object(url, part)
        for block in part.blocks:
            tokens_nN, record = parse_record(data[block.offset : block.offset + block.bytes], block, url)
            if tokens_nN.shape[1:] != (info.n_tokens,) or tokens_nN.dtype != np.uint16 or tokens_nN.max() >= info.n_codes:
                problems.append(
                    f"{url}, block {block.name}: tokens {tokens_nN.dtype} {tokens_nN.shape} up to "
                    f"{tokens_nN.max()}, expected uint16 (n, {info.n_tokens}) below {info.n_codes}"
                )
                continue
            if split == "train":
                histogram += np.bincount(tokens_nN.reshape(-1), minlength=info.n_codes)
            astray = [
                key
                for key, group in zip(record["keys"], record["groups"], strict=True)
                if split_of(group, info.validation_fraction) != split
            ]
            if astray:
                problems.append(
                    f"{url}, block {block.name}: {len(astray)} samples do not belong to the {split} split: {astray[:3]}"
                )
            keys += record["keys"]
        if part.n_samples != sum(block.n_samples for block in part.blocks):
            problems.append(f"{url}: {part.n_samples} samples, which is not the sum over its blocks")
    if histogram.tolist() != manifest.code_histogram:
        problems.append(f"shard {manifest.shard}: the manifest's code histogram does not match the tokens")
    return keys


def _check_raw(root: str, manifest: RawShardManifest, problems: list[str]) -> list[str]:
    shard = RawShard(manifest.shard, objects.join(root, manifest.path), manifest.bytes, manifest.checksum, manifest.n_samples)
    keys = []
    for sample in read_raw_shard(shard):
        if isinstance(sample, Dropped):
            problems.append(f"{shard.url}: sample {sample.key}: {sample.reason}")
        else:
            keys.append(sample.key)
    if len(keys) != manifest.n_samples:
        problems.append(f"{shard.url}: {len(keys)} samples, expected {manifest.n_samples} as in its manifest")
    if manifest.dropped_path:
        url = objects.join(root, manifest.dropped_path)
        reasons = Counter(json.loads(line)["reason"] for line in objects.read_bytes(url).splitlines())
        if reasons != manifest.dropped:
            problems.append(f"{url}: {dict(reasons)}, expected {manifest.dropped} as in its manifest")
    return keys


def _whole_object(url: str, part: Part) -> bytes:
    try:
        data = objects.read_bytes(url)
    except FileNotFoundError:
        raise DataError(f"{url}: the manifest names this object, but it does not exist") from None
    if len(data) != part.bytes:
        raise DataError(f"{url}: {len(data)} bytes, expected {part.bytes} as in its manifest")
    digest = hashlib.sha256(data).hexdigest()
    if digest != part.checksum:
        raise DataError(f"{url}: SHA-256 {digest}, expected {part.checksum} as in its manifest")
    return data


def _check_dataset(root: str, info: DatasetInfo, manifests: list[ShardManifest]) -> list[str]:
    problems = []
    readers: dict[str, tuple[str, Callable[[str], str]]] = {
        TOKENIZER_FILE: (info.tokenizer, lambda url: CaptionTokenizer(url).fingerprint),
        DVAE_FILE: (info.dvae, lambda url: read_weights(url, "dvae").fingerprint),
    }
    for name, (expected, fingerprint_of) in readers.items():
        url = objects.join(root, name)
        try:
            found = fingerprint_of(url)
        except UserError as error:
            problems.append(str(error))
            continue
        if found != expected:
            problems.append(f"{url}: fingerprint {found}, expected {expected} as in dataset.json")
    url = objects.join(root, MANIFEST_FILE)
    if not objects.exists(url):
        return [*problems, f"{url}: missing; the encode run is not complete"]
    try:
        merged = parse(DatasetManifest, objects.read_bytes(url), url)
        if merged != merge(info, manifests, complete=True):
            problems.append(f"{url}: does not match the merged {len(manifests)} shard manifests; run encode again")
    except UserError as error:
        problems.append(str(error))
    return problems


def _raw_fingerprint(root: str) -> str:
    url = objects.join(root, RAW_INFO)
    try:
        return parse(RawInfo, objects.read_bytes(url), url).fingerprint
    except FileNotFoundError:
        raise DataError(f"{root}: neither raw shards (raw.json) nor a token data set (dataset.json)") from None


def _repeated_keys(reports: list[ShardReport]) -> list[str]:
    hashes = np.concatenate([report.key_hashes for report in reports]) if reports else np.zeros(0, dtype=np.uint64)
    n_repeated = len(hashes) - len(np.unique(hashes))
    return [f"{n_repeated} samples have the same key as another sample"] if n_repeated else []


def _orphans(root: str, manifests: list[ShardManifest] | list[RawShardManifest]) -> dict[str, int]:
    named: set[str] = set()
    for manifest in manifests:
        if isinstance(manifest, ShardManifest):
            named |= {part.path for part in manifest.splits.values()}
        else:
            named |= {manifest.path, manifest.dropped_path or manifest.path}
    found = objects.list_sizes(objects.join(root, "data")) | objects.list_sizes(objects.join(root, "dropped"))
    wanted = {objects.join(root, path) for path in named}
    return {url: size for url, size in found.items() if url not in wanted}
