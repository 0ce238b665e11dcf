"""Training of the dVAE: it learns, a resumed run has the same losses to the last digit, and wrong input is refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.data.images import decode_image
from dalle_ds.data.raw.shards import RawSample, RawShard, list_raw_shards, read_raw_shard
from dalle_ds.data.raw.streams import Cursors
from dalle_ds.errors import ConfigError, DataError, FingerprintMismatch, TrainingDiverged, UserError
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.optim.schedules import HalfCosineConfig
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.recipes import dump_recipe, load_recipe
from dalle_ds.storage.record import unseal
from dalle_ds.storage.weights import read_weights
from dalle_ds.tracking.tracker import NullTracker
from dalle_ds.training import run as training_run
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.dvae.data import ImageStream, reading_of, validation_images
from dalle_ds.training.dvae.trainer import DVAETrainer, train_dvae
from dalle_ds.training.image_run import raw_data
from tests.support.thread_ranks import run_ranks
from tests.training.dvae.runs import DAMAGED, KEYS, TOO_SMALL, TRAIN_KEYS, dvae_run, make_raw, trainer_of

RECIPES = Path(__file__).parents[3] / "launchers" / "recipes"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float, float]]:
    """(update, loss, gradient norm) of every step. Also disables MLflow, which takes seconds to start."""
    taken: list[tuple[int, float, float]] = []
    step = DVAETrainer._step

    def recording(self: DVAETrainer, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        metrics, stop_requested = step(self, stop_requested)
        taken.append((self.update, float(metrics["loss/train/total"]), float(metrics["optimizer/gradient_norm"])))
        return metrics, stop_requested

    monkeypatch.setattr(DVAETrainer, "_step", recording)
    monkeypatch.setattr(training_run.Tracker, "start", classmethod(lambda *_a, **_k: NullTracker()))
    return taken


class _StopAfter:
    """Replaces StopFlag: requests a stop during step number `update`."""

    reason = "test"

    def __init__(self, losses: list[tuple[int, float, float]], update: int) -> None:
        self.losses, self.update = losses, update

    @property
    def requested(self) -> bool:
        return len(self.losses) + 1 == self.update

    def request(self, reason: str) -> None:
        raise AssertionError(reason)

    def __enter__(self) -> "_StopAfter":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("changes", [{"precision": "fp32"}, {"precision": "bf16", "micro_batch": 4, "workers": 2}])
def test_stopped_and_resumed_gives_the_uninterrupted_losses(
    raw: Path, tmp_path: Path, losses: list[tuple[int, float, float]], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    train_dvae(dvae_run(raw, tmp_path / "whole", **changes))
    whole = losses.copy()
    assert [update for update, *_ in whole] == list(range(12))
    losses.clear()
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "StopFlag", lambda: _StopAfter(losses, 7))
        with pytest.raises(SystemExit) as left:
            train_dvae(dvae_run(raw, tmp_path / "parts", **changes))
    assert left.value.code == 143
    train_dvae(dvae_run(raw, tmp_path / "parts", **changes))
    assert losses == whole
    final = [read_weights(tmp_path / name / "dvae.safetensors", "dvae") for name in ("whole", "parts")]
    assert final[0].fingerprint == final[1].fingerprint


def test_killed_without_saving_repeats_from_the_last_checkpoint(
    raw: Path, tmp_path: Path, losses: list[tuple[int, float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_dvae(dvae_run(raw, tmp_path / "whole"))
    whole = losses.copy()
    losses.clear()

    class Killed(BaseException):
        pass

    def kill(self: DVAETrainer, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        if self.update >= 8:
            raise Killed
        return step(self, stop_requested)

    step = DVAETrainer._step
    with monkeypatch.context() as patch:
        patch.setattr(DVAETrainer, "_step", kill)
        with pytest.raises(Killed):
            train_dvae(dvae_run(raw, tmp_path / "killed"))
    losses.clear()
    attempt = tmp_path / "killed" / "checkpoints" / "update_00000008" / "0123"
    attempt.mkdir(parents=True)
    (attempt / "state.pt").write_bytes(b"half a checkpoint")
    train_dvae(dvae_run(raw, tmp_path / "killed"))
    assert losses == whole[5:]  # checkpoint.every is 5
    assert not attempt.exists(), "leftovers of a kill are deleted"


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    raw: Path, tmp_path: Path, losses: list[tuple[int, float, float]]
) -> None:
    train_dvae(dvae_run(raw, tmp_path / "run"))
    whole = losses.copy()
    losses.clear()
    (tmp_path / "run" / "dvae_report.json").unlink()
    older, newer = sorted(tmp_path.glob("run/checkpoints/update_*/*/state.pt"))
    newer.write_bytes(newer.read_bytes()[:-1])
    train_dvae(dvae_run(raw, tmp_path / "run"))
    assert losses == whole[10:]
    (tmp_path / "run" / "dvae_report.json").unlink()
    for file in tmp_path.glob("run/checkpoints/update_*/*/state.pt"):
        file.write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match="all 2 checkpoints in .* are damaged"):
        train_dvae(dvae_run(raw, tmp_path / "run"))


def test_it_learns_and_writes_what_others_read(raw: Path, tmp_path: Path, losses: list[tuple[int, float, float]]) -> None:
    run = dvae_run(raw, tmp_path / "run", updates=120)
    report = train_dvae(run)
    assert torch.tensor(2.0**-149) * 1 > 0, "flushing of denormals is switched off again for the rest of the process"
    assert losses[-1][1] < losses[0][1] - 0.5
    weights = read_weights(tmp_path / "run" / "dvae.safetensors", "dvae")
    assert weights.fingerprint == report["dvae"]
    validation = json.loads(weights.extra["validation"])
    assert validation.items() <= report.items() and 0 < validation["ssim"] < 1
    assert float(weights.extra["ln_b_min"]) == run.loss.ln_b_min == -1
    model = DVAE(DVAEConfig(**weights.config))
    model.load_state_dict(weights.state)
    validation = validation_images(run, list_raw_shards(raw), tmp_path / "run")
    white = torch.full_like(validation, 255)
    made = model.decode_tokens(model.tokens(validation))
    errors = [((validation.float() - other.float()) ** 2).mean((1, 2, 3)) for other in (made, white)]
    assert report["psnr"] == pytest.approx((10 * torch.log10(255**2 / errors[0])).mean().item(), abs=0.05)
    assert errors[0].mean() < 0.75 * errors[1].mean()
    assert report["codes_used"] == len(model.tokens(validation).unique())
    assert 1 < report["perplexity"] <= report["codes_used"] <= 32
    assert 0 < report["kl_per_cell"] < math.log(32)
    assert report["elb_hard"] == pytest.approx(report["elb_relaxed"], abs=0.3)  # tau is 1/16 at the end
    file = tmp_path / "run" / "dvae_report.json"
    assert unseal(file.read_bytes(), file) == report
    assert Image.open(tmp_path / "run" / "reconstructions.png").width >= 12 * 64
    assert load_recipe(DVAERunConfig, tmp_path / "run" / "recipe.yaml") == run

    losses.clear()
    assert train_dvae(run) == report
    assert losses == []
    with pytest.raises(FingerprintMismatch, match="another recipe or other images.*\n  seed: there 0, recipe 1$"):
        train_dvae(dvae_run(raw, tmp_path / "run", updates=120, seed=1))


def test_a_collapsed_codebook_is_named(
    raw: Path,
    tmp_path: Path,
    losses: list[tuple[int, float, float]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = DVAETrainer._step

    def one_code_for_all(self: DVAETrainer, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        taken = step(self, stop_requested)
        for weights in (self._weights(), self.ema.averages):
            weights["encoder.blocks.output.conv.w"].data.zero_()
        return taken

    monkeypatch.setattr(DVAETrainer, "_step", one_code_for_all)
    report = train_dvae(dvae_run(raw, tmp_path / "run", updates=6, validation={"every": 3, "samples": 64}))
    assert report["codes_used"] < 4
    told = [record.message for record in caplog.records if "COLLAPSED" in record.message]
    assert len(told) == 1, "at update 3 the KL weight is still rising, at update 6 it is not"
    assert f"{report['codes_used']} of 32 codes" in told[0] and "tau falls too fast" in told[0]


def test_each_part_of_each_update_has_its_own_noise(raw: Path, tmp_path: Path) -> None:
    with closing(trainer_of(dvae_run(raw, tmp_path))) as trainer:
        drawn = [torch.rand(4, generator=trainer._noise(part)) for part in (0, 1, 0)]
        trainer.update += 1
        drawn.append(torch.rand(4, generator=trainer._noise(0)))
    assert torch.equal(drawn[0], drawn[2])
    assert not any(torch.equal(drawn[0], other) for other in (drawn[1], drawn[3]))


def test_ranks_that_do_not_see_the_same_folder_are_told_so(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gather_objects", lambda _, mine: [mine, (5, "test")] if mine == (0, "test") else [mine])
    with pytest.raises(UserError, match="rank 1 starts at update 5 of run test, rank 0 at update 0 of run test: all ranks"):
        trainer_of(dvae_run(raw, tmp_path))


def test_loss_is_divided_once(raw: Path, tmp_path: Path) -> None:
    run = dvae_run(raw, tmp_path, loss={})
    with closing(trainer_of(run)) as trainer:
        images = trainer.validation[:4]
        loss, terms = trainer._loss(images, 0.5, 6.6, torch.Generator())
    # per image: the NLL summed over 768 sub-pixels plus 6.6 times the KL summed over 64 cells, all divided by 768
    whole_image = (768 * terms["nll"] + 6.6 * 64 * terms["kl_per_cell"]) / 768
    torch.testing.assert_close(loss.detach(), whole_image)


def test_workers_change_nothing(raw: Path, tmp_path: Path, losses: list[tuple[int, float, float]]) -> None:
    for workers in (1, 3):
        train_dvae(dvae_run(raw, tmp_path / f"{workers}", micro_batch=2, workers=workers, updates=5))
    assert losses[:5] == losses[5:]


def test_micro_batches_add_up_to_the_batch(
    raw: Path, tmp_path: Path, losses: list[tuple[int, float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without noise, and without the usage term, which is computed per micro-batch.
    monkeypatch.setattr("dalle_ds.models.dvae.gumbel_softmax", lambda logits, tau, _: torch.softmax(logits / tau, dim=1))
    changes = {"updates": 2, "loss": {"ln_b_min": -1.0}}
    train_dvae(dvae_run(raw, tmp_path / "whole", **changes))
    train_dvae(dvae_run(raw, tmp_path / "parts", micro_batch=2, **changes))
    for whole, parts in zip(losses[:2], losses[2:], strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)


SMALL_WINDOW = 2**13  # bytes; the shards have 20 kB, so parts are streams of windows
WHOLE = 2**30


def stream_of(run: DVAERunConfig, window_bytes: int, parts: range | None = None, cursors: Cursors | None = None) -> ImageStream:
    reading = replace(reading_of(run, list_raw_shards(run.data.raw)), window_bytes=window_bytes)
    assert reading.is_whole == (window_bytes == WHOLE)
    return ImageStream(run, reading, range(run.n_parts) if parts is None else parts, cursors)


@pytest.mark.parametrize("window_bytes", [WHOLE, SMALL_WINDOW])
@pytest.mark.parametrize("decoders", [0, 2])
def test_stream_goes_on_anywhere(raw: Path, tmp_path: Path, window_bytes: int, decoders: int) -> None:
    data = {"raw": str(raw), "validation_fraction": 0.2, "decoded_mb": 0}
    run = dvae_run(raw, tmp_path, micro_batch=2, data={**data, "decoders": 0})
    with closing(stream_of(run, window_bytes)) as first:
        batches = [next(first) for _ in range(20)]
    assert all(cursor.epoch >= 1 for cursor in batches[-1].cursors.values())
    run = dvae_run(raw, tmp_path, micro_batch=2, data={**data, "decoders": decoders})
    with closing(stream_of(run, window_bytes, cursors=batches[12].cursors)) as again:
        for expected in batches[13:17]:
            found = next(again)
            assert torch.equal(found.images_BCHW, expected.images_BCHW)
            assert found.cursors == expected.cursors


@pytest.mark.parametrize("window_bytes", [WHOLE, SMALL_WINDOW])
def test_streams_of_ranks_make_the_same_batches_between_them(tmp_path: Path, window_bytes: int) -> None:
    raw = make_raw(tmp_path / "raw", damaged=(DAMAGED, *TRAIN_KEYS[5:9]))
    with tarfile.open(raw / "03.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("no_image.json"))
    run = dvae_run(raw, tmp_path, global_batch=6, micro_batch=1)
    whole, *parts = streams = [stream_of(run, window_bytes, places) for places in (None, range(3), range(3, 4), range(4, 6))]
    for _ in range(3 * len(TRAIN_KEYS) // 6):
        batch, *of_ranks = (next(stream) for stream in (whole, *parts))
        assert torch.equal(torch.cat([part.images_BCHW for part in of_ranks]), batch.images_BCHW)
        assert sum(part.n_unusable for part in of_ranks) == batch.n_unusable
        assert {k: v for part in of_ranks for k, v in part.cursors.items()} == batch.cursors
    n_epochs = [cursor.epoch for cursor in batch.cursors.values()]
    assert min(n_epochs) >= 2 and min(n_epochs) * 6 <= batch.n_unusable, "each is counted in each epoch"
    if window_bytes == WHOLE:
        assert batch.n_unusable <= (max(n_epochs) + 1) * (6 + 1), "at its own place only"
    for stream in streams:
        stream.close()


def test_the_next_usable_image_stands_in_for_an_unusable_one(raw: Path, tmp_path: Path) -> None:
    run = dvae_run(raw, tmp_path, global_batch=1, model={"image_size": 48}, seed=3)  # whole images, possibly flipped
    samples = [sample for shard in list_raw_shards(raw) for sample in read_raw_shard(shard)]
    images = {}
    for sample in samples:
        if isinstance(sample, RawSample) and sample.key in {*TRAIN_KEYS} - {DAMAGED, TOO_SMALL}:
            images[sample.key] = np.asarray(decode_image(sample.image)).transpose(2, 0, 1)
    stream = stream_of(run, WHOLE)
    order = []
    for _ in TRAIN_KEYS:
        (image_CHW,) = next(stream).images_BCHW.numpy()
        order += [key for key, known in images.items() if (known == image_CHW).all() or (known[..., ::-1] == image_CHW).all()]
    stream.close()
    assert len(order) == len(TRAIN_KEYS) and set(order) == set(images)
    assert sum(here == after for here, after in zip(order, order[1:] + order[:1], strict=True)) == 2


def test_a_data_set_without_a_usable_image_is_an_error(tmp_path: Path) -> None:
    run = dvae_run(make_raw(tmp_path / "raw", damaged=tuple(KEYS)), tmp_path)
    with (
        closing(stream_of(run, WHOLE)) as stream,
        pytest.raises(DataError, match=rf"none of {len(TRAIN_KEYS)} images is usable"),
    ):
        next(stream)


def test_validation_images_are_read_once_and_kept(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, shards, folder = dvae_run(raw, tmp_path), list_raw_shards(raw), tmp_path / "run"
    n_held_out = len(KEYS) - len(TRAIN_KEYS)
    images = validation_images(run, shards, folder)
    assert images.shape == (n_held_out, 3, 16, 16)
    file = folder / "validation.safetensors"
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("dalle_ds.training.validation_set.read_raw_shard", lambda _: pytest.fail("a shard was read"))
        assert torch.equal(validation_images(run, shards, folder), images)
    file.write_bytes(whole[: len(whole) // 2])
    assert torch.equal(validation_images(run, shards, folder), images), "a damaged file is written again"
    few = run.model_copy(update={"validation": run.validation.model_copy(update={"samples": 5})})
    assert torch.equal(validation_images(few, shards, folder), images[:5]), "the first in the order of the shards"
    assert torch.equal(validation_images(run, shards[1:], folder), images[-len(validation_images(run, shards[1:], folder)) :])
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="validation.safetensors cannot be written"):
        validation_images(run, shards, folder)


def test_validation_images_are_the_same_at_any_number_of_ranks(raw: Path, tmp_path: Path) -> None:
    run, shards = dvae_run(raw, tmp_path), list_raw_shards(raw)
    alone = validation_images(run, shards, tmp_path / "alone")
    found = run_ranks(3, lambda ranks: validation_images(run, shards, tmp_path / "three", ranks))
    assert all(torch.equal(images, alone) for images in found)


def test_shards_are_listed_once(raw: Path, tmp_path: Path, losses: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []

    def counting(root: str) -> list[RawShard]:
        listed.append(root)
        return list_raw_shards(root)

    monkeypatch.setattr("dalle_ds.training.image_run.list_raw_shards", counting)
    train_dvae(dvae_run(raw, tmp_path / "run", updates=1))
    assert listed == [str(raw)]
    given: list[Any] = []
    monkeypatch.setattr(Ranks, "from_main", lambda _, mine: given.append(mine) or (list_raw_shards(raw), None))
    assert raw_data(str(raw), Ranks(1, 2, torch.device("cpu"))) == raw_data(str(raw))
    assert given[0] == (None, None) and listed == [str(raw)] * 2, "another rank lists nothing"


def test_clear_errors_at_the_start(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="is a token data set: it has dataset.json. Expected raw shards of"):
        list_raw_shards(tmp_path / "tokens")
    with pytest.raises(DataError, match="no raw shards"):
        train_dvae(dvae_run(tmp_path / "nothing", tmp_path / "run"))
    with pytest.raises(ConfigError, match="fp16, which needs a CUDA device"):
        train_dvae(dvae_run(raw, tmp_path / "run", precision="fp16"))
    with pytest.raises(ConfigError, match="'gpu', expected auto"):
        train_dvae(dvae_run(raw, tmp_path / "run", device="gpu"))
    third_of_three = Ranks(2, 3, torch.device("cpu"))
    with pytest.raises(
        ConfigError, match="global_batch 8 in parts of micro_batch 2 is 4 parts, expected a multiple of the 3 r"
    ):
        trainer_of(dvae_run(raw, tmp_path / "run", micro_batch=2), third_of_three)
    with pytest.raises(ConfigError, match="device is 'meta', but rank 2 of 3 has cpu"):
        trainer_of(dvae_run(raw, tmp_path / "run", device="meta", micro_batch=1, global_batch=3), third_of_three)
    with pytest.raises(DataError, match="at least 64 pixels"):
        train_dvae(dvae_run(raw, tmp_path / "run", model={"image_size": 64}))


def test_a_full_disk_is_named_at_the_start(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**16))
    with pytest.raises(UserError, match="checkpoints cannot be written to .*/run/checkpoints: no space"):
        train_dvae(dvae_run(raw, tmp_path / "run"))


def test_sigterm_saves_and_leaves_with_143(raw: Path, tmp_path: Path) -> None:
    run = dvae_run(
        raw,
        tmp_path / "run",
        updates=100_000,
        checkpoint={"every": 100_000},
        tracking={"uri": "http://127.0.0.1:9", "every": 1},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(run))
    verb = ["dalle_ds.cli", "train", "dvae", str(tmp_path / "recipe.yaml"), "--json"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    process = subprocess.Popen([sys.executable, "-X", "importtime", "-m", *verb], stderr=subprocess.PIPE, text=True, env=env)
    try:
        imported = ""
        for line in process.stderr:
            imported += line
            if "dVAE:" in line:  # the progress bar: the loop has begun
                process.send_signal(signal.SIGTERM)
                break
        _, errors = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert "asked to stop (SIGTERM) at update" in errors and "repeat the command to resume from" in errors
    assert "torch.nn" in imported and "deepspeed" not in imported, "a single process does not need DeepSpeed"
    (file,) = tmp_path.glob("run/checkpoints/update_*/*/state.pt")
    state = torch.load(file, weights_only=True)
    assert state["update"] >= 1
    assert state["cursors"].keys() == {0} and state["cursors"][0][2] >= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_inf_or_nan_among_the_gradients_skips_the_update_and_is_counted(
    raw: Path,
    tmp_path: Path,
    losses: list[tuple[int, float, float]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    clip: float | None,
) -> None:
    accumulate, value = DVAETrainer._accumulate, {3: math.inf, 4: math.nan}
    kept: dict[int, list[torch.Tensor]] = {}

    def damaged(self: DVAETrainer, *given: Any) -> dict[str, Any]:
        sums = accumulate(self, *given)
        kept[self.update] = [weight.clone() for weight in (*self.parameters, *self.ema.averages.values())]
        if self.update in value:
            self.parameters[5].grad.view(-1)[2] = value[self.update]
        return sums

    monkeypatch.setattr(DVAETrainer, "_accumulate", damaged)
    run = dvae_run(raw, tmp_path / "run", updates=8, precision=precision, optimizer={"clip": clip}, checkpoint={"every": 5})
    report = train_dvae(run)
    assert report["skipped_updates"] == 2 and report["updates"] == 8
    unchanged = [all(map(torch.equal, kept[update], kept[update + 1])) for update in range(7)]
    assert unchanged == [False, False, False, True, True, False, False], "weights and their EMA"
    assert all(math.isfinite(loss) for _, loss, _ in losses)
    told = [record.message for record in caplog.records if "is skipped" in record.message]
    assert [line.split(", loss")[0] for line in told] == [
        "update 3 is skipped: gradient norm inf",
        "update 4 is skipped: gradient norm nan",
    ]
    weights = read_weights(tmp_path / "run" / "dvae.safetensors", "dvae")
    assert all(weight.isfinite().all() for weight in weights.state.values())
    (tmp_path / "run" / "dvae_report.json").unlink()
    assert train_dvae(run)["skipped_updates"] == 2, "a resumed run knows the count"


def test_a_run_that_diverges_ends_with_a_message(
    raw: Path, tmp_path: Path, losses: list[tuple[int, float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DVAETrainer, "_loss", _nan_from_update(6, DVAETrainer._loss))
    run = dvae_run(raw, tmp_path / "run", updates=100, failure={"updates_without_step": 4})
    with pytest.raises(TrainingDiverged, match="4 consecutive updates up to update 9, the last one with loss nan.*step 4"):
        train_dvae(run)
    (file,) = tmp_path.glob("run/checkpoints/update_*/*/state.pt")
    state = torch.load(file, weights_only=True)
    assert all(weight.isfinite().all() for weight in state["model"].values())


def _nan_from_update(first: int, loss_of: Any) -> Any:
    def loss(self: DVAETrainer, *given: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, terms = loss_of(self, *given)
        factor = math.nan if self.update >= first else 1.0
        return total * factor, {name: value * factor for name, value in terms.items()}

    return loss


@pytest.mark.parametrize("global_batch", [8, 2**25])
def test_first_loss_scale_makes_up_for_the_division_by_the_batch(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, global_batch: int
) -> None:
    """Gradients of one part, in real fp16 and in fp32. For 2^25 images, a scale of 2^16 loses most of them."""
    monkeypatch.setattr("dalle_ds.training.dvae.trainer._device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(
        "dalle_ds.training.dvae.trainer.ImageStream", lambda *_: SimpleNamespace(close=lambda: None, cursors={})
    )
    gradients = {}
    for precision in ("fp16", "fp32"):
        run = dvae_run(raw, tmp_path, precision=precision, micro_batch=8, global_batch=global_batch, loss={})
        with closing(trainer_of(run)) as trainer:
            trainer._accumulate(trainer.validation[:8], 1.0, 0.2)
            trainer.scaler.unscale_(trainer.optimizer)
            branches = [name for name in trainer._weights() if name.startswith("encoder") and "res_path" in name]
            gradients[precision] = torch.cat([trainer._weights()[name].grad.flatten() for name in branches])
    lost = ((gradients["fp16"] == 0) & (gradients["fp32"] != 0)).float().mean()
    error = (gradients["fp16"] - gradients["fp32"]).norm() / gradients["fp32"].norm()
    assert lost < 0.05 and error < 0.05, (lost, error)


def test_recipes_fit_and_the_full_size_is_the_papers() -> None:
    full = load_recipe(DVAERunConfig, RECIPES / "12b.yaml")
    assert full == DVAERunConfig(folder=full.folder, data={"raw": full.data.raw}, micro_batch=8)
    assert full.model == DVAEConfig()
    assert full.schedules.tau == HalfCosineConfig(start=1.0, end=1 / 16, updates=150_000)
    assert (full.global_batch, full.updates, full.ema.decay, full.ema.start) == (512, 3_000_000, 0.999, "plain")
    assert (full.loss.ln_b_min, full.loss.usage_weight) == (None, 0.0)
    assert full.first_loss_scale == full.model_copy(update={"micro_batch": 1}).first_loss_scale == 2**24
    for name, grid, n_codes in (("tiny.yaml", 8, 256), ("emoji.yaml", 8, 512), ("families.yaml", 11, 1024)):
        demo = load_recipe(DVAERunConfig, RECIPES / name)
        assert (demo.model.grid, demo.model.n_codes) == (grid, n_codes)
