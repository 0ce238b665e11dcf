"""A sample of each token shard against the images that it was made of: the same tokens again, PSNR, an image for people."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from dalle_ds.data.images import ImageProblem, seed_of
from dalle_ds.data.manifest import ShardManifest
from dalle_ds.data.raw import RawSample, RawShard, read_raw_shard
from dalle_ds.data.reconstruction import psnr
from dalle_ds.data.shards import read_block
from dalle_ds.models.dvae import DVAE
from dalle_ds.storage import objects
from preprocessing.encoding.encode_shard import crop_of

MIN_SAME_TOKENS = 0.95  # another device, or 16 bits, may turn a close decision; another image turns nearly all
MAX_SHOWN = 64


@dataclass(frozen=True)
class Pair:
    """A source crop beside its decoded tokens, both uint8 (H, W, C)."""

    key: str
    source_HWC: np.ndarray
    decoded_HWC: np.ndarray
    same_tokens: float

    @property
    def psnr(self) -> float:
        """Decibels; infinite for equal images."""
        return float(psnr(self.source_HWC[None], self.decoded_HWC[None])[0])


def pairs_of(root: str, manifest: ShardManifest, dvae: DVAE, n_images: int, problems: list[str]) -> list[Pair]:
    """`n_images` samples of each split of a shard, drawn by its name, with their sources; none where the raw shard is gone.

    Adds to `problems` the samples that their source does not have, or not as an image.

    Raises:
        DataError: the raw shard is another than the manifest names, or damaged.
    """
    made_of = manifest.input
    if not objects.exists(made_of.path):
        return []
    rng = np.random.default_rng(seed_of(manifest.shard))
    tokens: dict[str, np.ndarray] = {}
    for part in manifest.splits.values():
        block = part.blocks[int(rng.integers(len(part.blocks)))]
        tokens_nN, keys, _ = read_block(root, part, block)
        rows = rng.choice(len(tokens_nN), min(n_images, len(tokens_nN)), replace=False)
        tokens |= {keys[row]: tokens_nN[row].astype(np.int64) for row in rows}
    pairs = []
    for sample in read_raw_shard(RawShard(manifest.shard, made_of.path, made_of.bytes, made_of.checksum)):
        if isinstance(sample, RawSample) and sample.key in tokens:
            tokens_N = tokens.pop(sample.key)
            try:
                pairs.append(_pair(sample, tokens_N, dvae))
            except ImageProblem as problem:
                problems.append(f"shard {manifest.shard}, sample {sample.key}: its source is {problem.reason}")
            if not tokens:
                break
    problems += [f"shard {manifest.shard}, sample {key}: {made_of.path} does not have it" for key in tokens]
    return pairs


def draw(pairs: list[Pair]) -> bytes:
    """PNG: eight pairs a row, each source above its reconstruction."""
    columns = [np.concatenate([pair.source_HWC, pair.decoded_HWC]) for pair in pairs[:MAX_SHOWN]]
    columns += [np.full_like(columns[0], 255)] * (-len(columns) % 8)
    rows = [np.concatenate(columns[start : start + 8], axis=1) for start in range(0, len(columns), 8)]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(file, "PNG")
    return file.getvalue()


def _pair(sample: RawSample, tokens_N: np.ndarray, dvae: DVAE) -> Pair:
    source_HWC = crop_of(sample, dvae.config.image_size)
    again_N = dvae.tokens(torch.from_numpy(source_HWC)[None].permute(0, 3, 1, 2))[0].numpy()
    decoded_HWC = dvae.decode_tokens(torch.from_numpy(tokens_N)[None])[0].permute(1, 2, 0).numpy()
    return Pair(sample.key, source_HWC, decoded_HWC, float((again_N == tokens_N).mean()))
