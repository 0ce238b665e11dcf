"""Metrics and log lines of updates."""

import logging
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.engine import UpdateReport
from dalle_ds.parallel.ranks import ALONE
from dalle_ds.recipes import load_recipe
from dalle_ds.training.prior import metrics
from dalle_ds.training.prior.config import PriorRunConfig
from dalle_ds.training.prior.metrics import PriorMetrics
from dalle_ds.training.prior.state import TrainState

RECIPE = Path(__file__).resolve().parents[3] / "launchers" / "recipes" / "tiny.yaml"


QUIET: dict[str, Any] = {
    "took_step": True,
    "grad_norm": 1.0,
    "nonfinite_blocks": (),
    "loss_scale": None,
    "stop_requested": False,
    "saves_under_way": 0,
}


def metrics_at(update: int, tracker: SimpleNamespace, scaler: SimpleNamespace | None = None) -> PriorMetrics:
    engine = SimpleNamespace(
        ranks=ALONE, scaler=scaler, phases=SimpleNamespace(take=dict), optimizer_bytes_per_parameter=lambda: 8.0
    )
    stream = SimpleNamespace(wait_seconds=0.0, updates_per_epoch=5, n_truncated=0, n_drawn=[40])
    return PriorMetrics(
        load_recipe(PriorRunConfig, RECIPE), PriorConfig(n_layers=2), engine, stream, TrainState(update=update), tracker
    )


def test_a_long_runs_scales_take_no_more_memory_than_a_chart_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHART_POINTS", 10)
    charts: list[Sequence[int]] = []
    monkeypatch.setattr(metrics, "gradient_scales", lambda updates, lines: charts.append(updates))
    scaler = SimpleNamespace(names=["b"], scale=torch.ones(1), at_limits=dict, log2_scales=lambda: {"b": 0.0})
    tracker = SimpleNamespace(tags=lambda _: None, metrics=lambda *_: None, image=lambda *_: None)
    report = metrics_at(0, tracker, scaler)
    for update in range(10, 2001, 10):  # the updates whose metrics are logged
        report._state.update = update
        report.log(UpdateReport(text_loss=2.0, image_loss=3.0, **QUIET), lr=0.1)
        assert len(report._scale_history) <= 10
    report.log_validation(1.0, 1.0, torch.zeros(1, 1024))
    (updates,) = charts
    assert len(updates) >= 5 and updates[-1] > 1600
    assert len({b - a for a, b in pairwise(updates)}) == 1 and updates[0] == updates[1] - updates[0]


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ({}, None),
        ({"took_step": False, "nonfinite_blocks": ("layers.0.mlp",)}, "update 10 skipped: .*in layers.0.mlp"),
        ({"nonfinite_blocks": ("layers.0.mlp",)}, "update 10 skipped some blocks: .*in layers.0.mlp"),
        ({"took_step": False, "loss_scale": 65536.0}, r"update 10 skipped: non-finite gradient at loss scale 2\^16"),
        ({"loss_scale": 65536.0}, None),
        ({"took_step": False, "grad_norm": float("inf")}, "update 10 skipped: gradient norm inf, but .* blocks are finite"),
    ],
)
def test_warnings_and_metrics_of_an_update(event: dict[str, Any], told: str | None, caplog: pytest.LogCaptureFixture) -> None:
    seen: dict[str, float] = {}
    report = metrics_at(10, SimpleNamespace(tags=lambda _: None, metrics=lambda values, update: seen.update(values)))
    with caplog.at_level(logging.WARNING):
        report.log(UpdateReport(text_loss=2.0, image_loss=3.0, **{**QUIET, **event}), lr=0.1)
    messages = [record.getMessage() for record in caplog.records]
    if told is None:
        assert not messages
    else:
        assert len(messages) == 1
        assert re.search(told, messages[0]), messages
    assert seen["loss/train/total"] == 2.0 / 8 + 3.0 * 7 / 8
    assert seen.get("optimizer/loss_scale") == event.get("loss_scale")
