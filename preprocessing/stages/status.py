"""Status: show the progress of an ingest or encode, during or after a run.

Shards are counted in listings. Images are counted in the manifests of at most MAX_READ shards, so that the time, the requests
and the memory do not grow with the data set.
"""

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

from dalle_ds.console import Outcome
from dalle_ds.data.manifest import RawShardManifest, ShardManifest, iterate_shards, load_shard_manifest, shard_times, spread
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.names import DATASET_FILE
from preprocessing.configs import StatusConfig
from preprocessing.executors.journal import failed_shards, load_failure, load_plan

RATE_SECONDS = 600  # the rate is averaged over this time before the last finished shard
MAX_READ = 200  # manifests that are read; the images of more shards are estimated from these
MAX_REASONS = 100  # failed shards whose reasons are told

Manifests = Sequence[ShardManifest] | Sequence[RawShardManifest]


def run(config: StatusConfig) -> Outcome:
    """Count finished, open and failed shards.

    Raises:
        DataError: no ingest or encode has started there.
    """
    is_tokens = objects.exists(objects.join(config.root, DATASET_FILE))
    plan = load_plan(config.root)
    done = shard_times(config.root)
    if not done and plan is None:
        raise DataError(f"{config.root}: neither ingest nor encode has started here")
    read = partial(load_shard_manifest, config.root, ShardManifest if is_tokens else RawShardManifest)
    manifests: Manifests = list(iterate_shards(spread(sorted(done), MAX_READ), read))
    n_shards = plan.n_shards if plan else None
    failed = [shard for shard in failed_shards(config.root) if shard not in done]
    each = len(done) / max(1, len(manifests))  # shards that a read manifest stands for
    dropped: Counter[str] = Counter()
    for manifest in manifests:
        dropped.update(manifest.dropped)
    n_left = None if n_shards is None else n_shards - len(done)
    return Outcome(
        {
            "root": config.root,
            "kind": "tokens" if is_tokens else "raw",
            "shards": {
                "all": n_shards,
                "done": len(done),
                "failed": len(failed),
                "open": None if n_left is None else n_left - len(failed),
            },
            "inputs": round(each * sum(manifest.n_input for manifest in manifests)),
            "samples": round(each * sum(manifest.n_samples for manifest in manifests)),
            "dropped": {reason: round(each * count) for reason, count in sorted(dropped.items())},
            "estimated_from_shards": len(manifests) if len(manifests) < len(done) else None,
            **_pace(done, manifests, n_left),
            "failed_shards": _reasons(config.root, failed),
        }
    )


def _pace(done: dict[str, float], manifests: Manifests, n_left: int | None) -> dict[str, float | None]:
    # Over all machines: from the start of the earliest shard finished within RATE_SECONDS to the end of the last shard.
    if not done:
        return {"images_per_second": None, "eta_seconds": None, "last_shard_seconds_ago": None}
    last = max(done.values())
    recent = [written for written in done.values() if written > last - RATE_SECONDS]
    seconds = sum(manifest.seconds for manifest in manifests) / len(manifests)
    span = max(last - min(recent) + seconds, 1e-3)
    n_images = len(recent) * sum(manifest.n_input for manifest in manifests) / len(manifests)
    return {
        "images_per_second": n_images / span,
        "eta_seconds": None if n_left is None else n_left * span / len(recent),
        "last_shard_seconds_ago": time.time() - last,
    }


def _reasons(root: str, failed: Sequence[str]) -> dict[str, str]:
    read = iterate_shards(failed[:MAX_REASONS], partial(load_failure, root))
    told = {failure.shard: failure.reason for failure in read if failure is not None}
    return told | dict.fromkeys(failed[MAX_REASONS:], "see status/failed")
