"""When a run gives up, and which block counts as the first with non-finite values."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dalle_ds.cli import main
from dalle_ds.data.tokens.batches import TokenBatch
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.precision.resblock_scaling import ResblockScalingConfig
from dalle_ds.training.prior.config import PriorFailureConfig
from dalle_ds.training.prior.diagnosis import DivergenceMonitor, _files_of, _load_batch, _save_batch
from dalle_ds.training.prior.magnitudes import Block, Finding

NAMES = ("embed", "layers.0.attention", "layers.0.mlp", "heads")
LIMITS = PriorFailureConfig(nonfinite_losses=3, updates_without_step=5)


def report(loss: float = 1.0, took_step: bool = True, blocks: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(loss=loss, took_step=took_step, nonfinite_blocks=blocks)


def reasons(monitor: DivergenceMonitor, reports: list[Any]) -> list[str | None]:
    return [monitor.observe(each) for each in reports]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_not_finite_in_a_row(loss: float) -> None:
    bad, good = report(loss, took_step=False), report()
    assert not any(reasons(DivergenceMonitor(LIMITS), [bad, bad, good, bad, bad, good]))
    *before, last = reasons(DivergenceMonitor(LIMITS), [bad, bad, bad])
    assert not any(before) and last == "no finite loss in 3 consecutive updates (failure.nonfinite_losses)"


def test_updates_without_step_in_a_row() -> None:
    bad, good = report(took_step=False), report()
    assert not any(reasons(DivergenceMonitor(LIMITS), [bad] * 4 + [good] + [bad] * 4))
    *before, last = reasons(DivergenceMonitor(LIMITS), [bad] * 5)
    assert not any(before) and last == "no optimizer step in 5 consecutive updates (failure.updates_without_step)"


def test_a_block_that_is_left_out_again_and_again() -> None:
    a, both = report(blocks=("a",)), report(blocks=("a", "b"))
    assert not any(reasons(DivergenceMonitor(LIMITS), [a] * 4 + [report()] + [both] * 4))
    *before, last = reasons(DivergenceMonitor(LIMITS), [both, a, both, a, a])
    assert not any(before) and last == "no optimizer step of a in 5 consecutive updates (failure.updates_without_step)"


def test_the_default_lets_the_papers_policy_reach_its_floor() -> None:
    policy = ResblockScalingConfig()
    n_backoffs = (policy.initial_scale_power - policy.min_scale_power) / -math.log2(policy.backoff)
    assert PriorFailureConfig().updates_without_step == pytest.approx(n_backoffs * policy.backoff_window)


@pytest.mark.parametrize(
    ("forward", "gradient", "event"),
    [
        ((), (), "none"),
        (("layers.0.mlp", "heads"), NAMES, "layers.0.mlp, forward pass"),
        ((), ("layers.0.attention", "layers.0.mlp"), "layers.0.mlp, backward pass"),
    ],
)
def test_first_block_that_is_not_finite(forward: tuple[str, ...], gradient: tuple[str, ...], event: str) -> None:
    blocks = [Block(name, None) for name in NAMES]
    for block in blocks:
        block.forward.is_finite, block.gradient.is_finite = block.name not in forward, block.name not in gradient
    assert Finding(report(), blocks, []).event == event


def batch(first: int) -> TokenBatch:
    text_BT, image_BN = torch.arange(first, first + 2)[:, None].expand(2, 3), torch.arange(2 * 4).view(2, 4) + first
    names = {what: tuple(f"{what} {first + row}" for row in (0, 1)) for what in ("keys", "captions", "shards")}
    return TokenBatch(text_BT, image_BN, **names, n_truncated=0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_kept_batch_is_dealt_to_any_number_of_ranks(any_root: str, world_size: int) -> None:
    for rank in (0, 1):
        with _files_of(any_root) as folder:
            _save_batch([batch(4 * rank), batch(4 * rank + 2)], folder, Ranks(rank, 2, torch.device("cpu")))
    run = SimpleNamespace(global_batch=8, micro_batch=2)
    found = [
        each for rank in range(world_size) for each in _load_batch(any_root, run, Ranks(rank, world_size, torch.device("cpu")))
    ]
    assert [len(each) for each in found] == [2, 2, 2, 2]
    for each, expected in zip(found, [batch(0), batch(2), batch(4), batch(6)], strict=True):
        assert torch.equal(each.text_BT, expected.text_BT) and torch.equal(each.image_BN, expected.image_BN)
        assert (each.keys, each.captions, each.shards) == (expected.keys, expected.captions, expected.shards)
    run.global_batch = 16
    with pytest.raises(ConfigError, match="global_batch is 16, but .* has 8 samples"):
        _load_batch(any_root, run, Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("damage", ["none", "truncated", "no metadata", "other tensors", "fewer keys", "deep keys"])
def test_batches_that_are_damaged_are_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "batch").mkdir()
    file = tmp_path / "batch" / "rank-00000.safetensors"
    tensors = {"text": torch.zeros(2, 3, dtype=torch.int64), "image": torch.zeros(2, 4, dtype=torch.int64)}
    names = {"keys": '["a", "b"]', "captions": '["", ""]', "shards": '["s", "s"]'}
    match damage:
        case "truncated":
            save_file(tensors, file, names)
            file.write_bytes(file.read_bytes()[:-8])
        case "no metadata":
            save_file(tensors, file)
        case "other tensors":
            save_file({"text": tensors["text"]}, file, names)
        case "fewer keys":
            save_file(tensors, file, {**names, "keys": '["a"]'})
        case "deep keys":
            save_file(tensors, file, {**names, "keys": "[" * 100_000})
    with pytest.raises(DataError, match="is not the batch of a diagnosis|has no batch|expected equally many"):
        _load_batch(str(tmp_path), SimpleNamespace(global_batch=2, micro_batch=2), Ranks(0, 1, torch.device("cpu")))


def test_replay_of_a_folder_without_a_diagnosis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", str(tmp_path)])
    assert ended.value.code == 2
    assert f"{tmp_path} is not a diagnosis: it has no recipe.yaml" in capsys.readouterr().err
    assert not torch.distributed.is_initialized(), "the error is raised before the ranks join"
