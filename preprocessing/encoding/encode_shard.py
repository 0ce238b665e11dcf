"""Encode one shard: raw images and captions become a committed token shard, independently of the scheduler."""

import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_ds.data.commit import commit_shard, new_attempt
from dalle_ds.data.images import ImageProblem, decode_image, prior_crop, seed_of
from dalle_ds.data.manifest import SPLITS, DatasetInfo, InputIdentity, Part, ShardManifest, Split, manifest_url
from dalle_ds.data.prefetch import Prefetch
from dalle_ds.data.raw import LISTED_REASONS, Dropped, RawSample, RawShard, read_raw_shard, split_of
from dalle_ds.data.reconstruction import codebook_usage
from dalle_ds.data.shards import PartWriter
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.errors import DataError
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.names import DVAE_FILE, TOKENIZER_FILE
from dalle_ds.storage.weights import read_weights
from preprocessing.configs import Precision
from preprocessing.encoding.encoder import Encode, encoder_of

# B images per batch, H = W = image_size, C = 3, N tokens per image

BATCHES_AHEAD = 2  # batches decoded ahead of the encoder
CHUNK_SAMPLES, CHUNK_BYTES = 16, 1 << 20
Batch = list[tuple[RawSample, np.ndarray]]
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

    def start(self, n_threads: int) -> Callable[[RawShard], ShardManifest | None]:
        """Load the models, once per process. Returns the function that encodes one shard."""
        torch.set_num_threads(n_threads)
        dvae, fingerprint = load_dvae(objects.join(self.out, DVAE_FILE))
        require_same(f"dVAE of data set {self.out}", self.info.dvae, fingerprint)
        tokenizer = CaptionTokenizer(objects.join(self.out, TOKENIZER_FILE))
        require_same(f"tokenizer of data set {self.out}", self.info.tokenizer, tokenizer.fingerprint)
        encode = encoder_of(dvae, self.precision, self.device, bool(self.info.tf32))
        return lambda shard: encode_shard(shard, self, encode, tokenizer, n_threads)


