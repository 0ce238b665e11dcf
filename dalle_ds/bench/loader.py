"""How many samples per second does the training stream deliver, and does a training loop ever wait for data?"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset

from dalle_ds.bench.harness.machine import machine_for
from dalle_ds.bench.harness.readers import Sample, open_readers
from dalle_ds.bench.harness.report import Report
from dalle_ds.bench.harness.settings import LoaderBenchConfig
from dalle_ds.bench.harness.timing import take_turns
from dalle_ds.data.manifest import (
    DatasetInfo,
    InputIdentity,
    ShardDetails,
    ShardManifest,
    load_dataset_info,
    load_shard_manifests,
    manifest_url,
)
from dalle_ds.data.tokenizer import train_tokenizer
from dalle_ds.data.tokens.batches import TokenStream
from dalle_ds.data.tokens.dataset import DecodedBlock, TokenDataset
from dalle_ds.data.tokens.dataset_files import merge, publish
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.data.tokens.shards import PartWriter, unbatch
from dalle_ds.errors import ConfigError
from dalle_ds.padding import PAD
from dalle_ds.storage import objects
from dalle_ds.storage.names import DATASET_FILE, TOKENIZER_FILE

SHUFFLE_BUFFER = 1000  # webdataset's own recommendation
N_SHARDS = 4
WORDS, VOCABULARY = 2000, 1024
RESUME_SHARDS, SHARD_SAMPLES, RESUME_UPDATE = 10_000, 25_000, 100_000


def run(settings: LoaderBenchConfig) -> Report:
    """Compare the training stream with plain webdataset on the same shards, tokenizer and batch size, and with other readers,
    if installed, on the same samples in their own formats."""
    made = tempfile.TemporaryDirectory(prefix="dalle-ds-bench-") if settings.data is None else None
    with (
        machine_for(settings) as machine,
        made or nullcontext() as folder,
        tempfile.TemporaryDirectory(prefix="dalle-ds-bench-") as others_folder,
    ):
        root = settings.data or write_random_set(folder, settings.samples)
        dataset = TokenDataset(root)
        if dataset.n_samples < settings.batch:
            raise ConfigError(f"{root} has {dataset.n_samples} samples, --batch is {settings.batch}")
        n_batches = dataset.n_samples // settings.batch
        sides = {
            "webdataset": lambda: take(webdataset_batches(dataset, settings), n_batches),
            "ours": lambda: epoch(root, settings, bpe_dropout=0.0),
            "dropout": lambda: epoch(root, settings, settings.bpe_dropout),
        }
        others = open_readers(dataset, others_folder, settings.batch, encoder(dataset, settings))
        sides |= {name: lambda loader=loader: take(iter(loader), n_batches) for name, loader in others.items()}
        turns = take_turns(sides, "webdataset", settings.rounds, machine.clock)
        share = wait_share(dataset, settings)
        with tempfile.TemporaryDirectory(prefix="dalle-ds-bench-") as many:
            resume = resume_seconds(write_many_shards(many, RESUME_SHARDS))
        report = Report("loader", machine.name)
    for other in ("webdataset", *others):
        report.add("epoch", other, turns.seconds("ours"), turns.seconds(other), turns.ratio("ours", other))
    report.add(
        "epoch_with_bpe_dropout",
        "webdataset",
        turns.seconds("dropout"),
        turns.seconds("webdataset"),
        turns.ratio("dropout", "webdataset"),
    )
    report.note(**{f"samples_per_second_{name}": n_batches * settings.batch / turns.seconds(name) for name in sides})
    return report.note(consumed_per_second=settings.pace, data_wait_share=share, resume_seconds_10k_shards=resume)


def epoch(root: str, settings: LoaderBenchConfig, bpe_dropout: float) -> None:
    """Open the data set and read all of it once, with no state of an earlier epoch in memory."""
    with stream(TokenDataset(root), settings, bpe_dropout) as source:
        take(source, source.updates_per_epoch)


def stream(dataset: TokenDataset, settings: LoaderBenchConfig, bpe_dropout: float) -> TokenStream:
    """Returns the token stream as the trainer builds it, for one rank with one micro-batch per update."""
    return TokenStream(
        TokenMix([dataset]),
        text_len=settings.text_len,
        global_batch=settings.batch,
        micro_batch=settings.batch,
        rank=0,
        world_size=1,
        seed=0,
        bpe_dropout=bpe_dropout,
        prefetch=2,
    )


def webdataset_batches(dataset: TokenDataset, settings: LoaderBenchConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the (text, image) batches of an epoch: shards in random order, a shuffle buffer, the same tokenizer.

    Raises:
        ConfigError: the shards are not on this machine.
    """
    paths = sorted(set(dataset.shards_of(np.arange(dataset.n_blocks))))
    urls = [objects.join(dataset.root_url, path) for path in paths]
    if any(objects.local_path(url) is None for url in urls):
        raise ConfigError(f"{dataset.root_url}: plain webdataset reads local shards; give --data a path")
    source = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).compose(unbatch).shuffle(SHUFFLE_BUFFER)
    return iter(source.map(encoder(dataset, settings)).batched(settings.batch, partial=False))


