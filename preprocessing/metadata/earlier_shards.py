"""Metadata of raw shards that an earlier version made without it: each tar is read once."""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dalle_ds.data.images import ImageProblem, decode_image
from dalle_ds.data.manifest import RawShardManifest, manifest_url
from dalle_ds.data.raw.metadata import write_metadata
from dalle_ds.data.raw.shards import Dropped, fetched, read_reasons, samples_in, shard_of
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from dalle_ds.storage.scratch import scratch_folder
from preprocessing.filters.language import language_of
from preprocessing.metadata.rows import Rows


@dataclass(frozen=True)
class MetadataJob:
    """One worker's task. `out` is the root of the raw shards."""

    out: str

    def start(self, n_threads: int) -> Callable[[RawShardManifest], RawShardManifest]:
        return lambda manifest: add_metadata(self.out, manifest)


def add_metadata(root: str, manifest: RawShardManifest) -> RawShardManifest:
    """Write the metadata of a finished shard, then replace its manifest by one that names it.

    Of several writers, each writes the same bytes, so they need no order. After a kill between the two writes, the next call
    does both again.

    Raises:
        DataError: the tar or its list of dropped inputs is missing or damaged, or an image cannot be decoded.
    """
    with scratch_folder() as folder:
        file, path = folder / "metadata.parquet", f"metadata/{manifest.shard}-{manifest.attempt}.parquet"
        metadata = write_metadata(_rows(root, manifest).columns, file, path)
        objects.put_file(file, objects.join(root, path))
    complete = manifest.model_copy(update={"metadata": metadata})
    objects.write_bytes(manifest_url(root, manifest.shard), complete.to_json())
    return complete


def _rows(root: str, manifest: RawShardManifest) -> Rows:
    # The place of each dropped input among the samples is not known any more: they come last.
    shard, rows = shard_of(root, manifest), Rows()
    with fetched(shard) as file:  # one download for both passes
        offsets = _offsets(file)
        for sample in samples_in(shard, file):
            if isinstance(sample, Dropped):
                raise DataError(f"{shard.url}: sample {sample.key} is damaged: {sample.reason}")
            try:
                image = decode_image(sample.image)  # its limit on pixels is the largest that `ingest.filters` accepts
            except ImageProblem as problem:
                raise DataError(f"{shard.url}: sample {sample.key} is {problem.reason}") from None
            rows.keep(sample, image, language_of(sample.caption), offsets[f"{sample.key}.{sample.extension}"])
    if manifest.dropped_path:
        remedy = f"remove {manifest_url(root, manifest.shard)}, and ingest makes the shard again"
        for record in read_reasons(objects.join(root, manifest.dropped_path), "list of dropped inputs", remedy):
            rows.drop(record["key"], record["reason"])
    return rows


def _offsets(file: Path) -> dict[str, int]:
    with tarfile.open(file, "r:") as tar:
        return {member.name: member.offset_data for member in tar}
