"""Verify: read back every manifest and every object that it names, and report every deviation."""

import logging
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dalle_ds.console import Outcome
from dalle_ds.data.images import seed_of
from dalle_ds.data.manifest import (
    DatasetInfo,
    Part,
    RawShardManifest,
    ShardDetails,
    ShardManifest,
    Split,
    load_dataset_info,
    load_shard_manifests,
    spread,
)
from dalle_ds.data.raw.index import RAW_INDEX
from dalle_ds.data.raw.metadata import read_metadata
from dalle_ds.data.raw.shards import Dropped, read_raw_shard, read_reasons, shard_of, split_of
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.data.tokens.dataset_files import INDEX_FOLDER, DatasetManifest, load_index, merge
from dalle_ds.data.tokens.shards import parse_record
from dalle_ds.errors import DataError, UserError
from dalle_ds.models.dvae import DVAE
from dalle_ds.storage import objects
from dalle_ds.storage.hashing import sha256_of_bytes
from dalle_ds.storage.leftovers import leftovers
from dalle_ds.storage.names import DATASET_FILE, DVAE_FILE, MANIFEST_FILE, TOKENIZER_FILE
from dalle_ds.storage.record import parse
from dalle_ds.storage.weights import read_weights
from preprocessing.configs import VerifyConfig
from preprocessing.encoding.encode_shard import load_dvae
from preprocessing.encoding.publication import PUBLISHING
from preprocessing.encoding.reconstruct import MIN_SAME_TOKENS, Pair, draw, pairs_of
from preprocessing.executors.local import n_workers_of, run_shards
from preprocessing.stages.ingest import RAW_INFO, RawInfo

log = logging.getLogger(__name__)

MAX_TOLD = 100
MAX_SHOWN = 64
"""Maximum number of pairs in the image."""
SLICES = 64
IMAGE = "verify/images.png"


@dataclass(frozen=True)
class ShardReport:
    """Result of checking one shard."""

    problems: list[str]
    n_samples: int
    key_hashes: np.ndarray  # 64 bits of each sample's key, sorted
    psnrs: list[float] = field(default_factory=list)  # of the samples that were compared
    columns: list[np.ndarray] = field(default_factory=list)  # images of some of them, if the shard is one to show


