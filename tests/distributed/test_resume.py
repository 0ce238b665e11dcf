"""A checkpoint of two ranks resumes on one, two and three ranks, and at another ZeRO stage."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases.resume import ACROSS_STAGES, CASES
from tests.support import launching

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    cases = Path(__file__).parent / "cases" / "resume.py"
    for actions, n_ranks in (("save+load+store+damage", 2), ("load", 1), ("load", 3)):
        launching.run_ranks(n_ranks, cases, actions, str(folder), cwd=folder)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*-?.json")}


@pytest.mark.parametrize("case", list(CASES))
def test_the_same_ranks_go_on_to_the_last_digit(outcome: dict[str, Any], case: str) -> None:
    found, expected = outcome["load-2"][f"{case} as {case}"], outcome["save-2"][case]
    assert json.dumps(found) == json.dumps(expected)  # compared as text: without ZeRO the norm is NaN, which equals nothing


@pytest.mark.parametrize("n_ranks", [1, 3])
@pytest.mark.parametrize("case", list(CASES))
def test_other_ranks_go_on_within_rounding(outcome: dict[str, Any], case: str, n_ranks: int) -> None:
    found, expected = outcome[f"load-{n_ranks}"][f"{case} as {case}"], outcome["save-2"][case]
    tolerance = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 2e-2}[case[-4:]]
    assert found["at_once"] == pytest.approx(expected["at_once"], rel=1e-6)
    assert found["scales"] == expected["scales"]
    for a, b in zip(found["updates"], expected["updates"], strict=True):
        assert a == pytest.approx(b, rel=tolerance, nan_ok=case == "zero0_fp32")
    assert found["averaged"] == pytest.approx(expected["averaged"], rel=1e-6)


@pytest.mark.parametrize(("source", "target"), list(ACROSS_STAGES.items()))
def test_another_zero_stage_takes_it(outcome: dict[str, Any], source: str, target: str) -> None:
    found, expected = outcome["load-2"][f"{source} as {target}"], outcome["save-2"][source]
    assert found["at_once"] == pytest.approx(expected["at_once"], rel=1e-3)
    for a, b in zip(found["updates"], expected["updates"], strict=True):
        assert a == pytest.approx(b, rel=2e-2)


def test_all_ranks_learn_what_one_of_them_finds(outcome: dict[str, Any]) -> None:
    found = outcome["store-2"]
    for case, text in {
        "full": "checkpoint of update 3 could not be written to .*: rank 1: OSError: .*No space left on device",
        "not shared": "cannot be written to .*own-.: rank 1: .* not on a file system that all ranks share",
        "not writable": "cannot be written to .*: rank 1: .*File exists",
        "writable": "no error",
    }.items():
        assert len(found[case]) == 2 and all(re.search(text, said) for said in found[case]), found[case]
    assert found["files"] == ["0.bin", "1.bin"]
    assert found["found"] == [["update_00000002", "update_00000001"]] * 2, "damage in a share of rank 1"


def test_damage_that_one_rank_sees_while_it_reads_gives_way_to_the_checkpoint_before(outcome: dict[str, Any]) -> None:
    found = outcome["damage-2"]
    assert found["tried"] == ["update_00000002", "update_00000001"] and found["note"] == 1
    assert found["found"] == found["expected"]
