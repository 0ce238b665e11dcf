"""Ingest: convert captioned images in folders, tars or parquet files to filtered raw shards; every sample is accounted for."""

import io
import json
import logging
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from dalle_ds.console import Outcome
from dalle_ds.data.commit import commit_shard, new_attempt
from dalle_ds.data.manifest import RawShardManifest, done_shards, manifest_url
from dalle_ds.data.raw.index import load_raw_manifests, write_raw_index
from dalle_ds.data.raw.metadata import write_metadata
from dalle_ds.data.raw.sample import MAX_TEXT_BYTES, Dropped, RawSample, is_safe_key
from dalle_ds.recipes import canonical_json
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint, require_same
from dalle_ds.storage.hashing import sha256_of_file
from dalle_ds.storage.leftovers import remove_old_leftovers
from dalle_ds.storage.record import Record, parse
from dalle_ds.storage.scratch import scratch_folder
from preprocessing.configs import FilterConfig, IngestConfig
from preprocessing.executors.journal import Journal
from preprocessing.executors.local import n_workers_of, run_shards
from preprocessing.executors.sharing import forget_claims, shared_shards, state_of_input
from preprocessing.filters.language import language_of
from preprocessing.filters.rules import FILTER_RULES, Judgement, caption_filters, judge_caption, sample_judge
from preprocessing.metadata.earlier_shards import MetadataJob
from preprocessing.metadata.rows import Language, Rows, data_offset
from preprocessing.readers.folder import Entry, read_folder
from preprocessing.readers.inputs import FolderPart, Part, list_parts
from preprocessing.readers.listing import list_input

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

    def start(self, n_threads: int) -> Callable[[ShardPlan], bool]:
        judge = sample_judge(self.filters)
        return lambda plan: ingest_shard(plan, self, judge)


def run(config: IngestConfig) -> Outcome:
    """Make all missing raw shards.

    Raises:
        DataError: images or captions are missing, or disk space is too small.
        FingerprintMismatch: `out` has shards of other inputs or filters.
    """
    started = time.monotonic()
    remove_old_leftovers(config.out)
    plans, n_input, listing = _plan(config)
    raw_fingerprint = _claim(config, n_input, listing)
    del listing
    done = done_shards(config.out)
    todo = [plan for plan in plans if plan.name not in done]
    objects.check_disk_space(config.out, sum(plan.part.bytes for plan in todo), "the raw shards")
    if not todo:
        log.info("%s: all %d raw shards already exist; nothing to do", config.out, len(plans))
    job = IngestJob(config.out, config.filters, raw_fingerprint)
    n_workers = config.workers or n_workers_of(config.engine)
    by_name = {plan.name: plan for plan in plans}
    shares = shared_shards(
        list(by_name), done, config.machine, config.machines, config.out, lambda name: _state(by_name[name].part)
    )
    made, failures = run_shards(
        job,
        todo,
        n_workers=n_workers,
        name=lambda plan: plan.name,
        size=lambda plan: plan.part.bytes // 1024,
        what="ingest",
        unit="KiB",
        journal=Journal(config.out, len(plans)),
        engine=config.engine,
        shares=shares,
    )
    if not failures:
        forget_claims(config.out)
    manifests = load_raw_manifests(config.out)
    if without := [manifest for manifest in manifests if manifest.metadata is None]:
        log.info("%s: %d shards of an earlier version have no metadata; each is read once to add it", config.out, len(without))
        _, failed = run_shards(
            MetadataJob(config.out),
            without,
            n_workers=n_workers,
            name=lambda manifest: manifest.shard,
            size=lambda manifest: manifest.n_samples,
            what="add metadata",
            unit="image",
            engine=config.engine,
        )
        failures |= failed
        manifests = load_raw_manifests(config.out)
    write_raw_index(config.out, manifests)
    dropped: Counter[str] = Counter()
    for manifest in manifests:
        dropped.update(manifest.dropped)
    summary = {
        "out": config.out,
        "shards": len(manifests),
        "shards_made_now": sum(made),
        "inputs": sum(manifest.n_input for manifest in manifests),
        "samples": sum(manifest.n_samples for manifest in manifests),
        "dropped": dict(sorted(dropped.items())),
        "bytes": sum(manifest.bytes for manifest in manifests),
        "failed_shards": failures,
        "fingerprint": raw_fingerprint,
        "seconds": time.monotonic() - started,
    }
    return Outcome(summary, is_complete=not failures)


