"""Small token data sets for tests: captions of a small grammar, with codes that depict them, so that a prior can learn them."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from dalle_ds.data.manifest import DatasetInfo, InputIdentity, Part, ShardDetails, ShardManifest, StoredFile, manifest_url
from dalle_ds.data.tokenizer import CaptionTokenizer, train_tokenizer
from dalle_ds.data.tokens.dataset_files import merge, publish
from dalle_ds.data.tokens.shards import PartWriter
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.storage import objects
from dalle_ds.storage.weights import write_weights

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("square", "bar", "column", "ring")
PLACES = {
    "at the top": (0.25, 0.5),
    "at the bottom": (0.75, 0.5),
    "on the left": (0.5, 0.25),
    "on the right": (0.5, 0.75),
    "in the middle": (0.5, 0.5),
}
BACKGROUND = 0


def make_token_set(
    root: str | Path,
    *,
    n_samples: int = 256,
    n_validation: int = 32,
    grid: int = 4,
    n_codes: int = 32,
    n_shards: int = 2,
    block_samples: int = 16,
    noise: float = 0.05,
    vocab_size: int = 360,
    seed: int = 0,
    complete: bool = True,
    crops: int = 1,
) -> str:
    """Write a valid token data set below `root` (a path or URL) and return its URL. Equal arguments give equal data.

    Args:
        n_samples, n_validation: samples of the train and the validation split, distributed over `n_shards`.
        n_codes: at least 8, for background and colours.
        noise: probability of replacing a cell's code by a random code.
        complete: False omits manifest.json, as during an encode run.
        crops: crops of each training image. The first crops are those of a data set with one.
    """
    root = str(root)
    rng = np.random.default_rng(seed)
    samples = {
        split: [_sample(rng, grid, n_codes, noise) for _ in range(n)]
        for split, n in (("train", n_samples), ("validation", n_validation))
    }
    tokenizer = train_tokenizer(_grammar(), vocab_size, objects.join(root, "tokenizer.model"))
    info = DatasetInfo(
        image_size=2 * grid,
        grid=grid,
        n_codes=n_codes,
        dvae=_write_dvae(root, grid, n_codes, seed),
        tokenizer=tokenizer.fingerprint,
        crop="none",
        validation_fraction=n_validation / (n_samples + n_validation),
        crops=crops if crops > 1 else None,
    ).sealed()
    objects.write_bytes(objects.join(root, "dataset.json"), info.to_json())
    shards = [
        _write_shard(
            root, info, tokenizer, f"{i:05d}", block_samples, {split: chosen[i::n_shards] for split, chosen in samples.items()}
        )
        for i in range(n_shards)
    ]
    if complete:
        publish(root, *merge(info, [(shard, shard.read_details(root)) for shard in shards]))
    return root


def image(color: str, shape: str, place: str, grid: int, n_codes: int) -> np.ndarray:
    """The codes (grid*grid,) that a caption describes, without noise."""
    cy, cx = (fraction * grid for fraction in PLACES[place])
    y, x = np.mgrid[:grid, :grid] + 0.5
    dy, dx, r = abs(y - cy), abs(x - cx), grid / 4
    inside = {
        "square": (dy <= r) & (dx <= r),
        "bar": (dy <= r / 2) & (dx <= 2 * r),
        "column": (dx <= r / 2) & (dy <= 2 * r),
        "ring": (np.maximum(dy, dx) <= r) & (np.maximum(dy, dx) > r - 1),
    }[shape]
    return np.where(inside, 1 + COLORS.index(color) % (n_codes - 1), BACKGROUND).reshape(-1)


def _grammar() -> list[str]:
    return [f"A {color} {shape} {place}." for color in COLORS for shape in SHAPES for place in PLACES]


def _sample(rng: np.random.Generator, grid: int, n_codes: int, noise: float) -> tuple[str, np.ndarray]:
    color, shape, place = rng.choice(COLORS), rng.choice(SHAPES), rng.choice(list(PLACES))
    codes = image(color, shape, place, grid, n_codes)
    codes = np.where(rng.random(codes.shape) < noise, rng.integers(n_codes, size=codes.shape), codes)
    return f"A {color} {shape} {place}.", codes


def _write_dvae(root: str, grid: int, n_codes: int, seed: int) -> str:
    config = DVAEConfig(image_size=2 * grid, n_groups=2, n_blk_per_group=1, n_hid=8, n_init=8, n_codes=n_codes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DVAE(config)
    url = objects.join(root, "dvae.safetensors")
    return write_weights(url, kind="dvae", config=config.model_dump(), state=model.state_dict())


def _write_shard(
    root: str,
    info: DatasetInfo,
    tokenizer: CaptionTokenizer,
    shard: str,
    block_samples: int,
    samples: dict[str, list[tuple[str, np.ndarray]]],
) -> ShardManifest:
    parts: dict[str, Part] = {}
    more_crops: list[Part] = []
    histogram = np.zeros(info.n_codes, dtype=np.int64)
    lengths: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for split, chosen in samples.items():
            if not chosen:
                continue
            name = f"data/{shard}-test-{split}.tar"
            with PartWriter(Path(folder) / "part.tar", shard, info.n_tokens, block_samples) as writer:
                for i, (caption, codes) in enumerate(chosen):
                    writer.add(codes, f"{split}-{shard}-{i:05d}", caption, group=caption)
                    if split == "train":
                        histogram += np.bincount(codes, minlength=info.n_codes)
                        lengths[len(tokenizer.encode(caption))] += 1
                parts[split] = writer.finish(name)
            objects.put_file(Path(folder) / "part.tar", objects.join(root, name))
        for crop in range(1, info.n_crops("train")):
            name = f"data/{shard}-test-train-crop{crop}.tar"
            with PartWriter(Path(folder) / "part.tar", shard, info.n_tokens, block_samples) as writer:
                for i, (caption, codes) in enumerate(samples["train"]):
                    writer.add(np.roll(codes, crop), f"train-{shard}-{i:05d}", caption, group=caption)
                    histogram += np.bincount(codes, minlength=info.n_codes)
                more_crops.append(writer.finish(name))
            objects.put_file(Path(folder) / "part.tar", objects.join(root, name))
    details = ShardDetails(code_histogram=histogram.tolist(), caption_lengths=lengths).pack()
    path = f"details/{shard}-test.json.gz"
    objects.write_bytes(objects.join(root, path), details)
    manifest = ShardManifest(
        shard=shard,
        attempt="test",
        input=InputIdentity(path="drawn", bytes=0),
        splits=parts,
        more_crops=more_crops or None,
        n_input=sum(map(len, samples.values())),
        dropped={},
        details=StoredFile.of(path, details),
        fingerprint=info.fingerprint,
        seconds=0.0,
    )
    objects.create_exclusive(manifest_url(root, shard), manifest.to_json())
    return manifest
