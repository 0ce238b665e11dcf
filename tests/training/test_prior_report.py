"""What a run tells of its updates."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.engine import UpdateReport
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.recipes import load_recipe
from dalle_ds.training.prior_config import PriorRun
from dalle_ds.training.prior_report import RunReport
from dalle_ds.training.prior_state import TrainState

RECIPE = Path(__file__).resolve().parents[2] / "launchers" / "recipes" / "tiny.yaml"


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ({}, None),
        ({"took_step": False, "nonfinite_blocks": ("layers.0.mlp",)}, "update 10 skipped: .*in layers.0.mlp"),
        ({"nonfinite_blocks": ("layers.0.mlp",)}, "update 10 left out some blocks: .*in layers.0.mlp"),
        ({"took_step": False, "loss_scale": 65536.0}, r"update 10 skipped: non-finite gradient at loss scale 2\^16"),
        ({"loss_scale": 65536.0}, None),
        ({"took_step": False, "grad_norm": float("inf")}, "update 10 skipped: gradient norm inf, but every resblock is finite"),
    ],
)
def test_warnings_and_metrics_of_an_update(event: dict[str, Any], told: str | None, caplog: pytest.LogCaptureFixture) -> None:
    seen: dict[str, float] = {}
    engine = SimpleNamespace(ranks=Ranks(0, 1, torch.device("cpu")), scaler=None, phases=SimpleNamespace(take=dict))
    stream = SimpleNamespace(wait_seconds=0.0, steps_per_epoch=5, n_truncated=0, n_drawn=[40])
    tracker = SimpleNamespace(metrics=lambda values, update: seen.update(values))
    report = RunReport(load_recipe(PriorRun, RECIPE), PriorConfig(n_layers=2), engine, stream, TrainState(update=10), tracker)
    quiet = {"took_step": True, "grad_norm": 1.0, "nonfinite_blocks": (), "loss_scale": None, "stop_requested": False,
             "saves_under_way": 0}  # fmt: skip
    with caplog.at_level(logging.WARNING):
        report.updated(UpdateReport(text_loss=2.0, image_loss=3.0, **{**quiet, **event}), lr=0.1)
    messages = [record.getMessage() for record in caplog.records]
    if told is None:
        assert not messages
    else:
        assert len(messages) == 1
        assert re.search(told, messages[0]), messages
    assert seen["loss/train"] == 2.0 / 8 + 3.0 * 7 / 8
    assert seen.get("optimizer/loss_scale") == event.get("loss_scale")
