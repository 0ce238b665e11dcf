"""Status: show the progress of an ingest or encode, during or after a run, from its manifests and progress records."""

import time
from collections import Counter

from dalle_ds.console import Outcome
from dalle_ds.data.manifest import RawShardManifest, ShardManifest, load_shard_manifests
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.names import DATASET_FILE
from preprocessing.configs import StatusConfig
from preprocessing.executors.journal import load_failures, load_plan

RATE_SECONDS = 600  # the rate is averaged over this time before the last finished shard


def run(config: StatusConfig) -> Outcome:
    """Count finished, open and failed shards.

    Raises:
        DataError: no ingest or encode has started there.
    """
    is_tokens = objects.exists(objects.join(config.root, DATASET_FILE))
    plan = load_plan(config.root)
    manifests = load_shard_manifests(config.root, ShardManifest if is_tokens else RawShardManifest)
    if not manifests and plan is None:
        raise DataError(f"{config.root}: neither ingest nor encode has started here")
    n_shards = plan.n_shards if plan else None
    done = {manifest.shard for manifest in manifests}
    failures = [failure for failure in load_failures(config.root) if failure.shard not in done]
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
                "failed": len(failures),
                "open": None if n_left is None else n_left - len(failures),
            },
            "inputs": sum(manifest.n_input for manifest in manifests),
            "samples": sum(manifest.n_samples for manifest in manifests),
            "dropped": dict(sorted(dropped.items())),
            **_pace(manifests, n_left),
            "failed_shards": {failure.shard: failure.reason for failure in failures},
        }
    )


def _pace(manifests: list[ShardManifest] | list[RawShardManifest], n_left: int | None) -> dict[str, float | None]:
    # Over all machines: from the start of the earliest shard finished within RATE_SECONDS to the end of the last shard.
    finished = [(manifest.finished, manifest) for manifest in manifests if manifest.finished is not None]
    if not finished:
        return {"images_per_second": None, "eta_seconds": None, "last_shard_seconds_ago": None}
    last = max(at for at, _ in finished)
    recent = [(at, manifest) for at, manifest in finished if at > last - RATE_SECONDS]
    span = max(last - min(at - manifest.seconds for at, manifest in recent), 1e-3)
    return {
        "images_per_second": sum(manifest.n_input for _, manifest in recent) / span,
        "eta_seconds": None if n_left is None else n_left * span / len(recent),
        "last_shard_seconds_ago": time.time() - last,
    }
