"""Validation samples of the data that an export was trained on: captions, codes of the real images, and groups."""

import io
import logging
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dalle_ds.data.tokens.batches import TokenBatch, validation_batches
from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.data.tokens.shards import CAPTIONS
from dalle_ds.sampling.export import Export
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.text import parse_json

log = logging.getLogger(__name__)

READ_AT_LEAST = 512  # samples to choose from, even for a few: a single block may hold images of only one kind


@dataclass(frozen=True)
class ValidationSamples:
    """S samples of the validation split. Samples of one group are variants of one subject, such as skin tones of one emoji."""

    text_ST: Tensor
    image_SN: Tensor
    keys: list[str]
    captions: list[str]
    groups: list[str]
    shards: list[str]
    """Url of the tar that holds the sample's codes."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Sequence[int]) -> "ValidationSamples":
        """Select samples by index, in the order of `rows`."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        lists = ([items[row] for row in rows] for items in (self.keys, self.captions, self.groups, self.shards))
        return ValidationSamples(self.text_ST[index], self.image_SN[index], *lists)


def read_validation(export: Export, data_url: str | None = None, limit: int | None = None) -> ValidationSamples:
    """Read the validation samples as input of the export's prior. If the training data was a mix, read all its data sets.

    Args:
        data_url: data set to read. If None: the data sets that the export names.
        limit: maximum number of samples, taken from all over the split. If None: all.

    Raises:
        DataError: a data set does not exist.
        FingerprintMismatch: a data set was made with another dVAE or tokenizer.
    """
    urls = [data_url] if data_url else list(export.record.data_urls)
    sets = [TokenDataset(url, split="validation") for url in urls]
    for url, dataset in zip(urls, sets, strict=True):
        require_same(f"dVAE of data set {url}", export.record.dvae, dataset.info.dvae, "Its codes stand for other images.")
        require_same(f"tokenizer of data set {url}", export.record.tokenizer, dataset.info.tokenizer)
    return validation_of(sets, export.prior.config.text_len, limit)


def validation_of(sets: Sequence[TokenDataset], text_len: int, limit: int | None = None) -> ValidationSamples:
    """Read the validation samples of several data sets: all, or at most `limit` from all over the split."""
    mix = TokenMix(sets, [1.0] * len(sets))  # only training uses the weights
    root = "" if len(sets) > 1 else sets[0].root_url  # shards of a mix are full urls
    batches = validation_batches(mix, text_len=text_len, batch=1, rank=0, world_size=1, limit=limit)
    return ValidationSamples(
        torch.cat([batch.text_BT for batch in batches]),
        torch.cat([batch.image_BN for batch in batches]),
        [key for batch in batches for key in batch.keys],
        [caption for batch in batches for caption in batch.captions],
        _groups(root, batches),
        [objects.join(root, shard) if root else shard for batch in batches for shard in batch.shards],
    )


def choose_validation(export: Export, n: int, *, data_url: str | None = None, seed: int = 0) -> ValidationSamples:
    """Choose `n` validation samples at random by `seed`, with no two of the same group or with the same caption.

    If there are fewer than `n` such samples, it chooses as many as there are, and a warning states their number.
    """
    chosen = _choose_different(export, n, data_url, seed)
    if len(chosen) < n:
        log.warning("%d validation captions requested; the validation split has only %d different ones", n, len(chosen))
    return chosen


def example_captions(export: Export, n: int) -> list[str]:
    """Returns the captions of `n` validation samples chosen as by `choose_validation`, or of fewer if there are not as many.

    Raises:
        DataError: a data set does not exist.
        FingerprintMismatch: a data set was made with another dVAE or tokenizer.
    """
    return _choose_different(export, n, None, seed=0).captions


def _choose_different(export: Export, n: int, data_url: str | None, seed: int) -> ValidationSamples:
    validation = read_validation(export, data_url, limit=max(READ_AT_LEAST, 32 * n))
    chosen: list[int] = []
    seen: set[str] = set()
    for row in np.random.default_rng(seed).permutation(len(validation)).tolist():
        marks = {f"group {validation.groups[row]}", f"caption {validation.captions[row].lower()}"}
        if len(chosen) < n and not marks & seen:
            chosen.append(row)
            seen |= marks
    return validation.take(chosen)


def _groups(root: str, batches: Sequence[TokenBatch]) -> list[str]:
    """Read the group of each sample from its shard. Batches do not carry groups, because training does not need them.

    Args:
        root: root that shard names are relative to. Empty if the shards are full urls.
    """
    group_of: dict[tuple[str, str], str] = {}
    for shard in sorted({shard for batch in batches for shard in batch.shards}):
        data = objects.read_bytes(objects.join(root, shard) if root else shard)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.name.endswith(f".{CAPTIONS}"):
                    record = parse_json(tar.extractfile(member).read())  # type: ignore[union-attr]
                    group_of.update({(shard, key): group for key, group in zip(record["keys"], record["groups"], strict=True)})
    return [group_of[shard, key] for batch in batches for shard, key in zip(batch.shards, batch.keys, strict=True)]
