"""Metrics and log lines of updates."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
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


def metrics_at(update: int, tracker: SimpleNamespace, scaler: SimpleNamespace | None = None, *overrides: str) -> PriorMetrics:
    engine = SimpleNamespace(
        ranks=ALONE, scaler=scaler, phases=SimpleNamespace(take=dict), optimizer_bytes_per_parameter=lambda: 8.0
    )
    stream = SimpleNamespace(wait_seconds=0.0, updates_per_epoch=5, n_truncated=0, n_drawn=[40])
    return PriorMetrics(
        load_recipe(PriorRunConfig, RECIPE, ["tracking.every=10", *overrides]),
        PriorConfig(n_layers=2),
        engine,
        stream,
        TrainState(update=update),
        tracker,
    )


def test_scales_of_a_long_run_are_told_no_more_often_than_a_chart_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    charts: list[tuple[Sequence[int], Mapping[str, Sequence[float]]]] = []
    monkeypatch.setattr(metrics, "gradient_scales", lambda updates, lines: charts.append((updates, lines)))
    names = [f"layers.{i // 2}.{'attention' if i % 2 else 'mlp'}" for i in range(128)]
    n_reads = 0

    def powers() -> dict[str, float]:  # waits for the device
        nonlocal n_reads
        n_reads += 1
        return dict.fromkeys(names, 13.0)

    sent: list[dict[str, float]] = []
    made: list[Callable[[], None]] = []
    scaler = SimpleNamespace(names=names, at_limits=lambda _: {}, log2_scales=powers)
    tracker = SimpleNamespace(
        tags=lambda _: None, metrics=lambda values, _: sent.append(values), image=lambda _, make, __: made.append(make)
    )
    report = metrics_at(0, tracker, scaler, "updates=430000")
    monkeypatch.setattr(report, "bar", SimpleNamespace(update=lambda _: None, set_postfix_str=lambda *_, **__: None))
    for update in range(10, 430_001, 10):
        report._state.update = update
        report.log(UpdateReport(text_loss=2.0, image_loss=3.0, **QUIET), lr=0.1)
    assert n_reads == len(sent) == 43_000
    of_blocks = [values for values in sent if f"gradient_scale_log2/{names[0]}" in values]
    assert 400 < len(of_blocks) == len(report._scale_history) <= 500
    assert all("optimizer/lowest_gradient_scale_log2" in values for values in sent)
    report.log_validation(1.0, 1.0, torch.zeros(1, 1024))
    assert not charts and len(made) == 2, "the tracker draws"
    made[1]()
    ((updates, lines),) = charts
    assert len(updates) == len(of_blocks) and updates[-1] > 429_000 and len({b - a for a, b in pairwise(updates)}) == 1
    assert list(lines) == names and set(lines[names[0]]) == {2.0**13}


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