def encoder(dataset: TokenDataset, settings: LoaderBenchConfig) -> Callable[[Sample], tuple[torch.Tensor, torch.Tensor]]:
    """Returns a function that turns a sample of another reader into the model's (text, image)."""
    n_text = settings.text_len - 1

    def encode(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.full((n_text,), PAD)
        tokens = dataset.tokenizer.encode(sample["caption"])[:n_text]
        text[: len(tokens)] = torch.tensor(tokens)
        return text, torch.from_numpy(sample["tokens"].astype(np.int64))

    return encode


def take(source: Iterator[object], n: int) -> None:
    """Read n batches and discard them."""
    for _ in islice(source, n):
        pass


def wait_share(dataset: TokenDataset, settings: LoaderBenchConfig) -> float:
    """Returns the fraction of its time that a loop consuming `pace` samples/s waits for the stream, over one epoch."""
    with stream(dataset, settings, settings.bpe_dropout) as source:
        take(source, 2)  # a loop always waits for the first batch
        before, began = source.wait_seconds, time.perf_counter()
        for _ in range(source.updates_per_epoch):
            next(source)
            time.sleep(settings.batch / settings.pace)
        return (source.wait_seconds - before) / (time.perf_counter() - began)


def resume_seconds(root: str) -> float:
    """Returns the wall time from opening the data set to the first batch of update RESUME_UPDATE, as one of 128 ranks with a
    global batch of 1024."""
    began = time.perf_counter()
    with TokenStream(
        TokenMix([_OneShardManyTimes(root)]),
        text_len=256,
        global_batch=1024,
        micro_batch=1,
        rank=5,
        world_size=128,
        seed=0,
        bpe_dropout=0.1,
        start_update=RESUME_UPDATE,
        prefetch=1,
    ) as source:
        next(source)
        return time.perf_counter() - began


class _OneShardManyTimes(TokenDataset):
    """The data set of `write_many_shards`, in whose only file the blocks have the names of the first shard."""

    def _load(self, number: int) -> DecodedBlock:
        return super()._load(number % (self.n_stored_blocks // RESUME_SHARDS))


def write_many_shards(folder: str, n_shards: int) -> str:
    """Write a data set whose manifest lists `n_shards` shards of SHARD_SAMPLES samples, 250 million for 10,000 shards. All
    shards are the same file."""
    root = write_random_set(folder, SHARD_SAMPLES, n_shards=1)
    (shard,) = load_shard_manifests(root, ShardManifest)
    shards = (shard.model_copy(update={"shard": f"{number:05d}"}) for number in range(n_shards))
    publish(root, *merge(load_dataset_info(root), ((shard, ShardDetails()) for shard in shards)))
    return root


def write_random_set(folder: str, n_samples: int, n_shards: int = N_SHARDS) -> str:
    """Write a token data set of the paper's geometry: random codes, captions with Zipf-distributed words."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(WORDS)]
    chances = 1 / np.arange(1, WORDS + 1)
    captions = [" ".join(rng.choice(words, rng.integers(4, 20), p=chances / chances.sum())) for _ in range(n_samples)]
    tokenizer = train_tokenizer(captions[:2000], VOCABULARY, objects.join(folder, TOKENIZER_FILE))
    info = DatasetInfo(
        image_size=256, grid=32, n_codes=8192, dvae="none", tokenizer=tokenizer.fingerprint, crop="none", validation_fraction=0
    ).sealed()
    objects.write_bytes(objects.join(folder, DATASET_FILE), info.to_json())
    shards = []
    for number in range(n_shards):
        name, chosen = f"{number:05d}", captions[number::n_shards]
        path = Path(folder) / f"{name}.tar"
        with PartWriter(path, name, info.n_tokens) as writer:
            for i, caption in enumerate(chosen):
                writer.add(rng.integers(info.n_codes, size=info.n_tokens), f"{name}-{i}", caption, group=caption)
            part = writer.finish(path.name)
        manifest = ShardManifest(
            shard=name,
            attempt="bench",
            input=InputIdentity(path="random", bytes=0),
            splits={"train": part},
            n_input=len(chosen),
            dropped={},
            fingerprint=info.fingerprint,
            seconds=0.0,
        )
        objects.create_exclusive(manifest_url(folder, name), manifest.to_json())
        shards.append((manifest, ShardDetails()))
    publish(folder, *merge(info, shards))
    return folder
