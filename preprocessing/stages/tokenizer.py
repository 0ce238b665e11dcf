"""Tokenizer: train a BPE tokenizer on the captions of the raw shards' training split."""

import logging
import time

from dalle_ds.console import Outcome, progress
from dalle_ds.data.manifest import Record, parse
from dalle_ds.data.raw import RawSample, RawShard, list_raw_shards, read_raw_shard, split_of
from dalle_ds.data.tokenizer import CaptionTokenizer, train_tokenizer
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint
from preprocessing.configs import TokenizerConfig

log = logging.getLogger(__name__)


class Made(Record):
    """OUT.json, next to the model: identifies its training data and settings."""

    inputs: str
    tokenizer: str
    n_captions: int


def run(config: TokenizerConfig) -> Outcome:
    """Train the tokenizer, unless `config.out` was already trained on the same captions with the same settings.

    Raises:
        DataError: there are no raw shards, or no captions in their training split.
        ConfigError: the vocabulary is too small.
    """
    started = time.monotonic()
    shards = list_raw_shards(config.raw)
    inputs = _inputs(config, shards)
    made = _already_made(config.out, inputs)
    is_new = made is None
    if made is None:
        made = _train(config, shards, inputs)
    else:
        log.info("%s: already trained on the same captions; nothing to do", config.out)
    model = CaptionTokenizer(config.out)
    return Outcome(
        {
            "out": config.out,
            "trained_now": is_new,
            "captions": made.n_captions,
            "vocab_size": model.vocab_size,
            "fingerprint": model.fingerprint,
            "seconds": time.monotonic() - started,
        }
    )


def _train(config: TokenizerConfig, shards: list[RawShard], inputs: str) -> Made:
    captions = []
    with progress(total=sum(shard.bytes for shard in shards), what="read captions", unit="B") as bar:
        for shard in shards:
            captions += [
                sample.caption
                for sample in read_raw_shard(shard)
                if isinstance(sample, RawSample) and split_of(sample.group, config.validation_fraction) == "train"
            ]
            bar.update(shard.bytes)
    if not captions:
        raise DataError(f"{config.raw}: no caption in the training split at validation_fraction {config.validation_fraction}")
    model = train_tokenizer(captions, config.vocab_size, config.out)
    made = Made(inputs=inputs, tokenizer=model.fingerprint, n_captions=len(captions))
    objects.write_bytes(_made_url(config.out), made.to_json())
    return made


def _inputs(config: TokenizerConfig, shards: list[RawShard]) -> str:
    listing = [[shard.name, shard.bytes, shard.checksum] for shard in shards]
    return fingerprint({"shards": listing, "vocab_size": config.vocab_size, "validation_fraction": config.validation_fraction})


def _already_made(out: str, inputs: str) -> Made | None:
    url = _made_url(out)
    try:
        made = parse(Made, objects.read_bytes(url), url)
        is_it = made.inputs == inputs and CaptionTokenizer(out).fingerprint == made.tokenizer
    except (FileNotFoundError, DataError):
        return None
    return made if is_it else None


def _made_url(out: str) -> str:
    return f"{out}.json"
