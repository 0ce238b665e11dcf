"""Readers of other libraries, if installed: the same samples in their own formats."""

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, default_collate

from dalle_ds.data.tokens.dataset import TokenDataset

# N image tokens

log = logging.getLogger(__name__)

Sample = Mapping[str, Any]  # "caption", and "tokens": uint16 (N,)


def open_readers(dataset: TokenDataset, folder: str, batch: int, encode: Callable[[Sample], object]) -> dict[str, DataLoader]:
    """Write the data set's samples below `folder` for each reader that can be imported. Returns a loader per reader.

    Each iteration of a loader is one shuffled epoch of batches without the last incomplete batch, read in this process.
    """
    loaders = {}
    for name, (package, write_and_open) in READERS.items():
        try:
            module = importlib.import_module(package)
        except (ImportError, RuntimeError) as error:  # RuntimeError: streaming's torchvision was built for another torch
            log.info("%s is not measured: it cannot be imported (%s)", name, error)
            continue
        source = write_and_open(module, str(Path(folder) / name), dataset, batch)
        loaders[name] = DataLoader(
            source, batch, drop_last=True, collate_fn=lambda samples: default_collate([encode(sample) for sample in samples])
        )
    return loaders


def _samples(dataset: TokenDataset) -> Iterator[dict[str, Any]]:
    for number in range(dataset.n_blocks):
        block = dataset.blocks([number])[number]
        for caption, tokens_N in zip(block.captions, block.tokens_nN, strict=True):
            yield {"caption": caption, "tokens": np.array(tokens_N)}


def _mosaicml_streaming(streaming: ModuleType, folder: str, dataset: TokenDataset, batch: int) -> Dataset:
    columns = {"caption": "str", "tokens": f"ndarray:uint16:{dataset.info.n_tokens}"}
    with streaming.MDSWriter(out=folder, columns=columns) as writer:
        for sample in _samples(dataset):
            writer.write(sample)
    return streaming.StreamingDataset(local=folder, shuffle=True, shuffle_seed=0, batch_size=batch)


def _litdata(litdata: ModuleType, folder: str, dataset: TokenDataset, batch: int) -> Dataset:
    cache = importlib.import_module("litdata.streaming").Cache(folder, chunk_bytes="64MB")
    for i, sample in enumerate(_samples(dataset)):
        cache[i] = sample
    cache.done()
    cache.merge()
    return litdata.StreamingDataset(folder, shuffle=True, seed=0)


READERS: dict[str, tuple[str, Callable[[ModuleType, str, TokenDataset, int], Dataset]]] = {
    "mosaicml_streaming": ("streaming", _mosaicml_streaming),
    "litdata": ("litdata", _litdata),
}
