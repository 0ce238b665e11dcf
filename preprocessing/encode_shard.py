"""One shard: raw pictures and captions to a committed token shard. It knows nothing of who schedules it."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dalle_ds.data import storage
from dalle_ds.data.fingerprint import require_same
from dalle_ds.data.images import ImageProblem, decode_image, prior_crop, seed_of
from dalle_ds.data.manifest import SPLITS, DatasetInfo, InputIdentity, Part, ShardManifest, Split, manifest_url
from dalle_ds.data.raw import LISTED_REASONS, RawSample, RawShard, read_raw_shard, split_of
from dalle_ds.data.shards import PartWriter
from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.data.weights import read_weights
from dalle_ds.errors import DataError
from dalle_ds.models.dvae import DVAE, DVAEConfig
from preprocessing.commit import commit_shard, new_attempt

# B pictures of a batch, H = W = image_size, C = 3, N tokens a picture


@dataclass(frozen=True)
class EncodeJob:
    """What a worker needs, picklable and small: models are read from the data set's own copies."""

    out: str
    info: DatasetInfo
    batch_size: int
    block_samples: int
    max_failure_rate: float
    device: str

    def start(self, n_threads: int) -> Callable[[RawShard], ShardManifest | None]:
        """Load the models, once a process."""
        torch.set_num_threads(n_threads)
        weights = read_weights(storage.join(self.out, "dvae.safetensors"), "dvae")
        require_same(f"dVAE of data set {self.out}", self.info.dvae, weights.fingerprint)
        dvae = DVAE(DVAEConfig(**weights.config))
        dvae.load_state_dict(weights.state)
        tokenizer = CaptionTokenizer(storage.join(self.out, "tokenizer.model"))
        require_same(f"tokenizer of data set {self.out}", self.info.tokenizer, tokenizer.fingerprint)
        dvae = dvae.eval().requires_grad_(False).to(self.device)
        return lambda shard: encode_shard(shard, self, dvae, tokenizer)


def encode_shard(shard: RawShard, job: EncodeJob, dvae: DVAE, tokenizer: CaptionTokenizer) -> ShardManifest | None:
    """Encode and commit one shard; harmless where another worker does the same shard.

    Returns:
        The manifest; None where the one of another worker stands.

    Raises:
        DataError: the input is missing or damaged, or too many of its samples failed. Nothing is committed then.
    """
    started = time.monotonic()
    if storage.exists(manifest_url(job.out, shard.name)):
        return None
    attempt = new_attempt()
    dropped: list[tuple[str, str]] = []
    histogram = np.zeros(job.info.n_codes, dtype=np.int64)
    lengths: Counter[int] = Counter()
    with tempfile.TemporaryDirectory(prefix="dalle-ds-") as folder, ExitStack() as stack:
        writers = {split: stack.enter_context(
            PartWriter(Path(folder) / f"{split}.tar", shard.name, job.info.n_tokens, job.block_samples)) for split in SPLITS}
        for batch in _batches(shard, job, dropped):
            tokens_BN = _encode(dvae, [picture for _, picture in batch], job.device)
            for (sample, _), tokens_N in zip(batch, tokens_BN, strict=True):
                split = split_of(sample.group, job.info.validation_fraction)
                writers[split].add(tokens_N, sample.key, sample.caption, sample.group)
                if split == "train":
                    histogram += np.bincount(tokens_N, minlength=job.info.n_codes)
                    lengths[len(tokenizer.encode(sample.caption))] += 1
        n_input = sum(writer.n_samples for writer in writers.values()) + len(dropped)
        _require_health(shard, n_input, dropped, job.max_failure_rate)
        parts: dict[Split, Part] = {}
        files: dict[str, Path] = {}
        for split, writer in writers.items():
            if writer.n_samples:
                path = f"data/{shard.name}-{attempt}-{split}.tar"
                parts[split], files[path] = writer.finish(path), writer.path
        manifest = ShardManifest(
            shard=shard.name, attempt=attempt, input=identity_of(shard), splits=parts, n_input=n_input,
            dropped=dict(Counter(reason for _, reason in dropped)), dropped_samples=dropped,
            code_histogram=histogram.tolist(), caption_lengths=dict(sorted(lengths.items())),
            fingerprint=job.info.fingerprint, seconds=round(time.monotonic() - started, 3),
            finished=time.time(),
        )
        return manifest if commit_shard(job.out, shard.name, files, manifest) else None


def identity_of(shard: RawShard) -> InputIdentity:
    """The input, by checksum where a manifest gave one, else by the store's ETag."""
    etag = storage.etag(shard.url) if shard.checksum is None else None
    return InputIdentity(path=shard.url, bytes=shard.bytes, checksum=shard.checksum, etag=etag)


def crop_of(sample: RawSample, image_size: int) -> np.ndarray:
    """The picture as the dVAE sees it, (H, W, C) uint8: decided by the sample alone. ImageProblem where there is none."""
    return prior_crop(decode_image(sample.image), image_size, seed_of(sample.key))


def _batches(shard: RawShard, job: EncodeJob, dropped: list[tuple[str, str]]) -> Iterator[list[tuple[RawSample, np.ndarray]]]:
    # Batches follow the stored order, so that a second attempt computes, and writes, the same bytes.
    batch: list[tuple[RawSample, np.ndarray]] = []
    for sample in read_raw_shard(shard):
        if not isinstance(sample, RawSample):
            dropped.append((sample.key, sample.reason))
            continue
        if not sample.caption.strip():
            dropped.append((sample.key, "empty caption"))
            continue
        try:
            batch.append((sample, crop_of(sample, job.info.image_size)))
        except ImageProblem as problem:
            dropped.append((sample.key, problem.reason))
            continue
        if len(batch) == job.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(dvae: DVAE, pictures: list[np.ndarray], device: str) -> np.ndarray:
    images_BHWC = torch.from_numpy(np.stack(pictures))
    images_BCHW = images_BHWC.to(device).permute(0, 3, 1, 2).contiguous()
    return dvae.tokens(images_BCHW).cpu().numpy()


def _require_health(shard: RawShard, n_input: int, dropped: list[tuple[str, str]], max_failure_rate: float) -> None:
    reasons = Counter(reason for _, reason in dropped)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if not n_input:
        raise DataError(f"{shard.url}: no samples in it")
    n_failed = sum(count for reason, count in reasons.items() if reason not in LISTED_REASONS)
    if n_failed / n_input > max_failure_rate:
        raise DataError(f"{shard.url}: {n_failed} of {n_input} samples failed ({told}); `encode.max_failure_rate` is "
                        f"{max_failure_rate}")
    if "damaged shard" in reasons and max_failure_rate < 1:
        raise DataError(f"{shard.url}: the tar is damaged after {n_input - 1} samples, so an unknown number is lost; "
                        "mend it, or set `encode.max_failure_rate` to 1 to take what can be read")


def code_usage(histogram: list[int]) -> dict[str, float | int]:
    """Codes in use, and perplexity (e to the entropy): 1 if one code does everything, n_codes if all do the same."""
    counts = np.asarray(histogram, dtype=np.float64)
    used = counts[counts > 0]
    shares = used / used.sum() if used.size else used
    return {"n_codes": len(histogram), "codes_used": int(used.size),
            "perplexity": float(np.exp(-(shares * np.log(shares)).sum())) if used.size else 0.0}

