"""Streamed images of dVAE and CLIP: two ranks, killed, then three, read and learn what one process does."""

import json
from pathlib import Path
from typing import Any

import pytest

from dalle_ds.data.raw.shards import list_raw_shards
from tests.distributed.cases.streams import EVERY, UPDATES, clip_recipe, dvae_recipe, trained
from tests.support import launching
from tests.training.dvae.runs import make_raw

pytestmark = pytest.mark.launch

CASE = Path(__file__).parent / "cases" / "streams.py"
KILLED_AT = EVERY + 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """What one process saw, and what the ranks of both starts saw."""
    home = tmp_path_factory.mktemp("streams")
    make_raw(home / "raw", damaged=(), noise=80)
    n_bytes = sum(shard.bytes for shard in list_raw_shards(home / "raw"))
    for recipe in (dvae_recipe(home, "alone"), clip_recipe(home, "alone")):
        assert recipe.data.window_mb * 2**20 < n_bytes, "the data set is streamed"
    starts = []
    for n_ranks, until in ((2, KILLED_AT), (3, UPDATES)):
        launching.run_ranks(n_ranks, CASE, str(home), "parts", str(until), cwd=home)
        starts.append([json.loads((home / f"parts-{until}-{rank}.json").read_text()) for rank in range(n_ranks)])
    return trained(home, "alone"), starts


@pytest.mark.parametrize("stage", ["dvae", "clip"])
def test_two_ranks_and_then_three_do_what_one_does(runs: tuple[dict[str, Any], list[list[dict[str, Any]]]], stage: str) -> None:
    alone, starts = runs
    for of_ranks, first, end in zip(starts, (0, EVERY), (KILLED_AT, UPDATES), strict=True):
        assert all(len(rank[stage]) == end - first for rank in of_ranks), "the second start goes on from the checkpoint"
        for update in range(first, end):
            at, loss, images = alone[stage][update]
            found = [rank[stage][update - first] for rank in of_ranks]
            assert [one[0] for one in found] == [at] * len(of_ranks)
            assert [image for one in found for image in one[2]] == images, "the same images in the same places"
            assert [one[1] for one in found] == pytest.approx([loss] * len(of_ranks), rel=1e-4)
    assert len({image for *_, images in alone[stage] for image in images}) > 40