def _plan(config: IngestConfig) -> tuple[list[ShardPlan], int, bytes]:
    # Returns the shards, the number of inputs, and the listing of the inputs that goes into the fingerprint.
    listing = list_input(config.images, follow_links=config.follow_links, without=config.out)
    parts = list_parts(listing, config.columns)
    if parts:
        plans = [ShardPlan(f"{number:05d}", part) for number, part in enumerate(parts)]
        told = (
            [[entry.key, entry.reason] for entry in part.entries]
            if isinstance(part, FolderPart)
            else [part.url.removeprefix(listing.root), part.bytes]
            for part in parts
        )
        return plans, len(parts), _packed(told)
    entries = plan_entries(read_folder(listing), config.filters)
    plans = plan_shards(entries, config.samples_per_shard)
    return plans, len(entries), _packed([entry.key, entry.group, entry.caption, entry.bytes] for entry in entries)


def _state(part: Part) -> str:
    # Images of a folder that cannot be read are dropped, so a shard of them does not fail by its input.
    return "" if isinstance(part, FolderPart) else state_of_input(part.url)


def _packed(items: Iterable[list[object]]) -> bytes:
    """The JSON of a list. A folder may have two million items: as Python lists they would take more than a gigabyte."""
    return b"[" + b",".join(canonical_json(item).encode() for item in items) + b"]"


def plan_entries(entries: Iterable[Entry], config: FilterConfig) -> list[Entry]:
    """Apply the checks that need no file: the caption filters."""
    checks = caption_filters(config)

    def judged(entry: Entry) -> Entry:
        reason = entry.reason or judge_caption(entry.caption, checks)
        return entry if reason == entry.reason else replace(entry, reason=reason)

    return [judged(entry) for entry in entries]


def plan_shards(entries: list[Entry], samples_per_shard: int) -> list[ShardPlan]:
    """Cut the entries, including dropped ones, into shards of equal length; the last may be shorter."""
    starts = range(0, len(entries), samples_per_shard)
    return [
        ShardPlan(f"{number:05d}", FolderPart(tuple(entries[start : start + samples_per_shard])))
        for number, start in enumerate(starts)
    ]


def ingest_shard(plan: ShardPlan, job: IngestJob, judge: Callable[[RawSample], Judgement]) -> bool:
    """Read, filter and pack the samples of one shard, and commit it with its metadata.

    Returns:
        Whether this attempt made the shard, not another machine's.
    """
    if objects.exists(manifest_url(job.out, plan.name)):
        return False
    started = time.monotonic()
    attempt = new_attempt()
    rows = Rows()
    with scratch_folder() as folder:
        tar_file, metadata_file = folder / "data.tar", folder / "metadata.parquet"
        with tarfile.open(tar_file, "w", format=tarfile.PAX_FORMAT) as tar:
            written: set[str] = set()
            for sample in plan.part.samples():
                if isinstance(sample, Dropped):
                    rows.drop(sample.key, sample.reason)
                    continue
                reason, image = judge(sample)
                language = None if reason else language_of(sample.caption)
                record = b"" if reason else _record_of(sample, language)
                reason = reason or _storage_problem(sample.key, record, written)
                if reason or image is None:
                    rows.drop(sample.key, reason or "unreadable")
                    continue
                _add(tar, f"{sample.key}.{sample.extension}", sample.image)
                rows.keep(sample, image, language, data_offset(tar.offset, len(sample.image)))
                _add(tar, f"{sample.key}.json", record)
                written.add(sample.key)
        path, metadata_path = f"data/{plan.name}-{attempt}.tar", f"metadata/{plan.name}-{attempt}.parquet"
        manifest = RawShardManifest(
            shard=plan.name,
            attempt=attempt,
            path=path,
            bytes=tar_file.stat().st_size,
            checksum=sha256_of_file(tar_file),
            n_input=rows.n_samples + rows.dropped.total(),
            n_samples=rows.n_samples,
            dropped=dict(rows.dropped),
            metadata=write_metadata(rows.columns, metadata_file, metadata_path),
            fingerprint=job.fingerprint,
            seconds=round(time.monotonic() - started, 3),
            finished=time.time(),
        )
        return commit_shard(job.out, plan.name, {path: tar_file, metadata_path: metadata_file}, manifest)


