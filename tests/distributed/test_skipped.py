"""A skipped update between two and three replicas: gradients of its healthy matrices are sent with the next update."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import launching

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module", params=[2, 3])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("skipped")
    launching.run_ranks(request.param, Path(__file__).parent / "cases" / "skipped.py", str(folder), cwd=folder)
    return [json.loads((folder / f"{rank}-of-{request.param}.json").read_text()) for rank in range(request.param)]


def test_only_matrices_with_an_inf_are_left_out(outcome: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(of["sent_later"] for of in outcome):
        assert len(found["moved"]) == found["n"] - len(found["lost"]), "all others are added to the errors"
        assert not set(found["moved"]) & set(found["lost"])
        assert all(name.startswith(f"{found['block']}.") for name in found["lost"])
        assert bool(found["lost"]) == (rank == 1), "a rank whose own gradients are finite adds all of them"


def test_the_next_update_sends_both(outcome: list[dict[str, Any]]) -> None:
    assert all(of["sent_later"]["worst"] < 1e-4 for of in outcome)


def test_with_and_without_masters_the_errors_are_the_same(outcome: list[dict[str, Any]]) -> None:
    """But for the rounding of weights and gradients to 16 bits."""
    assert all(0 < of["both_ways"] < 0.05 for of in outcome)
