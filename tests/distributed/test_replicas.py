"""Two replicas of two ranks equal one plain process; PowerSGD is compared with the plain average.
All tests share one launch."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_ds.errors import ConfigError
from dalle_ds.parallel.engine_config import EngineConfig
from dalle_ds.parallel.replicas.groups import PAPER_RATE, Replicas
from dalle_ds.training.prior.export import export_checkpoint
from tests.data.token_sets import make_token_set
from tests.distributed.test_engine import assert_close
from tests.distributed.test_train_prior import train
from tests.support import launching

N_RANKS = 4


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("replicas")
    cases = Path(__file__).parent / "cases" / "replicas.py"
    launching.run_ranks(N_RANKS, cases, str(folder), cwd=folder)
    names = ("plain", *(f"rank{rank}" for rank in range(N_RANKS)))
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


@pytest.mark.launch
def test_means_of_both_formats_on_the_wire(outcome: dict[str, Any]) -> None:
    found = [outcome[f"rank{rank}"]["wires"] for rank in range(N_RANKS)]
    assert [f["place"] for f in found] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert not any(f["has_tf32"] for f in found), "joining a job makes fp32 fp32; torch begins otherwise"
    for rank in range(N_RANKS):
        peer = (rank + 2) % 4
        mean = (torch.tensor(found[rank]["own"]) + torch.tensor(found[peer]["own"])) / 2
        torch.testing.assert_close(torch.tensor(found[rank]["means"]["fp32"]), mean)
        torch.testing.assert_close(torch.tensor(found[rank]["means"]["1-6-9"]), mean, rtol=2**-10, atol=4e-3)
        assert found[rank]["means"] == found[peer]["means"], "the same bits on both peers"
        assert found[rank]["huge"] == [-15.984375] * 3


@pytest.mark.launch
@pytest.mark.parametrize("case", ["none", "four_replicas", "full_rank"])
def test_replicas_are_one_plain_process(outcome: dict[str, Any], case: str) -> None:
    assert_close(outcome["rank0"][case]["updates"], outcome["plain"], 2e-5)


@pytest.mark.launch
def test_bf16_replicas_follow(outcome: dict[str, Any]) -> None:
    assert_close(outcome["rank0"]["bf16"]["updates"], outcome["plain"], 5e-2)


@pytest.mark.launch
def test_ranks_and_replicas_agree(outcome: dict[str, Any]) -> None:
    for case in ("none", "four_replicas", "full_rank", "bf16", "inf", "nan", "checkpoint"):
        for rank in range(1, N_RANKS):
            assert outcome[f"rank{rank}"][case] == outcome["rank0"][case], f"{case} on rank {rank}"
    for case in ("none", "four_replicas", "full_rank", "bf16"):
        assert outcome["rank0"][case]["differences"] == [[0.0]], "weights differ between replicas"
    assert outcome["rank0"]["full_rank"]["evaluated"][0] == pytest.approx(outcome["rank0"]["none"]["evaluated"][0], rel=2e-5)


@pytest.mark.launch
def test_power_sgd_learns_as_the_plain_average_does_with_a_fifth_of_the_bytes(outcome: dict[str, Any]) -> None:
    runs = {name: outcome["rank0"][f"run_{name}"] for name in ("none", "power_sgd")}
    first = runs["none"]["losses"][0]
    final = {name: sum(run["losses"][-20:]) / 20 for name, run in runs.items()}
    assert first > 0.97 * math.log(8) and final["none"] < 1.5, "something is learned"
    assert abs(final["power_sgd"] - final["none"]) < 0.1, final  # two weight seeds differ by 0.17

    plain, ours = runs["none"], runs["power_sgd"]
    matrices = ours["matrix_bytes"]
    assert plain["bytes_sent"] == plain["plain_bytes"] == matrices + ours["plain_bytes"]
    assert ours["bytes_sent"] == ours["power_sgd_bytes"] + ours["plain_bytes"]
    values = ours["power_sgd_bytes"] / 2  # 16-bit codes
    assert values <= PAPER_RATE * matrices / 4, "the paper's rate, counted in values as the paper does"
    assert ours["bytes_sent"] < 0.2 * plain["bytes_sent"], "all gradients, those that are not compressed included"
    for name in ("none", "power_sgd"):
        assert runs[name]["difference"] == 0.0, "weights differ between replicas"


@pytest.mark.launch
def test_inf_in_one_block_of_one_rank_skips_on_all_replicas_and_the_errors_keep_the_rest(outcome: dict[str, Any]) -> None:
    for rank in range(N_RANKS):
        quiet, hit, after = outcome[f"rank{rank}"]["inf"][1:]
        for update in (quiet, after):
            assert update["took_step"] and update["weights_moved"] and update["errors_moved"] and not update["blocks"]
        assert not hit["took_step"] and not hit["weights_moved"] and hit["errors_moved"]
        assert hit["blocks"] == [hit["name"]]
        steps = [b - a for a, b in zip(quiet["scales"], hit["scales"], strict=True)]
        assert steps == pytest.approx([0.001] * 3 + [-0.5] + [0.001] * 2, abs=1e-4)
        assert after["difference"] == 0.0


@pytest.mark.launch
def test_nan_that_no_block_sees_skips_on_all_replicas_and_the_errors_keep_the_matrices(outcome: dict[str, Any]) -> None:
    for rank in range(N_RANKS):
        before, hit, after = outcome[f"rank{rank}"]["nan"]
        for update in (before, after):
            assert update["took_step"] and update["errors_moved"]
        assert not hit["took_step"] and hit["errors_moved"]
        assert after["difference"] == 0.0


@pytest.mark.launch
def test_resume_goes_on_to_the_last_digit(outcome: dict[str, Any]) -> None:
    found = outcome["rank0"]["checkpoint"]
    assert found["note"] == 7
    assert found["found"] == found["expected"]
    assert found["without_errors"] != found["expected"], "the errors make a difference"
    assert found["saved"] == ["error.0", "error.1"]


@pytest.mark.launch
def test_mean_of_the_errors_is_all_that_matters(outcome: dict[str, Any]) -> None:
    found = outcome["rank0"]["checkpoint_mean"]
    assert_close(found["found"], found["expected"], 5e-5)
    with pytest.raises(AssertionError, match="update 0"):
        assert_close(found["without_errors"], found["expected"], 1e-3)
    assert found["saved"] == ["error.mean"]


@pytest.mark.launch
def test_recipe_trains_replicas_and_goes_on_with_more_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas of one rank, resumed as four replicas of one rank: weights of the first, errors of all, EMA and export."""
    make_token_set(tmp_path / "runs" / "demo" / "tokens", n_samples=96, n_validation=32)
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    sgd, few = "replicas.compression=power_sgd", ["ema.every=1", "validation.every=100"]
    first = train(tmp_path, env, "run", sgd, "replicas.count=2", "updates=3", *few)
    files = {path.name for path in Path(tmp_path, first["checkpoint"]).rglob("state-*")}
    assert len(files) == 2
    second = train(tmp_path, env, "run", sgd, "replicas.count=4", "updates=5", *few, n_ranks=4)
    assert (second["resumed_at"], second["updates"], second["skipped_updates"]) == (3, 5, 0)
    assert second["loss/validation/image"] < first["loss/validation/image"]
    monkeypatch.chdir(tmp_path)
    assert export_checkpoint("run", "export")["parity"]["max_difference_same_format"] < 1e-4


def test_replicas_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="replicas.count 3 does not divide the 4 ranks"):
        Replicas(3, 0, 4)
    with pytest.raises(ConfigError, match="need zero_optimization.stage 3, but the DeepSpeed JSON has 2"):
        EngineConfig({"zero_optimization": {"stage": 2}}, None).require_replicable()
    with pytest.raises(ConfigError, match="DeepSpeed's built-in fp16 scales them"):
        EngineConfig({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}, None).require_replicable()