def _record_of(sample: RawSample, language: Language) -> bytes:
    name, score = language or (None, None)
    record = {"caption": sample.caption, "group": sample.group, "language": name, "language_score": score}
    return json.dumps(record, ensure_ascii=False).encode()


def _storage_problem(key: str, record: bytes, written: set[str]) -> str | None:
    # What would be written is judged by the rules of its readers: they would drop the sample again, or refuse the shard.
    if not is_safe_key(key):
        return "unsafe name"
    if key in written:
        return "duplicate key"
    return "too large" if len(record) > MAX_TEXT_BYTES else None


class RawInfo(Record):
    """raw.json: the inputs of the raw shards under a root, and the settings that decide what becomes of them."""

    fingerprint: str
    images: str
    n_input: int  # number of samples of an image folder, or number of tars or parquet files
    samples_per_shard: int
    filters: dict[str, Any] | None = None  # None in outputs of earlier versions
    filter_rules: int | None = None

    def fingerprint_with(self, listing: bytes) -> str:
        """The fingerprint of these settings with a listing of inputs."""
        rules = {"filters": self.filters, "version": self.filter_rules, "samples_per_shard": self.samples_per_shard}
        return fingerprint(rules, {"listing": listing})


def _claim(config: IngestConfig, n_input: int, listing: bytes) -> str:
    # The assignment of samples to shards must not change between a run and its restart.
    info = RawInfo(
        fingerprint="",
        images=config.images,
        n_input=n_input,
        samples_per_shard=config.samples_per_shard,
        filters=config.filters.model_dump(),
        filter_rules=FILTER_RULES,
    )
    info = info.model_copy(update={"fingerprint": info.fingerprint_with(listing)})
    url = objects.join(config.out, RAW_INFO)
    if not objects.create_exclusive(url, info.to_json()):
        there = parse(RawInfo, objects.read_bytes(url), url)
        require_same(
            f"raw shards at {config.out}",
            there.fingerprint,
            info.fingerprint,
            f"They were made from {there.n_input} inputs of {there.images}; {'; '.join(_changes(there, info, listing))}. "
            "Choose another `ingest.out`, or remove the existing one.",
        )
    return info.fingerprint


def _changes(there: RawInfo, ours: RawInfo, listing: bytes) -> list[str]:
    """What differs between the making of the shards that are there and this one, for a message."""
    now = ours.filters or {}
    if are_told := there.filters is not None:
        filters = dict.fromkeys(now) | there.filters  # JSON leaves out None
        before = there.model_copy(update={"filters": filters})
    else:  # an earlier version wrote it, so the filters may have changed or not
        filters = now
        before = there.model_copy(update={"filters": now, "filter_rules": ours.filter_rules})
    settings = [
        ("ingest.samples_per_shard", before.samples_per_shard, ours.samples_per_shard),
        ("the version of the filters", before.filter_rules, ours.filter_rules),
        *((f"ingest.filters.{name}", value, now.get(name)) for name, value in filters.items()),
    ]
    changes = [f"{name} was {json.dumps(old)}, is now {json.dumps(new)}" for name, old, new in settings if old != new]
    if before.fingerprint_with(listing) != there.fingerprint:
        number = "" if there.n_input == ours.n_input else f" (now {ours.n_input} inputs)"
        changes.append(f"images{'' if are_told else ', filters'} or captions have changed since{number}")
    return changes


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time and owner stay 0, so that equal samples give equal bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
