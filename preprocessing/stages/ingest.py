"""Ingest: convert captioned images in folders, tars or parquet files to filtered raw shards; every sample is accounted for."""

import hashlib
import io
import json
import logging
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from dalle_ds.console import Outcome
from dalle_ds.data.commit import commit_shard, new_attempt
from dalle_ds.data.manifest import RawShardManifest, Record, done_shards, load_shard_manifests, parse
from dalle_ds.data.raw import Dropped, RawSample
from dalle_ds.recipes import canonical_json
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint, require_same
from dalle_ds.storage.hashing import sha256_of_file
from preprocessing.configs import FilterConfig, IngestConfig
from preprocessing.executors.journal import Journal
from preprocessing.executors.local import n_cores, run_shards
from preprocessing.executors.ray_cluster import n_of
from preprocessing.filters.language import language_of
from preprocessing.filters.rules import FILTER_RULES, caption_filters, judge_caption, sample_judge
from preprocessing.readers.folder import Entry, read_folder
from preprocessing.readers.inputs import FolderPart, Part, list_parts, read_entry

log = logging.getLogger(__name__)

RAW_INFO = "raw.json"


@dataclass(frozen=True)
class ShardPlan:
    """The inputs of one shard. The plan is made before any work, so that a restart makes the same shards."""

    name: str
    part: Part


@dataclass(frozen=True)
class IngestJob:
    """One worker's task, picklable. `start` returns the function that processes one shard."""

    out: str
    filters: FilterConfig
    fingerprint: str

    def start(self, n_threads: int) -> Callable[[ShardPlan], RawShardManifest]:
        judge = sample_judge(self.filters)
        return lambda plan: ingest_shard(plan, self, judge)


def run(config: IngestConfig) -> Outcome:
    """Make all missing raw shards.

    Raises:
        DataError: images or captions are missing, or disk space is too small.
        FingerprintMismatch: `out` has shards of other inputs or filters.
    """
    started = time.monotonic()
    plans, listing = _plan(config)
    raw_fingerprint = _claim(config, len(listing), canonical_json(listing).encode())
    done = done_shards(config.out)
    todo = [plan for plan in plans if plan.name not in done]
    objects.check_disk_space(config.out, sum(plan.part.bytes for plan in todo), "the raw shards")
    if not todo:
        log.info("%s: all %d raw shards already exist; nothing to do", config.out, len(plans))
    job = IngestJob(config.out, config.filters, raw_fingerprint)
    n_workers = config.workers or (max(1, n_of("CPU")) if config.engine == "ray" else n_cores())
    _, failures = run_shards(
        job,
        todo,
        n_workers=n_workers,
        name=lambda plan: plan.name,
        size=lambda plan: plan.part.bytes // 1024,
        what="ingest",
        unit="KiB",
        journal=Journal(config.out, len(plans)),
        engine=config.engine,
    )
    manifests = load_shard_manifests(config.out, RawShardManifest)
    dropped: Counter[str] = Counter()
    for manifest in manifests:
        dropped.update(manifest.dropped)
    summary = {
        "out": config.out,
        "shards": len(manifests),
        "shards_made_now": len(todo) - len(failures),
        "inputs": sum(manifest.n_input for manifest in manifests),
        "samples": sum(manifest.n_samples for manifest in manifests),
        "dropped": dict(sorted(dropped.items())),
        "bytes": sum(manifest.bytes for manifest in manifests),
        "failed_shards": failures,
        "fingerprint": raw_fingerprint,
        "seconds": time.monotonic() - started,
    }
    return Outcome(summary, is_complete=not failures)


def _plan(config: IngestConfig) -> tuple[list[ShardPlan], list[list[object]]]:
    # Returns the shards, and the listing of the inputs that goes into the fingerprint.
    url = config.images.rstrip("/")
    parts = list_parts(url, config.columns)
    if parts:
        plans = [ShardPlan(f"{number:05d}", part) for number, part in enumerate(parts)]
        return plans, [[part.url.removeprefix(url), part.bytes] for part in parts]
    entries = plan_entries(read_folder(url), config.filters)
    return (
        plan_shards(entries, config.samples_per_shard),
        [[entry.key, entry.group, entry.caption, entry.bytes] for entry in entries],
    )


