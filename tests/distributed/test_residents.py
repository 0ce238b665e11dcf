"""Parameters that stay gathered, none, some or all: the same training to the last digit, on ranks that divide nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.cases.residents import THRESHOLDS
from tests.support import launching

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("residents")
    launching.run_ranks(3, Path(__file__).parent / "cases" / "residents.py", str(folder), cwd=folder)
    return json.loads((folder / "rank0.json").read_text())


def test_a_threshold_above_all_keeps_the_model_gathered_as_a_whole(outcome: dict[str, Any]) -> None:
    assert {name: case["are_all"] for name, case in outcome.items()} == {"none": False, "some": False, "all": True}


@pytest.mark.parametrize("threshold", [name for name in THRESHOLDS if name != "none"])
def test_what_stays_gathered_changes_nothing(outcome: dict[str, Any], threshold: str) -> None:
    found, expected = outcome[threshold], outcome["none"]
    assert found["n_skipped"] == expected["n_skipped"] == 1, "the update with an Inf"
    assert found["has_moved"]
    for what in ("reports", "evaluated", "weights"):
        assert found[what] == expected[what], what


def test_groups_of_parameters_need_no_collectives_of_their_own(outcome: dict[str, Any]) -> None:
    counts = dict(outcome["all"]["collectives"])
    assert counts.pop("alltoall_base_") >= 1, "the gradients, in buckets"
    assert counts == {"allreduce_": 3, "_allgather_base_": 1}, "token counts, agreement and norm; weights"


def test_whole_weights_are_not_rounded_to_the_fp16_of_what_is_gathered(outcome: dict[str, Any]) -> None:
    values = np.array(outcome["all"]["weights"]["layers.0.mlp.branch.expand.weight"], np.float32)
    assert (values != values.astype(np.float16).astype(np.float32)).mean() > 0.5
