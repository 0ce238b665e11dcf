"""Numbers of ranks that don't divide the parameters: ZeRO's padding must not affect results. One launch per number of ranks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases.padding import HOWS, N_SAVED
from tests.support import launching

pytestmark = pytest.mark.launch

N_RANKS = (N_SAVED, 5)
CASES = Path(__file__).parent / "cases" / "padding.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("padding")


@pytest.fixture(scope="module")
def plain(folder: Path, outcome: dict[int, Any]) -> list[float]:
    """(text loss, image loss, norm) of the first update in one process."""
    return json.loads((folder / "plain.json").read_text())


@pytest.fixture(scope="module")
def outcome(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Results of all ranks, by number of ranks."""
    found = {}
    for n in N_RANKS:
        launching.run_ranks(n, CASES, str(folder), cwd=folder)
        found[n] = [json.loads((folder / f"{rank}-of-{n}.json").read_text()) for rank in range(n)]
        assert all(of_rank == found[n][0] for of_rank in found[n])
    return found


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("n", N_RANKS)
def test_updates_after_calibration_and_after_a_skipped_one_step(outcome: dict[int, Any], n: int, how: str) -> None:
    case = outcome[n][0]["veto"][how]
    assert case["took_step"] == [True, False, True, True]
    assert [math.isfinite(norm) and norm > 0 for norm in case["norms"]] == [True, False, True, True]


def test_only_the_first_rank_draws_weights_and_all_have_a_plain_models(outcome: dict[int, Any], plain: list[float]) -> None:
    for n in N_RANKS:
        found = outcome[n][0]["run"]
        first, *others = found["draws"]
        assert first > 20 and not any(others)
        assert found["before"][0] == pytest.approx(plain, rel=2e-3)


def test_what_3_ranks_saved_5_go_on_with(outcome: dict[int, Any]) -> None:
    """Compares weights, EMA and moments after an update that skipped one block."""
    saved, loaded = (outcome[n][0]["run"] for n in N_RANKS)
    for ours, theirs in zip(loaded["seen"], saved["seen"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert saved["seen"][0] != saved["seen"][1] != saved["at_first"][1]
    for ours, theirs in zip(loaded["after"], saved["after"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
