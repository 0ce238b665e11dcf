"""Manifests of shards without data, for tests."""

from dalle_ds.data.manifest import DatasetInfo, InputIdentity, Part, ShardDetails, ShardManifest, manifest_url
from dalle_ds.storage import objects

INFO = DatasetInfo(image_size=32, grid=8, n_codes=4, dvae="d", tokenizer="t", crop="c", validation_fraction=0.1).sealed()


def details(n_train: int) -> ShardDetails:
    return ShardDetails(code_histogram=[n_train, 0, 1, 0], caption_lengths={3: n_train}, dropped_samples=[("k", "unreadable")])


def shard(name: str, n_train: int, fingerprint: str = INFO.fingerprint, n_validation: int = 0) -> ShardManifest:
    """A shard with one block of training samples, and one of validation samples if there are any."""

    def part(split: str, n: int) -> Part:
        blocks = {"name": name, "bytes": str(100 + n), "n_samples": str(n), "crc32": f"{n:08x}"}
        return Part(
            path=f"data/{name}-{split}.tar", bytes=200 + n, checksum=f"sha of {name} {split}", n_samples=n, blocks=blocks
        )

    numbers = {"train": n_train, "validation": n_validation}
    return ShardManifest(
        shard=name,
        attempt="a",
        input=InputIdentity(path=f"raw/{name}.tar", bytes=1000),
        splits={split: part(split, n) for split, n in numbers.items() if n},
        n_input=n_train + n_validation + 1,
        dropped={"unreadable": 1},
        fingerprint=fingerprint,
        seconds=1.5,
    )


def write(root: str, *shards: ShardManifest) -> None:
    objects.write_bytes(objects.join(root, "dataset.json"), INFO.to_json())
    for manifest in shards:
        objects.write_bytes(manifest_url(root, manifest.shard), manifest.to_json())