@dataclass(frozen=True)
class VerifyJob:
    """One worker's task. `info` is None for raw shards."""

    root: str
    info: DatasetInfo | None
    fingerprint: str
    images_per_shard: int = 0
    shown: dict[str, int] = field(default_factory=dict)
    """Number of pairs to draw, by shard. Only these come back as pixels: those of all shards would be tens of gigabytes."""

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
    """Check everything under the root, or `config.shards` of its shards. The outcome is complete only if there are no problems.

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
    sizes = _listed(config.root)
    read = spread(manifests, config.shards or len(manifests))
    names_read = {manifest.shard for manifest in read}
    others = [one for one in manifests if one.shard not in names_read]
    problems += [problem for one in others for problem in _wrong_manifest(one, mark)]
    problems += _wrong_sizes(config.root, others, sizes)
    shown = spread(read, MAX_SHOWN)
    n_shown = {manifest.shard: -(-MAX_SHOWN // len(shown)) for manifest in shown}
    job = VerifyJob(config.root, info, mark, config.images_per_shard, n_shown)
    n_workers = config.workers or n_workers_of(config.engine)
    reports, failures = run_shards(
        job,
        read,
        n_workers=n_workers,
        name=lambda manifest: manifest.shard,
        size=lambda manifest: manifest.n_samples,
        what="verify",
        unit="sample",
        engine=config.engine,
    )
    problems += [problem for report in reports for problem in report.problems]
    problems += [f"shard {name}: {why}" for name, why in failures.items()]
    n_samples, n_shards_read = sum(report.n_samples for report in reports), len(reports)
    psnrs = np.array([psnr for report in reports for psnr in report.psnrs])
    columns = [column for report in reports for column in report.columns][:MAX_SHOWN]
    n_repeated = n_repeated_keys([report.key_hashes for report in reports])
    problems += [f"{n_repeated} samples have the same key as another sample"] if n_repeated else []
    orphans = _orphans(config.root, manifests, sizes)
    if config.delete_orphans:
        for url in orphans:
            objects.delete(url)
    if columns:
        objects.write_bytes(objects.join(config.root, IMAGE), draw(columns))
    summary = {
        "root": config.root,
        "kind": "tokens" if is_tokens else "raw",
        "shards": len(manifests),
        "shards_read": n_shards_read,
        "samples": n_samples,
        "images_compared": len(psnrs),
        "psnr_mean": float(psnrs.mean()) if len(psnrs) else None,
        "psnr_min": float(psnrs.min()) if len(psnrs) else None,
        "image": objects.join(config.root, IMAGE) if columns else None,
        "n_problems": len(problems),
        "problems": problems[:MAX_TOLD],
        "orphans": len(orphans),
        "orphan_bytes": sum(orphans.values()),
        "orphans_by_kind": dict(sorted(Counter(_kind(config.root, url) for url in orphans).items())),
        "orphans_deleted": config.delete_orphans,
        "fingerprint": mark,
        "seconds": time.monotonic() - started,
    }
    return Outcome(summary, is_complete=not problems, problems=problems[:MAX_TOLD])


def check_shard(job: VerifyJob, manifest: ShardManifest | RawShardManifest, dvae: DVAE | None = None) -> ShardReport:
    """Read one shard back as a reader would, and compare it with its manifest. With a dVAE, compare it with its source too."""
    problems = _wrong_manifest(manifest, job.fingerprint)
    pairs: list[Pair] = []
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
    hashes = np.sort(np.array([seed_of(key) for key in keys], dtype=np.uint64))
    columns = [pair.column for pair in pairs[: job.shown.get(manifest.shard, 0)]]
    return ShardReport(problems, len(keys), hashes, [pair.psnr for pair in pairs], columns)


def _wrong_manifest(manifest: ShardManifest | RawShardManifest, mark: str) -> list[str]:
    problems = []
    if manifest.fingerprint != mark:
        problems.append(f"shard {manifest.shard}: fingerprint {manifest.fingerprint}, expected {mark}")
    if manifest.n_input != manifest.n_samples + sum(manifest.dropped.values()):
        problems.append(
            f"shard {manifest.shard}: {manifest.n_input} inputs, expected the sum of {manifest.n_samples} samples and "
            f"{sum(manifest.dropped.values())} dropped samples"
        )
    return problems


def _check_tokens(root: str, info: DatasetInfo, manifest: ShardManifest, problems: list[str]) -> list[str]:
    keys: list[str] = []
    histogram = np.zeros(info.n_codes, dtype=np.int64)
    keys_of_first: list[str] = []
    for crop, split, part in _parts_of(info, manifest, problems):
        url = objects.join(root, part.path)
        data = _whole_object(url, part)
        of_crop: list[str] = []
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
            if crop == 0:
                keys += record["keys"]
            of_crop += record["keys"]
        if crop == 0 and split == "train":
            keys_of_first = of_crop
        elif crop and of_crop != keys_of_first:
            problems.append(f"{url}: crop {crop} has other samples than crop 0, or in another order")
        if part.n_samples != sum(block.n_samples for block in part.blocks):
            problems.append(f"{url}: {part.n_samples} samples, which is not the sum over its blocks")
    details = manifest.read_details(root)
    if histogram.tolist() != details.code_histogram:
        problems.append(f"shard {manifest.shard}: its code histogram does not match the tokens")
    if Counter(reason for _, reason in details.dropped_samples) != manifest.dropped:
        problems.append(f"shard {manifest.shard}: its list of dropped samples does not match the manifest's counts")
    return keys


def _parts_of(info: DatasetInfo, manifest: ShardManifest, problems: list[str]) -> list[tuple[int, Split, Part]]:
    """Each part with the number of its crop and its split."""
    more = manifest.more_crops or []
    expected = info.n_crops("train") - 1 if "train" in manifest.splits else 0
    if len(more) != expected:
        problems.append(f"shard {manifest.shard}: {len(more)} further crops of the training images, expected {expected}")
    first = [(0, split, part) for split, part in manifest.splits.items()]
    return first + [(crop, "train", part) for crop, part in enumerate(more, start=1)]


def _check_raw(root: str, manifest: RawShardManifest, problems: list[str]) -> list[str]:
    shard = shard_of(root, manifest)
    keys, crcs = [], []
    for sample in read_raw_shard(shard):
        if isinstance(sample, Dropped):
            problems.append(f"{shard.url}: sample {sample.key}: {sample.reason}")
        else:
            keys.append(sample.key)
            crcs.append(zlib.crc32(sample.image))
    if len(keys) != manifest.n_samples:
        problems.append(f"{shard.url}: {len(keys)} samples, expected {manifest.n_samples} as in its manifest")
    if manifest.metadata:
        rows = read_metadata(shard, ("key", "crc32", "reason")).to_pylist()
        if [(row["key"], row["crc32"]) for row in rows if row["reason"] is None] != list(zip(keys, crcs, strict=True)):
            problems.append(f"{shard.metadata}: does not list the images of {shard.url}")
        reasons = Counter(row["reason"] for row in rows if row["reason"] is not None)
        if reasons != manifest.dropped:
            problems.append(f"{shard.metadata}: {dict(reasons)}, expected {manifest.dropped} as in its manifest")
    elif manifest.dropped_path:
        url = objects.join(root, manifest.dropped_path)
        reasons = Counter(record["reason"] for record in read_reasons(url, "list of dropped inputs", "ingest its input again"))
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
    digest = sha256_of_bytes(data)
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
        published, index = load_index(root)
        found, found_index = merge(info, ((manifest, ShardDetails()) for manifest in manifests), published.missing)
        names = ("n_shards", "n_input", "n_samples", "n_bytes", "dropped")
        if index.with_mask({}) != found_index or any(getattr(published, name) != getattr(found, name) for name in names):
            problems.append(f"{url}: does not match the merged {len(manifests)} shard manifests; run encode again")
        if published.missing:
            problems.append(f"{url}: {len(published.missing)} raw shards are not encoded: {', '.join(published.missing[:10])}")
    except UserError as error:
        problems.append(str(error))
    return problems


def _raw_fingerprint(root: str) -> str:
    url = objects.join(root, RAW_INFO)
    try:
        return parse(RawInfo, objects.read_bytes(url), url).fingerprint
    except FileNotFoundError:
        raise DataError(f"{root}: neither raw shards (raw.json) nor a token data set (dataset.json)") from None


def n_repeated_keys(hashes: Sequence[np.ndarray]) -> int:
    """Number of hashes that are equal to another one.

    A range of hashes at a time is sorted: 250 million hashes take 2 GB, and two parts in SLICES of that more.

    Args:
        hashes: uint64, each array sorted.
    """
    bounds = (np.arange(SLICES + 1, dtype=np.float64) * (2.0**64 / SLICES))[1:-1].astype(np.uint64)
    places = [np.concatenate([[0], np.searchsorted(own, bounds), [len(own)]]) for own in hashes]
    n = 0
    for i in range(SLICES if hashes else 0):
        part = np.concatenate([own[place[i] : place[i + 1]] for own, place in zip(hashes, places, strict=True)])
        part.sort()
        n += int((part[1:] == part[:-1]).sum())
    return n


def _listed(root: str) -> dict[str, int]:
    """Bytes of all objects of the shards, and of claims to publish them, by url: a listing instead of a request for each."""
    folders = ("data", "dropped", "metadata", "details", INDEX_FOLDER, PUBLISHING)
    return {url: size for folder in folders for url, size in objects.list_sizes(objects.join(root, folder)).items()}


def _wrong_sizes(root: str, manifests: Sequence[ShardManifest | RawShardManifest], sizes: dict[str, int]) -> list[str]:
    """Objects of shards that are missing or cut, as a listing shows."""
    problems = []
    for manifest in manifests:
        for path, n_bytes in _objects_of(manifest).items():
            url = objects.join(root, path)
            if url not in sizes:
                problems.append(f"{url}: the manifest names this object, but it does not exist")
            elif n_bytes not in (sizes[url], None):
                problems.append(f"{url}: {sizes[url]} bytes, expected {n_bytes} as in its manifest")
    return problems


def _orphans(root: str, manifests: list[ShardManifest] | list[RawShardManifest], sizes: dict[str, int]) -> dict[str, int]:
    named = _index_path(root) | {RAW_INDEX}
    for manifest in manifests:
        named |= _objects_of(manifest).keys()
    wanted = {objects.join(root, path) for path in named}
    return {url: size for url, size in sizes.items() if url not in wanted} | leftovers(root)


def _kind(root: str, url: str) -> str:
    """What an orphan is."""
    path = url.removeprefix(objects.join(root, ""))
    if path.rpartition("/")[2].startswith("."):
        return "temporary file"
    if path.startswith(f"{PUBLISHING}/"):
        return "claim to publish"
    # `publish` keeps it for readers that began before the new one, with its mask, was written.
    return "replaced index" if path.startswith(f"{INDEX_FOLDER}/") else "data of a killed attempt"


def _objects_of(manifest: ShardManifest | RawShardManifest) -> dict[str, int | None]:
    """Bytes of each object that a manifest names, by path. None: the manifest does not tell them."""
    if isinstance(manifest, ShardManifest):
        return {file.path: file.bytes for file in (*manifest.parts, manifest.details) if file}
    files = {file.path: file.bytes for file in (manifest, manifest.metadata) if file}
    return files | ({manifest.dropped_path: None} if manifest.dropped_path else {})


def _index_path(root: str) -> set[str]:
    url = objects.join(root, MANIFEST_FILE)
    try:
        published = parse(DatasetManifest, objects.read_bytes(url), url)
    except (UserError, FileNotFoundError):  # not encoded yet; or damaged, which `_check_dataset` reports
        return set()
    return {published.index.path} if published.index else set()
