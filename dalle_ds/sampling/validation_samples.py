"""Validation samples of the data that an export was trained on: captions, real codes, and which of them belong together."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dalle_ds.data.shards import CAPTIONS
from dalle_ds.data.token_dataset import TokenDataset
from dalle_ds.data.token_mix import TokenMix
from dalle_ds.data.tokens import TokenBatch, validation_batches
from dalle_ds.errors import DataError
from dalle_ds.sampling.export import Export
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same

READ_AT_LEAST = 512  # samples looked at when a few are chosen: one block alone may hold images of one kind


@dataclass(frozen=True)
class ValidationSamples:
    """S samples of the validation split. Samples of a `group` are variants of one thing (skin tones of one emoji)."""

    text_ST: Tensor
    image_SN: Tensor
    keys: list[str]
    captions: list[str]
    groups: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Sequence[int]) -> "ValidationSamples":
        """Some of the samples, in the order of `rows`."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        lists = ([items[row] for row in rows] for items in (self.keys, self.captions, self.groups))
        return ValidationSamples(self.text_ST[index], self.image_SN[index], *lists)


def read_validation(export: Export, data_url: str | None = None, limit: int | None = None) -> ValidationSamples:
    """The validation samples (at most `limit`, from all over the split) as the export's prior reads them. Of a mix: those of
    all sets together, as in training.

    Args:
        data_url: one data set to read instead of those that the export names.

    Raises:
        DataError: no data set there. FingerprintMismatch: it belongs to another dVAE or tokenizer.
    """
    urls = [data_url] if data_url else list(export.record.data_urls)
    sets = [TokenDataset(url, split="validation") for url in urls]
    for url, dataset in zip(urls, sets, strict=True):
        require_same(f"dVAE of data set {url}", export.record.dvae, dataset.info.dvae, "Its codes mean other images.")
        require_same(f"tokenizer of data set {url}", export.record.tokenizer, dataset.info.tokenizer)
    return validation_of(sets, export.prior.config.text_len, limit)


def validation_of(sets: Sequence[TokenDataset], text_len: int, limit: int | None = None) -> ValidationSamples:
    """The validation samples of these sets together (at most `limit`, from all over the split)."""
    mix = TokenMix(sets, [1.0] * len(sets))  # weights are training's
    batches = validation_batches(mix, text_len=text_len, batch=1, rank=0, world_size=1, limit=limit)
    return ValidationSamples(
        torch.cat([batch.text_BT for batch in batches]),
        torch.cat([batch.image_BN for batch in batches]),
        [key for batch in batches for key in batch.keys],
        [caption for batch in batches for caption in batch.captions],
        _groups("" if len(sets) > 1 else sets[0].root_url, batches),
    )


def choose_validation(export: Export, n: int, *, data_url: str | None = None, seed: int = 0) -> ValidationSamples:
    """`n` validation samples, each of another group and with another caption, drawn by `seed`.

    Raises:
        DataError: there are not so many groups (the message says how many).
    """
    validation = read_validation(export, data_url, limit=max(READ_AT_LEAST, 32 * n))
    chosen: list[int] = []
    seen: set[str] = set()
    for row in np.random.default_rng(seed).permutation(len(validation)).tolist():
        marks = {f"group {validation.groups[row]}", f"caption {validation.captions[row].lower()}"}
        if len(chosen) < n and not marks & seen:
            chosen.append(row)
            seen |= marks
    if len(chosen) < n:
        raise DataError(f"{n} validation captions wanted, but the validation split has {len(chosen)} different ones")
    return validation.take(chosen)


def _groups(root: str, batches: Sequence[TokenBatch]) -> list[str]:
    """The group of each sample, from the shards that the samples came from (batches carry none: training needs none).
    `root` is empty where shards are whole urls."""
    group_of: dict[tuple[str, str], str] = {}
    for shard in sorted({shard for batch in batches for shard in batch.shards}):
        data = objects.read_bytes(objects.join(root, shard) if root else shard)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.name.endswith(f".{CAPTIONS}"):
                    record = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                    group_of.update({(shard, key): group for key, group in zip(record["keys"], record["groups"], strict=True)})
    return [group_of[shard, key] for batch in batches for shard, key in zip(batch.shards, batch.keys, strict=True)]
