"""The codebook starts from clusters, resumes exactly, and a collapse that begins is answered and counted."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.ops.relaxation import kl_to_uniform
from dalle_ds.tracking.tracker import NullTracker
from dalle_ds.training import run as training_run
from dalle_ds.training.dvae.codebook_start import continuous_pass, prepare, start_codebook, vectors_of
from dalle_ds.training.dvae.codebook_watch import CodebookWatch, CollapseConfig
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.dvae.trainer import DVAETrainer, train_dvae
from tests.training.dvae.runs import dvae_run, make_raw

CONFIG = DVAEConfig(image_size=16, n_groups=2, n_blk_per_group=1, n_hid=16, n_init=8, n_codes=40)
START = {"updates": 6, "cells": 600}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture
def no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run.Tracker, "start", classmethod(lambda *_a, **_k: NullTracker()))


def images_and_model(seed: int = 0) -> tuple[Tensor, DVAE]:
    torch.manual_seed(seed)
    model = DVAE(CONFIG)
    prepare(model)
    return torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8), model


@torch.no_grad()
def test_codes_are_the_nearest_centres_and_decode_to_them() -> None:
    images_BCHW, model = images_and_model()
    vectors_BIhw = vectors_of(model, images_BCHW)[1]
    vectors_NI = vectors_BIhw.permute(0, 2, 3, 1).flatten(0, 2)
    start_codebook(model, vectors_NI, nats=2.0, seed=0)
    centres_KI = model.decoder.blocks.input.w[:, :, 0, 0].t()
    nearest_N = torch.cdist(vectors_NI, centres_KI).argmin(1)
    codes_BN = model.tokens(images_BCHW)
    assert (codes_BN.flatten() == nearest_N).float().mean() > 0.999
    assert len(codes_BN.unique()) == CONFIG.n_codes, "all codes are in use"
    kl = kl_to_uniform(model.encode_logits(model.map_images(images_BCHW))).mean().item()
    assert kl == pytest.approx(2.0, abs=0.02)
    decoded = model.decoder.from_codes(codes_BN.unflatten(1, (8, 8)))
    quantised_BIhw = centres_KI[nearest_N].view(24, 8, 8, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(decoded, model.decoder.from_vectors(quantised_BIhw), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fewer_distinct_cells_than_codes_start_a_codebook() -> None:
    _, model = images_and_model()
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    vectors_NI = vectors_of(model, white)[1].permute(0, 2, 3, 1).flatten(0, 2)[:3]
    start_codebook(model, vectors_NI, nats=1.0, seed=0)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model.encode_logits(model.map_images(white))).all()


def test_noise_is_relative_and_seeded() -> None:
    images_BCHW, model = images_and_model()
    with torch.no_grad():
        quiet, loud = (continuous_pass(model, images_BCHW, noise, torch.Generator().manual_seed(1))[1] for noise in (0.0, 0.5))
        again = continuous_pass(model, images_BCHW, 0.5, torch.Generator().manual_seed(1))[1]
    assert torch.equal(loud, again) and not torch.equal(loud, quiet)


def test_the_start_beats_random_values_in_equally_many_updates(raw: Path, tmp_path: Path, no_tracker: None) -> None:
    reports = {
        name: train_dvae(dvae_run(raw, tmp_path / name, updates=200, codebook_start=start))
        for name, start in {"random": {"updates": 0}, "clusters": {"updates": 100, "cells": 1000}}.items()
    }
    assert reports["clusters"]["codes_used"] >= 26 > reports["random"]["codes_used"] + 6
    assert reports["clusters"]["psnr"] > reports["random"]["psnr"] + 2


def _losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    taken: list[tuple[int, float]] = []
    step = DVAETrainer._step

    def recording(self: DVAETrainer, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        metrics, stop_requested = step(self, stop_requested)
        taken.append((self.update, float(metrics["loss/train/total"])))
        return metrics, stop_requested

    monkeypatch.setattr(DVAETrainer, "_step", recording)
    return taken


@pytest.mark.parametrize("killed_at", [4, 6, 9])  # without codes; between; with codes
def test_a_killed_run_goes_on_with_the_same_losses(
    raw: Path, tmp_path: Path, no_tracker: None, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    losses = _losses(monkeypatch)
    settings = {"codebook_start": START, "checkpoint": {"every": 3}}
    whole = train_dvae(dvae_run(raw, tmp_path / "whole", **settings))
    expected = losses.copy()
    losses.clear()
    step = DVAETrainer._step

    def kill(self: DVAETrainer, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        if self.update == killed_at:
            raise KeyboardInterrupt
        return step(self, stop_requested)

    with monkeypatch.context() as patch:
        patch.setattr(DVAETrainer, "_step", kill)
        with pytest.raises(KeyboardInterrupt):
            train_dvae(dvae_run(raw, tmp_path / "killed", **settings))
    losses.clear()
    again = train_dvae(dvae_run(raw, tmp_path / "killed", **settings))
    assert losses == expected[killed_at // 3 * 3 :]
    assert again["dvae"] == whole["dvae"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"codebook_start": {"updates": 12}}, "codebook_start.updates is 12, expected fewer than the run's updates 12"),
        ({"codebook_start": {"updates": 4, "nats": 4.0}}, "nats is 4.0, expected below ln n_codes = 3.47"),
        ({"codebook_start": {"updates": 4}, "model": {**CONFIG.model_dump(), "n_codes": 31}}, "n_codes is 31, .* = 32"),
    ],
)
def test_what_cannot_start_from_clusters_is_refused(raw: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    settings = {**dvae_run(raw, tmp_path / "run").model_dump(), **changes}
    with pytest.raises(ValidationError, match=told):
        DVAERunConfig(**settings)


# ---- the watch -------------------------------------------------------------------------------------------------------------


def counts(n_used: int, n_codes: int = 100) -> np.ndarray:
    return np.where(np.arange(n_codes) < n_used, 10, 0)


def test_a_fall_is_a_collapse_and_a_slow_decline_is_none(caplog: pytest.LogCaptureFixture) -> None:
    watch = CodebookWatch(CollapseConfig(), 100)
    assert [watch.look(counts(n), 50) for n in (60, 80, 70, 50, 41)] == ["good", "good", "good", "falling", "falling"]
    assert watch.look(counts(39), 300) == "collapsing"
    assert "update 300: the codebook is collapsing: perplexity 39 after 80 at its best, 39 of 100 codes in use" in caplog.text


def test_a_codebook_that_never_spread_is_a_collapse_at_the_second_look() -> None:
    watch = CodebookWatch(CollapseConfig(), 100)
    assert [watch.look(counts(3), update) for update in (50, 100)] == ["good", "collapsing"]


def test_returns_are_bounded_and_counted() -> None:
    watch = CodebookWatch(CollapseConfig(returns=2), 100)
    assert [watch.may_return() for _ in range(3)] == [True, True, False]
    assert (watch.n_returns, watch.learning_rate_factor, watch.usage_factor) == (2, 0.25, 4.0)
    other = CodebookWatch(CollapseConfig(returns=2), 100)
    other.load_state_dict(watch.state_dict())
    assert not other.may_return()
    assert not CodebookWatch(CollapseConfig(), 100).may_return(), "by default a collapse is only told"


def test_training_returns_from_a_collapse(
    raw: Path, tmp_path: Path, no_tracker: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = DVAETrainer._step
    rates: list[float] = []

    def one_code_for_all_at_31(self: DVAETrainer, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        metrics, stop_requested = step(self, stop_requested)
        rates.append(metrics["optimizer/learning_rate"])
        if self.update == 31:
            self._weights()["encoder.blocks.output.conv.b"].data[3] = 1e4
        return metrics, stop_requested

    monkeypatch.setattr(DVAETrainer, "_step", one_code_for_all_at_31)
    settings = {"codebook_start": {"updates": 20, "cells": 1000}, "updates": 60, "collapse": {"every": 10, "returns": 1}}
    report = train_dvae(dvae_run(raw, tmp_path / "run", **settings))
    assert report["codes_used"] > 16
    assert report["codebook_returns"] == 1
    assert rates[40] == pytest.approx(rates[39] / 2, rel=0.02), "noticed at the look after it"
    assert caplog.text.count("training returns to the weights of its last good state (1 of at most 1 times)") == 1
    assert math.isfinite(report["psnr"])
