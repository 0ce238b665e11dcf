"""Numbers of ranks that divide nothing: what ZeRO pads its shards with must never count. One launch for each number."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests import launching
from tests.distributed.padding_cases import HOWS

pytestmark = pytest.mark.launch

N_RANKS = (3, 5)
CASES = Path(__file__).with_name("padding_cases.py")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks: what each of them found."""
    folder = tmp_path_factory.mktemp("padding")
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
