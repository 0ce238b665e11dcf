"""The engine on two real ranks against one plain process. One launch serves all tests: it takes longer than they do."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import launching

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("engine")
    cases = Path(__file__).with_name("engine_cases.py")
    done = launching.run([*launching.deepspeed(2), str(cases), str(folder)], folder)
    assert done.returncode == 0, done.stderr[-4000:]
    names = ("rank0", "rank1", "plain", "plain_captions_dropped")
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def assert_close(found: list[list[float]], expected: list[list[float]], tolerance: float) -> None:
    for update, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a == pytest.approx(b, rel=tolerance), f"update {update}: (text loss, image loss, norm) {a}, expected {b}"


@pytest.mark.parametrize("case", ["fp32", "fp32_accumulated", "fp32_structured"])
def test_zero3_on_two_ranks_is_one_plain_process(outcome: dict[str, Any], case: str) -> None:
    assert_close(outcome["rank0"][case], outcome["plain"], 2e-5)


@pytest.mark.parametrize("case", ["fp16_scale_1", "fp16", "fp16_accumulated", "fp16_structured"])
def test_per_resblock_fp16_follows_fp32(outcome: dict[str, Any], case: str) -> None:
    assert_close(outcome["rank0"][case], outcome["plain"], 2e-3)


@pytest.mark.parametrize(("case", "tolerance"), [("fp32_captions_dropped", 2e-5), ("fp16_captions_dropped", 2e-3)])
def test_a_global_batch_may_have_few_captions_or_none(outcome: dict[str, Any], case: str, tolerance: float) -> None:
    found = outcome["rank0"][case]
    assert_close(found, outcome["plain_captions_dropped"], tolerance)
    text_loss, image_loss, norm = found[2]
    assert text_loss == 0.0 and image_loss > 1.0 and norm > 0.0, "no caption at all: the pictures alone are learned"


@pytest.mark.parametrize("case", ["bf16_zero3", "bf16_zero2", "bf16_structured"])
def test_bf16_is_one_knob_away(outcome: dict[str, Any], case: str) -> None:
    assert_close(outcome["rank0"][case], outcome["plain"], 5e-2)


def test_recomputation_changes_nothing(outcome: dict[str, Any]) -> None:
    assert outcome["rank0"]["fp16_recomputed"] == outcome["rank0"]["fp16"]


def test_ranks_report_the_same(outcome: dict[str, Any]) -> None:
    for case in ("fp32", "fp16", "inf", "checkpoint"):
        assert outcome["rank0"][case] == outcome["rank1"][case]


def test_inf_in_one_block_of_one_rank_lowers_that_scale_alone_and_skips_everywhere(outcome: dict[str, Any]) -> None:
    for rank in ("rank0", "rank1"):
        case = outcome[rank]["inf"]
        quiet, hit, after = case["updates"][1], case["updates"][2], case["updates"][3]
        assert quiet["took_step"] and quiet["moved"] and not quiet["blocks"]
        assert not hit["took_step"] and not hit["moved"] and hit["blocks"] == [case["name"]]
        steps = [b - a for a, b in zip(quiet["scales"], hit["scales"], strict=True)]
        assert steps[3] == pytest.approx(-0.5, abs=1e-4)
        assert [s for i, s in enumerate(steps) if i != 3] == pytest.approx([0.001] * 5, abs=1e-4)
        assert after["took_step"] and after["moved"] and not after["blocks"]


def test_resume_goes_on_to_the_last_digit(outcome: dict[str, Any]) -> None:
    case = outcome["rank0"]["checkpoint"]
    assert case["note"] == 7
    assert case["restored"]
    assert case["found"] == case["expected"]
    assert case["scales_end_equal"]


def test_averaged_weights_are_evaluated_and_taken_back(outcome: dict[str, Any]) -> None:
    case = outcome["rank0"]["averaging"]
    assert case["averaged"] == pytest.approx(case["expected"], rel=2e-5)
    assert case["averaged"] != case["before"]
    assert case["after"] == case["before"]


@pytest.mark.parametrize(("case", "tolerance"), [("low_bit", 5e-3), ("low_bit_offloaded", 5e-3), ("low_bit_bf16_zero2", 5e-2)])
def test_low_bit_moments_follow_fp32_ones_and_resume_to_the_last_digit(
    outcome: dict[str, Any], case: str, tolerance: float
) -> None:
    found = outcome["rank0"][case]
    assert found == outcome["rank1"][case]
    assert_close(found["losses"], outcome["plain"], tolerance)
    assert found["found"] == found["expected"]
    # 36,864 parameters in the layers' matrices, 6,696 others; a little more for padding
    assert found["bytes_before"] == 0
    assert found["bytes"] == found["bytes_after_load"] == pytest.approx((36_864 * 4 + 6_696 * 8) / 43_560, rel=0.01)


def test_low_bit_moments_are_at_work(outcome: dict[str, Any]) -> None:
    assert outcome["rank0"]["low_bit"]["losses"] != outcome["rank0"]["fp32"]
    # offloaded, DeepSpeed sums the norm in another order
    assert_close(outcome["rank0"]["low_bit_offloaded"]["losses"], outcome["rank0"]["low_bit"]["losses"], 1e-5)
