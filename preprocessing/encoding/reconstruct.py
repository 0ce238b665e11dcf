"""Compare samples of each token shard with their source images: tokens, PSNR, and an image for visual inspection."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dalle_ds.data.images import ImageProblem, seed_of
from dalle_ds.data.manifest import ShardManifest
from dalle_ds.data.raw.shards import RawSample, RawShard, read_raw_shard
from dalle_ds.data.reconstruction import psnr
from dalle_ds.data.tokens.shards import read_block
from dalle_ds.models.dvae import DVAE
from dalle_ds.storage import objects
from preprocessing.encoding.encode_shard import crop_of

# Another device or a 16-bit format may change tokens whose best codes are nearly tied; another image changes nearly all tokens.
MIN_SAME_TOKENS = 0.95


@dataclass(frozen=True)
class Pair:
    """A source crop and the image decoded from its tokens, both uint8 (H, W, C).

    `same_tokens` is the fraction of stored tokens that equal those of the source, encoded again.
    """

    key: str
    source_HWC: np.ndarray
    decoded_HWC: np.ndarray
    same_tokens: float

    @property
    def column(self) -> np.ndarray:
        """The source above its reconstruction."""
        return np.concatenate([self.source_HWC, self.decoded_HWC])

    @property
    def psnr(self) -> float:
        """PSNR in decibels; infinite for equal images."""
        return float(psnr(self.source_HWC[None], self.decoded_HWC[None])[0])


def pairs_of(root: str, manifest: ShardManifest, dvae: DVAE, n_images: int, problems: list[str]) -> list[Pair]:
    """`n_images` samples of each part of a shard, paired with their sources. Empty if the raw shard no longer exists.

    The shard's name seeds the choice of samples. Samples that are missing or unreadable in the raw shard are added to
    `problems`.

    Raises:
        DataError: the raw shard is damaged, or is not the one that the manifest names.
    """
    made_of = manifest.input
    if not objects.exists(made_of.path):
        return []
    rng = np.random.default_rng(seed_of(manifest.shard))
    wanted: dict[str, list[tuple[int, np.ndarray]]] = {}  # key -> crops by number, with their tokens
    n_splits = len(manifest.splits)
    for number, part in enumerate(manifest.parts):
        block = part.blocks[int(rng.integers(len(part.blocks)))]
        tokens_nN, keys, _ = read_block(root, part, block)
        rows = rng.choice(len(tokens_nN), min(n_images, len(tokens_nN)), replace=False)
        crop = max(0, number - n_splits + 1)
        for row in rows:
            wanted.setdefault(keys[row], []).append((crop, tokens_nN[row].astype(np.int64)))
    pairs = []
    for sample in read_raw_shard(RawShard(manifest.shard, made_of.path, made_of.bytes, made_of.checksum)):
        if isinstance(sample, RawSample) and sample.key in wanted:
            crops = wanted.pop(sample.key)
            try:
                pairs += [_pair(sample, crop, tokens_N, dvae) for crop, tokens_N in crops]
            except ImageProblem as problem:
                problems.append(f"shard {manifest.shard}, sample {sample.key}: its source is {problem.reason}")
            if not wanted:
                break
    problems += [f"shard {manifest.shard}, sample {key}: {made_of.path} does not contain it" for key in wanted]
    return pairs


def draw(columns: list[np.ndarray]) -> bytes:
    """PNG of pairs, eight per row.

    Args:
        columns: `Pair.column` of each, one or more.
    """
    columns = columns + [np.full_like(columns[0], 255)] * (-len(columns) % 8)
    rows = [np.concatenate(columns[start : start + 8], axis=1) for start in range(0, len(columns), 8)]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(file, "PNG")
    return file.getvalue()


def _pair(sample: RawSample, crop: int, tokens_N: np.ndarray, dvae: DVAE) -> Pair:
    source_HWC = crop_of(sample, dvae.config.image_size, crop)
    again_N = dvae.tokens(torch.from_numpy(source_HWC)[None].permute(0, 3, 1, 2))[0].numpy()
    decoded_HWC = dvae.decode_tokens(torch.from_numpy(tokens_N)[None])[0].permute(1, 2, 0).numpy()
    return Pair(sample.key, source_HWC, decoded_HWC, float((again_N == tokens_N).mean()))
