"""Tokenizer: train a BPE tokenizer on a sample of the captions of the raw shards' training split."""

import logging
import time
from collections.abc import Iterator

import numpy as np

from dalle_ds.console import Outcome, progress
from dalle_ds.data.raw.metadata import iterate_sample_rows
from dalle_ds.data.raw.shards import RawShard, list_raw_shards, split_of
from dalle_ds.data.tokenizer import CaptionTokenizer, train_tokenizer
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint
from dalle_ds.storage.hashing import hash_to_integer
from dalle_ds.storage.record import Record, parse
from preprocessing.configs import TokenizerConfig

log = logging.getLogger(__name__)


class Made(Record):
    """OUT.json, next to the model: identifies its training data and settings."""

    inputs: str
    tokenizer: str | None = None
    """Fingerprint of the model. None: written before the model is, so that a killed training is known as this one."""
    n_captions: int = 0


def run(config: TokenizerConfig) -> Outcome:
    """Train the tokenizer, unless `config.out` was already trained on the same captions with the same settings.

    Captions are read from the metadata beside the tars, one shard after the other, and only their words are counted. Tars are
    read where there is no metadata: in a folder of plain tars, or in raw shards of an earlier version.

    Raises:
        DataError: there are no raw shards, or no captions in their training split; or `config.out` is another file or model.
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
    n_captions = 0

    def counted() -> Iterator[str]:
        nonlocal n_captions
        for caption in _captions(config, shards):
            n_captions += 1
            yield caption
        if not n_captions:
            raise DataError(
                f"{config.raw}: no caption in the training split at validation_fraction {config.validation_fraction}"
            )

    objects.write_bytes(_made_url(config.out), Made(inputs=inputs).to_json())
    model = train_tokenizer(counted(), config.vocab_size, config.out, spaces=config.spaces)
    made = Made(inputs=inputs, tokenizer=model.fingerprint, n_captions=n_captions)
    objects.write_bytes(_made_url(config.out), made.to_json())
    return made


def _captions(config: TokenizerConfig, shards: list[RawShard]) -> Iterator[str]:
    """The captions to train on: of a random choice of rows of each shard, those in the training split."""
    share = _share(config, shards)
    n_read = 0
    with progress(total=len(shards), what="read captions", unit="shard") as bar:
        for shard, rows in iterate_sample_rows(shards, ["caption", "group"]):
            # The number of chosen rows follows the number of rows over all shards, since a single shard may be small.
            n_chosen = int((n_read + len(rows)) * share) - int(n_read * share)
            n_read += len(rows)
            for row in rows.take(_choice(shard.name, len(rows), n_chosen)).to_pylist():
                if split_of(row["group"], config.validation_fraction) == "train":
                    yield row["caption"]
            bar.update(1)


def _share(config: TokenizerConfig, shards: list[RawShard]) -> float:
    # Tars without a manifest do not tell their number of samples. They are read anyway, so all of their captions are used.
    if any(shard.n_samples is None for shard in shards):
        return 1.0
    return min(1.0, config.max_captions / max(1, sum(shard.n_samples or 0 for shard in shards)))


def _choice(shard: str, n: int, n_chosen: int) -> np.ndarray:
    """`n_chosen` of the numbers below `n`, in ascending order: a function of the shard's name."""
    seed = hash_to_integer(f"tokenizer:{shard}")
    # numpy guarantees stable raw bits of a seeded generator across versions, but not a stable choice().
    return np.sort(np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")[:n_chosen])


def _inputs(config: TokenizerConfig, shards: list[RawShard]) -> str:
    listing = [[shard.name, shard.bytes, shard.checksum] for shard in shards]
    settings: dict[str, float] = {"vocab_size": config.vocab_size, "validation_fraction": config.validation_fraction}
    if _share(config, shards) < 1:
        settings["max_captions"] = config.max_captions
    if not config.spaces:
        settings["spaces"] = False
    return fingerprint({"shards": listing, **settings})


def _already_made(out: str, inputs: str) -> Made | None:
    """Returns None if the tokenizer is to be trained. Raises DataError if that would replace another file or model."""
    if not objects.exists(out):
        return None
    url = _made_url(out)
    try:
        made = parse(Made, objects.read_bytes(url), url)
    except (FileNotFoundError, DataError):
        made = None
    if made is None or made.inputs != inputs:
        raise _other(out)
    try:
        found = CaptionTokenizer(out).fingerprint
    except DataError as error:
        log.warning("%s; it is trained again", error)
        return None
    if made.tokenizer not in (None, found):
        raise _other(out)
    return None if made.tokenizer is None else made


def _other(out: str) -> DataError:
    return DataError(
        f"{out}: exists, but was not trained on these captions with these settings; choose another `tokenizer.out`, or remove "
        "this file to train it again"
    )


def _made_url(out: str) -> str:
    return f"{out}.json"
