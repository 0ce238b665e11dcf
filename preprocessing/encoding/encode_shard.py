"""Encode one shard: raw images and captions become a committed token shard, independently of the scheduler."""

import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_ds.data.commit import commit_shard, new_attempt
from dalle_ds.data.images import ImageProblem, decode_image, prior_crop, seed_of
from dalle_ds.data.manifest import (
    SPLITS,
    DatasetInfo,
    InputIdentity,
    Part,
    ShardDetails,
    ShardManifest,
    Split,
    StoredFile,
    manifest_url,
)
from dalle_ds.data.raw.shards import LISTED_REASONS, Dropped, RawSample, RawShard, read_raw_shard, split_of, without_drop_list
from dalle_ds.data.reconstruction import codebook_usage
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.data.tokens.prefetch import Prefetch
from dalle_ds.data.tokens.shards import PartWriter
from dalle_ds.errors import DataError
from dalle_ds.models.dvae import DVAE
from dalle_ds.pretrained.stored_weights import build_dvae
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.names import DVAE_FILE, TOKENIZER_FILE
from dalle_ds.storage.scratch import scratch_folder
from dalle_ds.storage.weights import read_weights
from preprocessing.configs import Precision
from preprocessing.encoding.encoder import Encode, encoder_of
from preprocessing.encoding.read_ahead import ReadAhead

# B images per batch, K crops of an image, H = W = image_size, C = 3, N tokens per crop

BATCHES_AHEAD = 2  # batches decoded ahead of the encoder
CHUNK_SAMPLES, CHUNK_BYTES = 16, 1 << 20
Batch = list[tuple[RawSample, np.ndarray]]  # samples with their crops, uint8 (K, H, W, C)
Codes = list[tuple[list[int], np.ndarray]]  # for each number of a crop: the rows of the batch that have it, their tokens (B, N)
Chunk = list[RawSample | Dropped]


@dataclass(frozen=True)
class EncodeJob:
    """One worker's task, picklable and small: a worker loads the models from the data set's own copies."""

    out: str
    info: DatasetInfo
    batch: int
    block_samples: int
    max_failure_rate: float
    device: str
    precision: Precision = "fp32"

    def start(self, n_threads: int) -> "Encoding":
        """Load the models, once per process. Returns the function that encodes one shard."""
        torch.set_num_threads(n_threads)
        dvae, fingerprint = load_dvae(objects.join(self.out, DVAE_FILE))
        require_same(f"dVAE of data set {self.out}", self.info.dvae, fingerprint)
        tokenizer = CaptionTokenizer(objects.join(self.out, TOKENIZER_FILE))
        require_same(f"tokenizer of data set {self.out}", self.info.tokenizer, tokenizer.fingerprint)
        encode = encoder_of(dvae, self.precision, self.device, bool(self.info.tf32))
        return Encoding(self, encode, tokenizer, n_threads, ReadAhead())


@dataclass(frozen=True)
class Encoding:
    """A worker's models. Call it with a shard to encode and commit it."""

    job: EncodeJob
    encode: Encode
    tokenizer: CaptionTokenizer
    n_threads: int
    ahead: ReadAhead

    def expect(self, shard: RawShard) -> None:
        """Begin to download the shard that is probably the next."""
        self.ahead.expect(shard)

    def __call__(self, shard: RawShard) -> int | None:
        """Returns the number of input samples. None if another worker has committed the shard."""
        return encode_shard(shard, self.job, self.encode, self.tokenizer, self.n_threads, self.ahead)


