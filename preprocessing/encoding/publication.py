"""Publish the finished shards of an encode run, with the names of the others. Of several machines, one does it for all."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

from dalle_ds.data.manifest import DatasetInfo, InputIdentity, done_shards
from dalle_ds.data.raw.shards import LISTED_REASONS, RawShard
from dalle_ds.data.tokens.dataset_files import DatasetManifest, load_current, merge, merge_stored, publish
from dalle_ds.data.tokens.index import TokenIndex
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint
from preprocessing.encoding.mask import mask_index

log = logging.getLogger(__name__)

PUBLISHING = "status/publishing"
POLL_SECONDS = 10.0  # between looks at what another machine publishes
MAX_WAIT_SECONDS = 1800.0  # for another machine: then it has died


def publish_shards(
    out: str, info: DatasetInfo, shards: Sequence[RawShard], machine: int = 0, machines: int = 1
) -> DatasetManifest:
    """Publish what is finished, so that training can begin. Returns the manifest.

    All machines come here at about the same time. To publish takes two GETs a shard, and to find it published takes two.

    Args:
        shards: the raw shards.

    Raises:
        DataError: a finished shard was made from another raw shard than that of its name.
    """
    raw, waited = {shard.name: shard for shard in shards}, 0.0
    while True:
        done = done_shards(out)
        if (current := _current(out, info, raw, done)) is not None:
            _forget_claims(out)
            return current
        if not done:
            return merge(info, [], sorted(raw))[0]
        with _claimed(out, done, machine, machines) as is_ours:
            # Again: the machine that had the claim before may have published just now.
            if is_ours and (current := _current(out, info, raw, done)) is not None:
                return current
            if is_ours or waited >= MAX_WAIT_SECONDS:
                merged, index = merge_stored(out, info, done, sorted(raw.keys() - done))
                require_same_inputs(out, raw, index.inputs())
                merged = publish(out, *_masked(out, info, raw, merged, index))
                # Another machine may have finished shards meanwhile, and have published before this one did.
                if done_shards(out) == done:
                    _forget_claims(out)
                    return merged
                continue
        if not waited:
            log.info("another machine publishes the %d finished shards of %s; waiting for it", len(done), out)
        time.sleep(POLL_SECONDS)
        waited += POLL_SECONDS


def require_same_inputs(out: str, raw: Mapping[str, RawShard], inputs: Iterable[tuple[str, InputIdentity]]) -> None:
    """Check finished shards, as (name, the raw shard that it was made from), against the raw shards of their names.

    Without this check, shards of another raw folder with the same names would count as done.

    Raises:
        DataError: a shard was made from another raw shard.
    """
    for name, made_of in inputs:
        shard = raw.get(name)
        if shard is not None and not _is_same_input(made_of, shard):
            raise DataError(
                f"{out}: shard {name} was made from {made_of.path} ({made_of.bytes} bytes, checksum "
                f"{made_of.checksum}), which is not {shard.url} ({shard.bytes} bytes, checksum {shard.checksum}); "
                "choose another `encode.out` for another raw set"
            )


def _is_same_input(made_of: InputIdentity, shard: RawShard) -> bool:
    if made_of.bytes != shard.bytes:
        return False
    if made_of.checksum is None or shard.checksum is None:
        return True
    # Only the tar counts: a drop list that has changed since becomes a mask. Earlier versions stored the list's hash after "+".
    return made_of.checksum.partition("+")[0] == shard.checksum.partition("+")[0]


def _current(out: str, info: DatasetInfo, raw: Mapping[str, RawShard], done: set[str]) -> DatasetManifest | None:
    """What is published, if it is of these shards and of their drop lists."""
    found = load_current(out, info)
    if found is None or found[0].missing != sorted(raw.keys() - done) or found[0].drop_lists != _lists(raw, done):
        return None
    require_same_inputs(out, raw, found[1].inputs())
    return found[0]


def _masked(
    out: str, info: DatasetInfo, raw: Mapping[str, RawShard], merged: DatasetManifest, index: TokenIndex
) -> tuple[DatasetManifest, TokenIndex]:
    """The manifest and the index with the mask that follows from the raw shards' drop lists."""
    finished = raw.keys() & set(index.names)
    # If a list named samples when they should have been encoded, shards without a list now may lack them.
    had_lists = bool(merged.dropped.keys() & set(LISTED_REASONS))
    names = [name for name in finished if had_lists or raw[name].drop_list]
    index, n_masked, n_absent = mask_index(index, out, raw, names, info.validation_fraction)
    figures = {"masked": n_masked, "no_longer_listed": n_absent, "drop_lists": _lists(raw, finished)}
    return merged.model_copy(update=figures), index


def _lists(raw: Mapping[str, RawShard], names: AbstractSet[str]) -> str | None:
    lists = {name: str(raw[name].checksum).partition("+")[2] for name in sorted(names & raw.keys()) if raw[name].drop_list}
    return fingerprint({"drop_lists": lists}) if lists else None


@contextmanager
def _claimed(out: str, done: set[str], machine: int, machines: int) -> Iterator[bool]:
    """Yields whether this machine may publish these shards. Its claim is deleted at the end; a killed machine leaves one, and
    has it again when it is restarted."""
    if machines == 1:
        yield True
        return
    url = objects.join(out, PUBLISHING, fingerprint({"shards": sorted(done)}))
    try:
        is_ours = objects.create_exclusive(url, f"machine {machine}\n".encode())
    except FileNotFoundError:  # another machine's, deleted before we could read whose it is
        is_ours = False
    try:
        yield is_ours
    finally:
        if is_ours:
            objects.delete(url)


def _forget_claims(out: str) -> None:
    """Delete all claims, also those of killed machines for fewer shards: nothing is left to publish.

    A claim saves work and decides nothing: a machine that loses its claim while it publishes does no harm.
    """
    for url in objects.list_files(objects.join(out, PUBLISHING)):
        objects.delete(url)