def plan_entries(entries: Iterable[Entry], config: FilterConfig) -> list[Entry]:
    """Apply the checks that need no pixels: caption filters, then duplicate files.

    Of byte-identical files, the first with a usable caption is kept.
    """
    checks = caption_filters(config)
    judged = [entry if entry.reason else replace(entry, reason=judge_caption(entry.caption, checks)) for entry in entries]
    by_size = Counter(entry.bytes for entry in judged if not entry.reason)
    suspects = [entry for entry in judged if not entry.reason and by_size[entry.bytes] > 1]  # equal files have equal sizes
    with ThreadPoolExecutor(max_workers=16) as pool:
        digests = dict(zip((entry.url for entry in suspects), pool.map(_digest, suspects), strict=True))
    seen: set[str] = set()
    kept: list[Entry] = []
    for entry in judged:
        digest = digests.get(entry.url, "") if not entry.reason else ""
        kept.append(replace(entry, reason="duplicate image") if digest and digest in seen else entry)
        seen.add(digest)
    return kept


def plan_shards(entries: list[Entry], samples_per_shard: int) -> list[ShardPlan]:
    """Cut the entries, including dropped ones, into shards of equal length; the last may be shorter."""
    starts = range(0, len(entries), samples_per_shard)
    return [
        ShardPlan(f"{number:05d}", FolderPart(tuple(entries[start : start + samples_per_shard])))
        for number, start in enumerate(starts)
    ]


def ingest_shard(plan: ShardPlan, job: IngestJob, judge: Callable[[RawSample], str | None]) -> RawShardManifest:
    """Read, filter and pack the samples of one shard, and commit it. `judge` returns the reason to drop a sample, or None."""
    started = time.monotonic()
    attempt = new_attempt()
    dropped: list[tuple[str, str]] = []
    n_samples = 0
    with tempfile.TemporaryDirectory(prefix="dalle-ds-") as folder:
        tar_file, dropped_file = Path(folder) / "data.tar", Path(folder) / "dropped.jsonl"
        with tarfile.open(tar_file, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in plan.part.samples():
                reason = sample.reason if isinstance(sample, Dropped) else judge(sample)
                if isinstance(sample, Dropped) or reason:
                    dropped.append((sample.key, reason))
                    continue
                _add(tar, f"{sample.key}.{sample.extension}", sample.image)
                language, score = language_of(sample.caption) or (None, None)
                record = {"caption": sample.caption, "group": sample.group, "language": language, "language_score": score}
                _add(tar, f"{sample.key}.json", json.dumps(record, ensure_ascii=False).encode())
                n_samples += 1
        files = {f"data/{plan.name}-{attempt}.tar": tar_file}
        if dropped:
            lines = (json.dumps({"key": key, "reason": reason}, ensure_ascii=False) for key, reason in dropped)
            dropped_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            files[f"dropped/{plan.name}-{attempt}.jsonl"] = dropped_file
        path, *dropped_path = files
        manifest = RawShardManifest(
            shard=plan.name,
            attempt=attempt,
            path=path,
            bytes=tar_file.stat().st_size,
            checksum=sha256_of_file(tar_file),
            n_input=n_samples + len(dropped),
            n_samples=n_samples,
            dropped=dict(Counter(reason for _, reason in dropped)),
            dropped_path=dropped_path[0] if dropped_path else None,
            fingerprint=job.fingerprint,
            seconds=round(time.monotonic() - started, 3),
            finished=time.time(),
        )
        commit_shard(job.out, plan.name, files, manifest)
    return manifest


class RawInfo(Record):
    """raw.json: the inputs of the raw shards under a root."""

    fingerprint: str
    images: str
    n_input: int  # number of samples of an image folder, or number of tars or parquet files
    samples_per_shard: int


def _claim(config: IngestConfig, n_input: int, listing: bytes) -> str:
    # The assignment of samples to shards must not change between a run and its restart.
    rules = {"filters": config.filters.model_dump(), "version": FILTER_RULES, "samples_per_shard": config.samples_per_shard}
    raw_fingerprint = fingerprint(rules, {"listing": listing})
    info = RawInfo(
        fingerprint=raw_fingerprint, images=config.images, n_input=n_input, samples_per_shard=config.samples_per_shard
    )
    url = objects.join(config.out, RAW_INFO)
    if not objects.create_exclusive(url, info.to_json()):
        there = parse(RawInfo, objects.read_bytes(url), url)
        require_same(
            f"raw shards at {config.out}",
            there.fingerprint,
            raw_fingerprint,
            f"They were made from {there.n_input} inputs of {there.images}; images, captions or filters "
            "have changed since. Choose another `ingest.out`, or remove the existing one.",
        )
    return raw_fingerprint


def _digest(entry: Entry) -> str:
    data, _ = read_entry(entry)
    return hashlib.sha256(data).hexdigest() if data else ""


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time and owner stay 0, so that equal samples give equal bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
