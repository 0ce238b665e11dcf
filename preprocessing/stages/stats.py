"""Stats: summarize a data set from its manifests, as numbers and as an HTML page."""

import logging
import time
from collections import Counter
from collections.abc import Callable

from dalle_ds.console import Outcome
from dalle_ds.data.images import ImageProblem
from dalle_ds.data.manifest import load_dataset_info
from dalle_ds.data.raw.index import load_raw_manifests
from dalle_ds.data.tokens.dataset_files import DatasetManifest, load_manifest
from dalle_ds.errors import DataError, UserError
from dalle_ds.storage import objects
from dalle_ds.storage.names import DATASET_FILE
from preprocessing.configs import StatsConfig
from preprocessing.encoding.encode_shard import code_usage
from preprocessing.stages.stats_page import Example, decoded_examples, page_of_raw, page_of_tokens, raw_examples

log = logging.getLogger(__name__)

PAGE = "stats.html"


def run(config: StatsConfig) -> Outcome:
    """Summarize the manifests and write the page.

    Raises:
        DataError: there is no data set, none of its shards is done, or `page` cannot be written.
    """
    started = time.monotonic()
    is_tokens = objects.exists(objects.join(config.root, DATASET_FILE))
    summary, page = _tokens(config) if is_tokens else _raw(config)
    return Outcome({**summary, "page": _write(page, config), "seconds": time.monotonic() - started})


def _write(page: str, config: StatsConfig) -> str | None:
    url = config.page or objects.join(config.root, PAGE)
    try:
        objects.write_bytes(url, page.encode())
    except OSError as error:
        if config.page is not None:
            raise DataError(f"the page cannot be written to {url}: {error}") from None
        # The numbers are the main result, so a failure to write the default page is only a warning.
        log.warning("no page was written: %s; set stats.page to another location", error)
        return None
    return url


def _tokens(config: StatsConfig) -> tuple[dict[str, object], str]:
    info, manifest = load_dataset_info(config.root), load_manifest(config.root)
    n_samples = sum(manifest.n_samples.values())
    summary = {
        "root": config.root,
        "kind": "tokens",
        "complete": manifest.complete,
        "shards": manifest.n_shards,
        "shards_missing": len(manifest.missing),
        "inputs": manifest.n_input,
        "samples": dict(manifest.n_samples),
        "dropped": manifest.dropped,
        "grid": info.grid,
        "crops": info.n_crops("train"),
        **code_usage(manifest.code_histogram),
        "caption_tokens": _lengths(manifest),
        **_projection(manifest.n_bytes, n_samples, manifest.seconds, config.project_to),
        "fingerprint": manifest.fingerprint,
    }
    return summary, page_of_tokens(summary, manifest, _examples(decoded_examples, config))


def _raw(config: StatsConfig) -> tuple[dict[str, object], str]:
    manifests = load_raw_manifests(config.root)
    if not manifests:
        raise DataError(f"{config.root}: neither a token data set nor finished raw shards")
    dropped: Counter[str] = Counter()
    for manifest in manifests:
        dropped.update(manifest.dropped)
    n_samples = sum(manifest.n_samples for manifest in manifests)
    summary = {
        "root": config.root,
        "kind": "raw",
        "shards": len(manifests),
        "inputs": sum(manifest.n_input for manifest in manifests),
        "samples": n_samples,
        "dropped": dict(sorted(dropped.items())),
        **_projection(
            sum(manifest.bytes for manifest in manifests),
            n_samples,
            sum(manifest.seconds for manifest in manifests),
            config.project_to,
        ),
        "fingerprint": manifests[0].fingerprint,
    }
    return summary, page_of_raw(summary, dropped, _examples(raw_examples, config))


def _examples(read: Callable[[str, int], list[Example]], config: StatsConfig) -> list[Example]:
    # They alone need the shards and the dVAE. The numbers come from the manifests.
    try:
        return read(config.root, config.images)
    except (UserError, OSError, ImageProblem) as error:
        log.warning("no images on the page: %s", error)
        return []


def _projection(n_bytes: int, n_samples: int, work_seconds: float, project_to: int) -> dict[str, object]:
    per_sample = n_bytes / max(1, n_samples)
    return {
        "bytes": n_bytes,
        "bytes_per_sample": per_sample,
        "projected_samples": project_to,
        "projected_gigabytes": per_sample * project_to / 1e9,
        "projected_worker_hours": work_seconds / max(1, n_samples) * project_to / 3600,
    }


def _lengths(manifest: DatasetManifest) -> dict[str, float]:
    # Quantiles of the number of BPE tokens per caption, over the training split.
    lengths = sorted(manifest.caption_lengths.items())
    total = sum(count for _, count in lengths)
    if not total:
        return {}
    told = {"mean": sum(length * count for length, count in lengths) / total}
    for name, share in (("median", 0.5), ("p95", 0.95), ("max", 1.0)):
        seen = 0
        for length, count in lengths:
            seen += count
            if seen >= share * total:
                told[name] = length
                break
    return told