def encode_shard(
    shard: RawShard,
    job: EncodeJob,
    encode: Encode,
    tokenizer: CaptionTokenizer,
    n_threads: int = 1,
    ahead: ReadAhead | None = None,
) -> int | None:
    """Encode and commit one shard. Safe even if another worker encodes the same shard.

    `n_threads` threads decode images and another thread writes samples while the encoder runs.

    Returns:
        The number of images that were read. None if another worker has committed the shard.

    Raises:
        DataError: the input is missing or damaged, or too many of its samples failed. Nothing is committed.
    """
    started = time.monotonic()
    if objects.exists(manifest_url(job.out, shard.name)):
        return None
    attempt = new_attempt()
    dropped: list[tuple[str, str]] = []
    histogram = np.zeros(job.info.n_codes, dtype=np.int64)
    lengths: Counter[int] = Counter()
    with scratch_folder() as folder, ExitStack() as stack:
        writers = {
            split: stack.enter_context(PartWriter(folder / f"{split}.tar", shard.name, job.info.n_tokens, job.block_samples))
            for split in SPLITS
        }
        more_crops = [
            stack.enter_context(PartWriter(folder / f"train-{crop}.tar", shard.name, job.info.n_tokens, job.block_samples))
            for crop in range(1, job.info.n_crops("train"))
        ]
        writing = stack.enter_context(ThreadPoolExecutor(1))
        samples = ahead.samples(shard) if ahead else read_raw_shard(shard)
        batches = Prefetch(_batches(samples, job, n_threads), BATCHES_AHEAD, "decode", lambda: f"images of {shard.url}")
        stack.callback(batches.close)

        def write(batch: Batch, codes: Codes) -> None:
            for crop, (rows, tokens_BN) in enumerate(codes):
                for row, tokens_N in zip(rows, tokens_BN, strict=True):
                    sample, split = batch[row][0], _split_of(batch[row][0], job.info)
                    writer = more_crops[crop - 1] if crop else writers[split]
                    writer.add(tokens_N, sample.key, sample.caption, sample.group)
                    if split == "train":
                        histogram[:] += np.bincount(tokens_N, minlength=job.info.n_codes)
                        lengths[len(tokenizer.encode(sample.caption))] += crop == 0

        written: Future[None] | None = None
        for batch, dropped_before in batches:
            dropped += dropped_before
            codes = _encode_crops(batch, encode)
            if written:
                written.result()  # at most one batch waits to be written
            written = writing.submit(write, batch, codes)
        if written:
            written.result()
        n_input = sum(writer.n_samples for writer in writers.values()) + len(dropped)
        _require_health(shard, n_input, dropped, job)
        parts: dict[Split, Part] = {}
        files: dict[str, Path] = {}
        for split, writer in writers.items():
            if writer.n_samples:
                path = f"data/{shard.name}-{attempt}-{split}.tar"
                parts[split], files[path] = writer.finish(path), writer.path
        more_parts: list[Part] = []
        for crop, writer in enumerate(more_crops, start=1):
            if "train" in parts:
                path = f"data/{shard.name}-{attempt}-train-crop{crop}.tar"
                more_parts.append(writer.finish(path))
                files[path] = writer.path
        details = ShardDetails(
            code_histogram=histogram.tolist(), caption_lengths=dict(sorted(lengths.items())), dropped_samples=dropped
        ).pack()
        details_path = f"details/{shard.name}-{attempt}.json.gz"
        files[details_path] = folder / "details"
        files[details_path].write_bytes(details)
        manifest = ShardManifest(
            shard=shard.name,
            attempt=attempt,
            input=identity_of(shard),
            splits=parts,
            more_crops=more_parts or None,
            n_input=n_input,
            dropped=dict(Counter(reason for _, reason in dropped)),
            details=StoredFile.of(details_path, details),
            fingerprint=job.info.fingerprint,
            seconds=round(time.monotonic() - started, 3),
            finished=time.time(),
        )
        return n_input if commit_shard(job.out, shard.name, files, manifest) else None


def load_dvae(url: str) -> tuple[DVAE, str]:
    """Load the dVAE of a file. Returns (dVAE, fingerprint of its weights). Raises UserError if it is none."""
    weights = read_weights(url, "dvae")
    return build_dvae(weights, url), weights.fingerprint


def identity_of(shard: RawShard) -> InputIdentity:
    """Identity of the input: its checksum if a manifest has one, otherwise the ETag of its object. Drop lists do not count."""
    shard = without_drop_list(shard)
    etag = objects.etag(shard.url) if shard.checksum is None else None
    return InputIdentity(path=shard.url, bytes=shard.bytes, checksum=shard.checksum, etag=etag)


def crop_of(sample: RawSample, image_size: int, crop: int = 0) -> np.ndarray:
    """The dVAE's input image, (H, W, C) uint8. It depends on the sample and the number of the crop only.

    Raises:
        ImageProblem: the image cannot be decoded or cropped.
    """
    return prior_crop(decode_image(sample.image), image_size, seed_of(sample.key, crop))


def _split_of(sample: RawSample, info: DatasetInfo) -> Split:
    return split_of(sample.group, info.validation_fraction)


