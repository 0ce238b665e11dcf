"""The engine on two real ranks, compared with one plain process.
All tests share one launch, since launching takes longer than the tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases.engine import CAPTIONS_DROPPED, CHECKPOINTING, EMBEDDING_RATE, MODES, TRIALS
from tests.support import launching

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("engine")
    cases = Path(__file__).parent / "cases" / "engine.py"
    launching.run_ranks(2, cases, str(folder), cwd=folder)
    names = ("rank0", "rank1", "plain", "plain_captions_dropped", "plain_embedding_rate", "plain_calibration")
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def tolerance(mode: str) -> float:
    return next(tolerance for numbers, tolerance in (("fp32", 2e-5), ("fp16", 3e-3), ("bf16", 5e-2)) if numbers in mode)


def assert_close(found: list[list[float]], expected: list[list[float]], tolerance: float) -> None:
    for update, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a == pytest.approx(b, rel=tolerance), f"update {update}: (text loss, image loss, norm) {a}, expected {b}"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_on_two_ranks_is_one_plain_process(outcome: dict[str, Any], mode: str) -> None:
    found, expected = outcome["rank0"]["modes"][mode], outcome["plain"]
    if mode == "fp32_zero0":  # without ZeRO, DeepSpeed does not report the norm
        found, expected = ([update[:2] for update in updates] for updates in (found, expected))
    assert_close(found, expected, tolerance(mode))


@pytest.mark.parametrize("mode", CAPTIONS_DROPPED)
def test_a_global_batch_may_have_few_captions_or_none(outcome: dict[str, Any], mode: str) -> None:
    found = outcome["rank0"]["captions_dropped"][mode]
    # Without captions the images' gradients alone make the norm, so fp16's rounding of them does not average out.
    assert_close(found, outcome["plain_captions_dropped"], 1e-2 if mode == "fp16" else tolerance(mode))
    text_loss, image_loss, norm = found[2]
    assert text_loss == 0.0 and image_loss > 1.0 and norm > 0.0, "no caption at all: the images alone are learned"


@pytest.mark.parametrize("mode", EMBEDDING_RATE)
def test_embeddings_may_have_a_rate_of_their_own(outcome: dict[str, Any], mode: str) -> None:
    expected = outcome["plain_embedding_rate"]
    assert_close(outcome["rank0"]["embedding_rate"][mode], expected, tolerance(mode))
    assert expected[-1] != pytest.approx(outcome["plain"][-1], rel=1e-3), "the rate changed nothing"


def test_ranks_report_the_same(outcome: dict[str, Any]) -> None:
    for case in outcome["rank0"].keys() - {"averaging"}:  # only the main rank has the expected values of "averaging"
        assert outcome["rank0"][case] == outcome["rank1"][case], case


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_inf_in_one_block_of_one_rank_lowers_that_scale_alone_and_skips_everywhere(outcome: dict[str, Any], kind: str) -> None:
    case = outcome["rank0"]["inf"][kind]
    _, quiet, hit, after = case["updates"]
    assert quiet["took_step"] and quiet["moved"] and not quiet["nonfinite_blocks"]
    assert not hit["took_step"] and not hit["moved"] and hit["nonfinite_blocks"] == [case["name"]]
    steps = [b - a for a, b in zip(quiet["scales"], hit["scales"], strict=True)]
    assert steps[3] == pytest.approx(-0.5, abs=1e-4)
    assert [s for i, s in enumerate(steps) if i != 3] == pytest.approx([0.001] * 5, abs=1e-4)
    assert after["took_step"] and after["moved"] and not after["nonfinite_blocks"]
    assert case["runs"] == (4 if kind == "none" else 8), "the block runs again in the backward pass"
    assert case["updates"] == outcome["rank0"]["inf"]["none"]["updates"]


@pytest.mark.parametrize("case", ["skipped_block", "skipped_block_offload"])
def test_skip_can_be_that_block_alone(outcome: dict[str, Any], case: str) -> None:
    name, updates = outcome["rank0"][case]["name"], outcome["rank0"][case]["updates"]
    for number in (0, 2):
        hit = updates[number]
        assert hit["took_step"] and hit["nonfinite_blocks"] == hit["stayed"] == [name]
        assert 0 < hit["grad_norm"] < 2, "norm and clipping see the other blocks' gradients"
        assert hit["seen"] == hit["seen_anew"], "what ranks hold gathered is what they own"
    assert updates[2]["scales"][3] < updates[1]["scales"][3] + 0.002, "lowered at update 0, and within the window since"
    for number in (1, 4):
        assert updates[number]["took_step"] and not updates[number]["stayed"]
    elsewhere = updates[3]
    assert not elsewhere["took_step"] and elsewhere["all_stayed"] and not elsewhere["nonfinite_blocks"]


@pytest.mark.parametrize("case", ["calibration", "calibration_offload"])
def test_calibration_finds_scales_that_are_finite_and_leaves_nothing_else(outcome: dict[str, Any], case: str) -> None:
    found = outcome["rank0"][case]
    assert found["untouched"], "without trials scales stay as they were"
    assert found["calibrated"] == found["given"]
    assert all(report["took_step"] for report in found["calibrated"][:3])
    # sums over ranks round differently, so a trial near overflow may have another result
    assert found["found"] == pytest.approx(outcome["plain_calibration"], abs=50 / 2**TRIALS + 1e-3)
    assert min(found["found"]) > 18, "far above where the paper starts"


def test_resume_goes_on_to_the_last_digit(outcome: dict[str, Any]) -> None:
    case = outcome["rank0"]["checkpoint"]
    assert case["note"] == 7
    assert case["before"][1]["took_step"] and case["before"][1]["nonfinite_blocks"], "one block was skipped"
    for ours, theirs in (case["scales"], case["seen"], case["scales_at_end"], (case["found"], case["expected"])):
        assert ours == theirs
    assert len(set(case["scales"][0]["scale"].values())) > 2, "calibrated"
    assert case["parity"] < 1e-4


@pytest.mark.parametrize("case", ["checkpoint_global_zero3", "checkpoint_global_zero2"])
def test_global_fp16_lowers_its_scale_and_resumes(outcome: dict[str, Any], case: str) -> None:
    found = outcome["rank0"][case]
    told = [(report["took_step"], report["loss_scale"]) for report in found["before"]]
    assert told == [(False, 2.0**20), (False, 2.0**19), (True, 2.0**18)]
    assert found["seen"][0] == found["seen"][1]
    assert found["parity"] < 1e-4, "as fp16 weights, what was written gives the engine's losses"
    assert found["found"] == found["expected"]
    assert max(report["loss_scale"] for report in found["found"]) > 2.0**18, "it grows when the first engine's does"


def test_global_fp16_goes_on_at_its_least_scale(outcome: dict[str, Any]) -> None:
    assert outcome["rank0"]["least_scale"] == [[False, 2.0], [False, 1.0], [False, 1.0], [False, 1.0]]


def test_ema_weights_are_evaluated_and_taken_back(outcome: dict[str, Any]) -> None:
    case = outcome["rank0"]["averaging"]
    assert case["with_ema"] == pytest.approx(case["expected"], rel=2e-5)
    assert case["with_ema"] != case["before"]
    assert case["after"] == case["before"]


@pytest.mark.parametrize(("case", "within"), [("low_bit", 5e-3), ("low_bit_offloaded", 5e-3), ("low_bit_bf16_zero2", 5e-2)])
def test_low_bit_moments_follow_fp32_ones_and_resume_to_the_last_digit(
    outcome: dict[str, Any], case: str, within: float
) -> None:
    found = outcome["rank0"][case]
    assert_close(found["losses"], outcome["plain"], within)
    assert found["found"] == found["expected"]
    # 36,864 parameters in the layers' matrices, 6,696 others; padding adds a little
    assert found["bytes_before"] == 0
    assert found["bytes"] == found["bytes_after_load"] == pytest.approx((36_864 * 4 + 6_696 * 8) / 43_560, rel=0.01)


def test_low_bit_moments_are_at_work(outcome: dict[str, Any]) -> None:
    assert outcome["rank0"]["low_bit"]["losses"] != outcome["rank0"]["modes"]["fp32_zero3"]
    # with offloading, DeepSpeed sums the norm in another order
    assert_close(outcome["rank0"]["low_bit_offloaded"]["losses"], outcome["rank0"]["low_bit"]["losses"], 1e-5)
