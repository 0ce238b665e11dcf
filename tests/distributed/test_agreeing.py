"""If one rank fails in what all do together, all ranks raise its error, and none waits for the others."""

import json
from pathlib import Path
from typing import Any

import pytest

from dalle_ds.data.raw.shards import list_raw_shards
from dalle_ds.storage.hashing import sha256_of_bytes
from dalle_ds.training.dvae.data import validation_images
from tests.distributed.cases.agreeing import AWAY
from tests.sampling.exports import make_export
from tests.support import launching
from tests.training.dvae.runs import dvae_run, make_raw

pytestmark = pytest.mark.launch

CASES = Path(__file__).parent / "cases" / "agreeing.py"
N_RANKS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreeing")
    for name in ("finished/samples.json", "begun/.parts/request.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{")
    make_raw(folder / "raw")
    export = make_export(folder)
    launching.run_ranks(N_RANKS, CASES, str(folder), str(folder / "raw"), str(export), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def outcome(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(N_RANKS)]


@pytest.mark.parametrize(
    ("case", "before"), [("each", ""), ("save", "the checkpoint of update 1 could not be written to {}: "), ("validation", "")]
)
def test_an_unreachable_store_is_a_temporary_failure_on_all_ranks(
    outcome: list[dict[str, Any]], folder: Path, case: str, before: str
) -> None:
    expected = ["StoreUnreachable", f"{before.format(folder / 'checkpoints')}rank 1: {AWAY}", 75]
    assert [told[case] for told in outcome] == [expected] * N_RANKS


@pytest.mark.parametrize(("case", "file"), [("finished", "samples.json"), ("begun", "request.json")])
def test_a_damaged_folder_of_samples_is_refused_by_all_ranks(outcome: list[dict[str, Any]], case: str, file: str) -> None:
    for told in outcome:
        kind, message, code = told[case]
        assert kind == "DataError" and f"{file} is damaged" in message and code == 2


def test_validation_images_are_those_of_one_rank_and_go_to_the_main_rank_only(
    outcome: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    raw = folder / "raw"
    alone = validation_images(dvae_run(raw, tmp_path), list_raw_shards(raw), tmp_path / "alone")
    for told in outcome:
        digest, n_bytes, received = told["images"]
        assert digest == sha256_of_bytes(alone.numpy().tobytes())
        assert received < 500 < n_bytes