def _encode_crops(batch: Batch, encode: Encode) -> Codes:
    # Crop by crop, so that the encoder never sees more than a batch of images at once.
    codes: Codes = []
    for crop in range(max((len(crops) for _, crops in batch), default=0)):
        rows = [row for row, (_, crops) in enumerate(batch) if len(crops) > crop]
        codes.append((rows, encode(np.stack([batch[row][1][crop] for row in rows]))))
    return codes


def _batches(
    samples: Iterator[RawSample | Dropped], job: EncodeJob, n_threads: int
) -> Iterator[tuple[Batch, list[tuple[str, str]]]]:
    # Yields (samples with crops, dropped samples before or among them), in stored order, so that a retry writes the same bytes.
    batch: Batch = []
    dropped: list[tuple[str, str]] = []
    for sample, crops in _crops(samples, job.info, n_threads):
        if isinstance(crops, str):
            dropped.append((sample.key, crops))
        else:
            batch.append((sample, crops))
        if len(batch) == job.batch:
            yield batch, dropped
            batch, dropped = [], []
    yield batch, dropped


def _crops(samples: Iterator[RawSample | Dropped], info: DatasetInfo, n_threads: int) -> Iterator[tuple[Any, np.ndarray | str]]:
    # Yields each sample with its crops, or with the reason why it is dropped.
    if n_threads == 1:
        yield from ((sample, _crops_or_reason(sample, info)) for sample in samples)
        return
    ahead: deque[tuple[Chunk, Future[list[np.ndarray | str]]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for chunk in _chunks(samples):
            ahead.append((chunk, pool.submit(lambda chunk: [_crops_or_reason(sample, info) for sample in chunk], chunk)))
            if len(ahead) > 2 * n_threads:
                first, crops = ahead.popleft()
                yield from zip(first, crops.result(), strict=True)
        for chunk, crops in ahead:
            yield from zip(chunk, crops.result(), strict=True)


def _chunks(samples: Iterator[RawSample | Dropped]) -> Iterator[Chunk]:
    # A thread decodes one chunk at a time: submitting a single small image would take as long as decoding it.
    chunk: Chunk = []
    n_bytes = 0
    for sample in samples:
        chunk.append(sample)
        n_bytes += len(sample.image) if isinstance(sample, RawSample) else 0
        if len(chunk) == CHUNK_SAMPLES or n_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, n_bytes = [], 0
    yield chunk


def _crops_or_reason(sample: RawSample | Dropped, info: DatasetInfo) -> np.ndarray | str:
    if isinstance(sample, Dropped):
        return sample.reason
    if not sample.caption.strip():
        return "empty caption"
    try:
        image = decode_image(sample.image)
        seeds = [seed_of(sample.key, crop) for crop in range(info.n_crops(_split_of(sample, info)))]
        return np.stack([prior_crop(image, info.image_size, seed) for seed in seeds])
    except ImageProblem as problem:
        return problem.reason


def _require_health(shard: RawShard, n_input: int, dropped: list[tuple[str, str]], job: EncodeJob) -> None:
    # A shard without inputs is healthy: ingest writes one if it drops all samples of a shard.
    reasons = Counter(reason for _, reason in dropped)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    n_failed = sum(count for reason, count in reasons.items() if reason not in LISTED_REASONS)
    if n_failed > job.max_failure_rate * n_input:
        size = job.info.image_size
        hint = (
            f"; the dVAE needs {size} pixels on the shorter side: ingest with `ingest.filters.min_side` {size}, which drops "
            "smaller images there"
        )
        raise DataError(
            f"{shard.url}: {n_failed} of {n_input} samples failed ({told}); `encode.max_failure_rate` is "
            f"{job.max_failure_rate}{hint if 'too small' in reasons else ''}"
        )
    if "damaged shard" in reasons and job.max_failure_rate < 1:
        raise DataError(
            f"{shard.url}: the tar is damaged after {n_input - 1} samples, so an unknown number of samples is lost; "
            "repair it, or set `encode.max_failure_rate` to 1 to use the readable samples"
        )


def code_usage(histogram: list[int]) -> dict[str, float | int]:
    """Codebook usage for summaries: n_codes, codes_used and perplexity. The last two are 0 if the histogram is empty."""
    if not any(histogram):
        return {"n_codes": len(histogram), "codes_used": 0, "perplexity": 0.0}
    usage = codebook_usage(np.array(histogram))
    return {"n_codes": usage.n_codes, "codes_used": usage.n_used, "perplexity": usage.perplexity}