def encode_shard(
    shard: RawShard, job: EncodeJob, encode: Encode, tokenizer: CaptionTokenizer, n_threads: int = 1
) -> ShardManifest | None:
    """Encode and commit one shard. Safe even if another worker encodes the same shard.

    `n_threads` threads decode images and another thread writes samples while the encoder runs.

    Returns:
        The manifest. None if another worker has committed the shard.

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
    with tempfile.TemporaryDirectory(prefix="dalle-ds-") as folder, ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                PartWriter(Path(folder) / f"{split}.tar", shard.name, job.info.n_tokens, job.block_samples)
            )
            for split in SPLITS
        }
        writing = stack.enter_context(ThreadPoolExecutor(1))
        batches = Prefetch(_batches(shard, job, n_threads), BATCHES_AHEAD, "decode", lambda: f"images of {shard.url}")
        stack.callback(batches.close)

        def write(batch: Batch, tokens_BN: np.ndarray) -> None:
            splits = [split_of(sample.group, job.info.validation_fraction) for sample, _ in batch]
            for (sample, _), tokens_N, split in zip(batch, tokens_BN, splits, strict=True):
                writers[split].add(tokens_N, sample.key, sample.caption, sample.group)
                if split == "train":
                    lengths[len(tokenizer.encode(sample.caption))] += 1
            is_train_B = np.array(splits) == "train"
            histogram[:] += np.bincount(tokens_BN[is_train_B].reshape(-1), minlength=job.info.n_codes)

        written: Future[None] | None = None
        for batch, dropped_before in batches:
            dropped += dropped_before
            tokens_BN = encode(np.stack([image for _, image in batch])) if batch else None
            if written:
                written.result()  # at most one batch waits to be written
            written = writing.submit(write, batch, tokens_BN) if tokens_BN is not None else None
        if written:
            written.result()
        n_input = sum(writer.n_samples for writer in writers.values()) + len(dropped)
        _require_health(shard, n_input, dropped, job.max_failure_rate)
        parts: dict[Split, Part] = {}
        files: dict[str, Path] = {}
        for split, writer in writers.items():
            if writer.n_samples:
                path = f"data/{shard.name}-{attempt}-{split}.tar"
                parts[split], files[path] = writer.finish(path), writer.path
        manifest = ShardManifest(
            shard=shard.name,
            attempt=attempt,
            input=identity_of(shard),
            splits=parts,
            n_input=n_input,
            dropped=dict(Counter(reason for _, reason in dropped)),
            dropped_samples=dropped,
            code_histogram=histogram.tolist(),
            caption_lengths=dict(sorted(lengths.items())),
            fingerprint=job.info.fingerprint,
            seconds=round(time.monotonic() - started, 3),
            finished=time.time(),
        )
        return manifest if commit_shard(job.out, shard.name, files, manifest) else None


def load_dvae(url: str) -> tuple[DVAE, str]:
    """Load the dVAE of a file. Returns (dVAE, fingerprint of its weights)."""
    weights = read_weights(url, "dvae")
    dvae = DVAE(DVAEConfig(**weights.config))
    dvae.load_state_dict(weights.state)
    return dvae, weights.fingerprint


def identity_of(shard: RawShard) -> InputIdentity:
    """Identity of the input: its checksum if a manifest has one, otherwise the ETag of its object."""
    etag = objects.etag(shard.url) if shard.checksum is None else None
    return InputIdentity(path=shard.url, bytes=shard.bytes, checksum=shard.checksum, etag=etag)


def crop_of(sample: RawSample, image_size: int) -> np.ndarray:
    """The dVAE's input image, (H, W, C) uint8. It depends on the sample only.

    Raises:
        ImageProblem: the image cannot be decoded or cropped.
    """
    return prior_crop(decode_image(sample.image), image_size, seed_of(sample.key))


def _batches(shard: RawShard, job: EncodeJob, n_threads: int) -> Iterator[tuple[Batch, list[tuple[str, str]]]]:
    # Yields (samples with crops, dropped samples before or among them), in stored order, so that a retry writes the same bytes.
    batch: Batch = []
    dropped: list[tuple[str, str]] = []
    for sample, crop in _crops(shard, job.info.image_size, n_threads):
        if isinstance(crop, str):
            dropped.append((sample.key, crop))
        else:
            batch.append((sample, crop))
        if len(batch) == job.batch:
            yield batch, dropped
            batch, dropped = [], []
    yield batch, dropped


def _crops(shard: RawShard, image_size: int, n_threads: int) -> Iterator[tuple[Any, np.ndarray | str]]:
    # Yields each sample with its crop, or with the reason why it is dropped.
    samples = read_raw_shard(shard)
    if n_threads == 1:
        yield from ((sample, _crop_or_reason(sample, image_size)) for sample in samples)
        return
    ahead: deque[tuple[Chunk, Future[list[np.ndarray | str]]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for chunk in _chunks(samples):
            ahead.append((chunk, pool.submit(lambda chunk: [_crop_or_reason(sample, image_size) for sample in chunk], chunk)))
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


def _crop_or_reason(sample: RawSample | Dropped, image_size: int) -> np.ndarray | str:
    if isinstance(sample, Dropped):
        return sample.reason
    if not sample.caption.strip():
        return "empty caption"
    try:
        return crop_of(sample, image_size)
    except ImageProblem as problem:
        return problem.reason


def _require_health(shard: RawShard, n_input: int, dropped: list[tuple[str, str]], max_failure_rate: float) -> None:
    reasons = Counter(reason for _, reason in dropped)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if not n_input:
        raise DataError(f"{shard.url}: no samples, expected at least one")
    n_failed = sum(count for reason, count in reasons.items() if reason not in LISTED_REASONS)
    if n_failed / n_input > max_failure_rate:
        raise DataError(
            f"{shard.url}: {n_failed} of {n_input} samples failed ({told}); `encode.max_failure_rate` is {max_failure_rate}"
        )
    if "damaged shard" in reasons and max_failure_rate < 1:
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
