"""How small a folder of one's own pictures may be for the demo, and settings that fit its size.

`python -m preprocessing.stages.own_pictures count RECIPE [KEY=VALUE of ingest]` refuses a folder that is too small;
`... fit RECIPE RAW` prints a validation fraction and a batch of CLIP for its raw shards.
"""

import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from dalle_ds.console import print_error, setup_logging
from dalle_ds.data.raw.index import load_raw_manifests
from dalle_ds.data.raw.metadata import iterate_sample_rows
from dalle_ds.data.raw.shards import list_raw_shards, split_draw, split_of
from dalle_ds.errors import DataError, UserError
from dalle_ds.recipe_yaml import read_yaml
from dalle_ds.recipes import load_recipe
from preprocessing.configs import IngestConfig, TokenizerConfig
from preprocessing.readers.folder import read_folder
from preprocessing.readers.inputs import list_parts
from preprocessing.readers.listing import list_input
from preprocessing.stages.ingest import plan_entries

MIN_PICTURES: Final = 24  # 6 for the validation split, and 18 to train on: a batch of the prior has 16
N_VALIDATION: Final = 8  # the captions that the demo draws


def require_enough(config: IngestConfig) -> None:
    """Count the pictures whose captions pass the filters. Tars and parquet files are counted after ingest.

    Raises:
        DataError: there are fewer than MIN_PICTURES, or there are none.
    """
    listing = list_input(config.images, follow_links=config.follow_links)
    if list_parts(listing, config.columns):
        return
    entries = plan_entries(read_folder(listing), config.filters)
    left_out = Counter(entry.reason for entry in entries if entry.reason)
    _check(config.images, {entry.group for entry in entries if not entry.reason}, left_out)


def fraction_for(groups: Collection[str], fraction: float) -> float:
    """Returns `fraction` if it holds out enough of the groups, else one that does: 8, or a quarter of them if that is less."""
    draws = sorted(map(split_draw, groups))
    wanted = min(N_VALIDATION, len(draws) // 4)
    if sum(draw < fraction for draw in draws) >= wanted:
        return fraction
    return round((draws[wanted - 1] + draws[wanted]) / 2, 6)


def fit(raw: str, fraction: float, clip_batch: int) -> tuple[float, int]:
    """`fraction_for` the samples of raw shards, and `clip_batch` or, if that is less, the number of groups to train on: CLIP's
    batches have no two images of one group.

    Raises:
        DataError: there are fewer groups than MIN_PICTURES.
    """
    groups = {group for _, rows in iterate_sample_rows(list_raw_shards(raw), ["group"]) for group in rows["group"].to_pylist()}
    left_out: Counter[str] = Counter()
    for manifest in load_raw_manifests(raw):
        left_out.update(manifest.dropped)
    _check(raw, groups, left_out)
    fraction = fraction_for(groups, fraction)
    return fraction, min(clip_batch, sum(split_of(group, fraction) == "train" for group in groups))


def _check(where: str, groups: set[str], left_out: Counter[str]) -> None:
    if len(groups) < MIN_PICTURES:
        told = f"; left out: {dict(sorted(left_out.items()))}" if left_out else ""
        raise DataError(
            f"{where}: {len(groups)} usable pictures with captions (those of one group count once), expected at least "
            f"{MIN_PICTURES}{told}"
        )


def main(arguments: Sequence[str]) -> None:
    setup_logging()
    try:
        match arguments:
            case ["count", recipe, *settings]:
                require_enough(load_recipe(IngestConfig, recipe, settings))
            case ["fit", recipe, raw]:
                clip_batch = read_yaml(Path(recipe))["clip"]["global_batch"]
                print(*fit(raw, load_recipe(TokenizerConfig, recipe).validation_fraction, clip_batch))
            case _:
                raise UserError(f"{' '.join(arguments)}: expected count RECIPE or fit RECIPE RAW")
    except UserError as error:
        print_error(f"error: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
