"""Train the dVAE: a run from its recipe to weights, report and reconstructions, on one or several ranks."""

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_ds.errors import ConfigError
from dalle_ds.models.dvae import DVAE
from dalle_ds.ops.devices import on_device
from dalle_ds.ops.host_memory import keep_freed_memory
from dalle_ds.ops.logit_laplace import log_density
from dalle_ds.ops.relaxation import kl_terms, kl_to_uniform
from dalle_ds.optim.ema import EMA
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.names import DVAE_FILE
from dalle_ds.storage.weights import read_weights, write_weights
from dalle_ds.training.dvae import codebook_start
from dalle_ds.training.dvae.codebook_care import CodebookCare
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.dvae.data import ImageStream, reading_of, validation_images
from dalle_ds.training.dvae.metrics import (
    COLLAPSE_CAUSES,
    DVAEValidation,
    describe,
    floored,
    measure,
    reconstruction_grid,
    reconstructions,
    usage_chart,
)
from dalle_ds.training.image_run import (
    ImageCheckpoints,
    ImageTrainer,
    RawData,
    all_cursors,
    cursors_of,
    device_of,
    finished_or_trained,
    finished_report,
    raw_data,
    sum_over_ranks,
)
from dalle_ds.training.run import Stopwatch, TrainingRun, open_run
from dalle_ds.training.skipped_updates import SkippedUpdates

log = logging.getLogger(__name__)

REPORT_FILE = "dvae_report.json"
RECONSTRUCTIONS_FILE = "reconstructions.png"
RESULTS = (DVAE_FILE, REPORT_FILE, RECONSTRUCTIONS_FILE)


def train_dvae(recipe: DVAERunConfig, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Train or resume the run in `recipe.folder`. A finished run is not changed. Returns the report, on every rank.

    Ranks are data-parallel replicas; each processes its own parts of every batch. Images and noise are the same at any number
    of ranks. Losses therefore differ only by the order of summation, and a checkpoint can be resumed at any number of ranks.
    `recipe.folder` must be on a file system that all ranks share.

    Raises:
        UserError: the recipe, the data or the folder has a problem that would stop the run later.
        RankLost: another rank died, failed or hangs.
        SystemExit(143): the run was asked to stop, and its state is saved.
    """
    with open_run(recipe.folder, ranks, recipe.failure.collective_timeout) as run:
        data = raw_data(recipe.data.raw, ranks)

        def train(identity: str) -> dict[str, Any]:
            with _denormals_flushed(), closing(DVAETrainer(run, recipe, identity, data)) as trainer:
                return trainer.train()

        return finished_or_trained(run, "dvae", recipe, data, RESULTS, _finished, train)


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Flush denormal numbers to zero within the context, then restore the setting.

    Denormals are very slow on CPUs, and codes that fall out of use produce many of them."""
    flushed_before = bool(torch.tensor(2.0**-149) * 1 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed_before)


class DVAETrainer(ImageTrainer):
    """The state of an unfinished run, resumed from its newest checkpoint if there is one."""

    stage, title = "dvae", "dVAE"

    def __init__(self, run: TrainingRun, recipe: DVAERunConfig, identity: str, data: RawData) -> None:
        ranks = run.ranks
        self.run, self.ranks, self.folder = run, ranks, run.folder
        self.recipe, self.identity, self.shards = recipe, identity, data.digest
        self.parts = recipe.parts_of(ranks.rank, ranks.world_size)
        self.device = _device(recipe, ranks)
        if self.device.type == "cpu":
            keep_freed_memory()
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        torch.manual_seed(recipe.seed)
        # channels_last: convolutions need no reordering, and the logits of a cell are contiguous for the softmax
        self.model = DVAE(recipe.model).to(self.device, memory_format=torch.channels_last)
        if recipe.codebook_start.updates:
            codebook_start.prepare(self.model)
        self.parameters = list(self.model.parameters())
        self.checkpoints = ImageCheckpoints(run.folder, identity, recipe.checkpoint.keep, ranks)
        saved = self.checkpoints.newest()
        self.checkpoints.check_disk_space(self._n_parameters())
        settings = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=recipe.learning_rate.peak,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=recipe.first_loss_scale, enabled=recipe.precision == "fp16"
        )
        self.skipped = SkippedUpdates(recipe.failure.updates_without_step)
        self.ema = EMA(self._weights(), recipe.ema)
        self.codebook = CodebookCare(recipe, self.model, self.optimizer, self.ema, ranks, self.device)
        # Workers process whole micro-batches in parallel. On a CPU this is faster than threads inside operations, which
        # synchronize hundreds of times in an update and wait even longer if another program occupies a core. Each part has its
        # own noise, and gradients are summed in a fixed order, so every run has the same losses.
        self.pool = ThreadPoolExecutor(recipe.workers, "dvae", initializer=torch.set_flush_denormal, initargs=(True,))
        self.update = 0
        self.watch = Stopwatch(self._restore(saved))
        self.validation = validation_images(recipe, data.shards, run.folder, ranks)
        cursors = None if saved is None else cursors_of(saved)
        self.stream = ImageStream(recipe, reading_of(recipe, data.shards), self.parts, cursors)
        self.cursors = self.stream.cursors

    def close(self) -> None:
        """Stop the threads of the run."""
        self.stream.close()
        self.pool.shutdown()

    def _n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def _describe(self) -> str:
        return describe(self.recipe, self._n_parameters(), self.ranks.world_size)

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def _step(self, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        """One update of the parameters and their EMA. See `ImageTrainer._step`."""
        run, schedules = self.recipe, self.recipe.schedules
        if self.n_relaxed == 0:
            self.cursors = self.codebook.start(self.stream, self.parts, self.cursors)
        elif self.n_relaxed > 0:
            self.codebook.look(self.update)
        tau, kl_weight = schedules.tau.at(self.n_relaxed), schedules.kl_weight.at(self.n_relaxed)
        lr = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = next(self.stream)
        self.cursors = batch.cursors
        sums = self._accumulate(batch.images_BCHW, tau, kl_weight)
        sums = sum_over_ranks(
            self.ranks, self.parameters, {**sums, "unusable_images": batch.n_unusable, "stop_requests": stop_requested}
        )
        stop_requested, n_unusable = bool(sums.pop("stop_requests")), sums.pop("unusable_images")
        self.scaler.unscale_(self.optimizer)
        clip = run.optimizer.clip if run.optimizer.clip is not None else float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip, foreach=True)
        scale = self.scaler.get_scale()
        took_step = self.skipped.take_step(self.update, grad_norm, sums["total"], scale if self.scaler.is_enabled() else None)
        if took_step:
            self.scaler.step(self.optimizer)
            self.ema.update(self._weights())
        self.scaler.update()  # lowers the scale after Inf or NaN
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {
            **{f"loss/train/{name}": value for name, value in sums.items()},
            "optimizer/gradient_norm": grad_norm,
            "optimizer/learning_rate": lr,
            "optimizer/loss_scale": scale,
            "optimizer/skipped_updates": self.skipped.total,
            "schedules/tau": tau,
            "schedules/kl_weight": kl_weight,
            "speed/data_wait_seconds": self.stream.wait_seconds,
            "data/unusable_images": n_unusable,
            "codebook/returns": self.codebook.watch.n_returns,
        }
        return metrics, stop_requested

    @property
    def n_relaxed(self) -> int:
        """Updates with relaxed codes so far; negative during the updates without codes, which come before."""
        return self.recipe.n_relaxed(self.update)

    def _can_validate(self) -> bool:
        return not self.recipe.codebook_start.updates or self.n_relaxed > 0

    def _learning_rate(self) -> float:
        if self.n_relaxed < 0:
            return self.recipe.codebook_start.learning_rate_at(self.update)
        return self.recipe.learning_rate.at(self.n_relaxed) * self.codebook.watch.learning_rate_factor

    def _accumulate(self, images_BCHW: Tensor, tau: float, kl_weight: float) -> dict[str, Tensor]:
        """Accumulate the gradients of this rank's parts, multiplied by the loss scale, in the parameters.

        Returns:
            This rank's contribution to the loss and to its terms, divided by the number of parts in the whole batch. The sum
            over ranks is the mean over the batch.
        """
        n_parts = self.recipe.n_parts

        def gradients(images_BCHW: Tensor, part: int) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
            loss, terms = self._loss(images_BCHW, tau, kl_weight, self._noise(part))
            # updates without codes leave one convolution unused: zeros
            return torch.autograd.grad(self.scaler.scale(loss / n_parts), self.parameters, materialize_grads=True), terms

        run_parts = self.pool.map if self.recipe.workers > 1 else map
        sums: dict[str, Tensor] = {}
        for part_gradients, terms in run_parts(gradients, images_BCHW.split(self.recipe.part_size), self.parts):
            for parameter, gradient in zip(self.parameters, part_gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            if "codes" in terms:
                self.codebook.count(terms.pop("codes"))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value / n_parts
        return sums

    def _noise(self, part: int) -> torch.Generator:
        # seeded by update and part: a checkpoint needs no generator state, and any rank can process the part
        seed = np.random.SeedSequence((self.recipe.seed, self.update, part)).generate_state(1, np.uint64)
        return torch.Generator(self.device).manual_seed(int(seed[0]))

    def _loss(
        self, images_BCHW: Tensor, tau: float, kl_weight: float, noise: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative evidence lower bound with weight `kl_weight`, in nats, divided as a whole by the number of sub-pixels
        (paper, appendix A.1). Returns the loss and its detached terms by name."""
        run = self.recipe
        images_BCHW = on_device(images_BCHW, self.device).contiguous(memory_format=torch.channels_last)
        # no cache of cast weights: each is used once, and workers must not share tensors of another worker's autograd graph
        with torch.autocast(self.device.type, _DTYPES[run.precision], enabled=run.precision != "fp32", cache_enabled=False):
            logits_BKhw = None  # there are none before the codebook's start
            if self.n_relaxed < 0:
                pixels_BCHW, mu, ln_b = codebook_start.continuous_pass(self.model, images_BCHW, run.codebook_start.noise, noise)
            else:
                pixels_BCHW, logits_BKhw, mu, ln_b = self.model(images_BCHW, tau, noise)
        n_subpixels = images_BCHW[0].numel()
        nll = -log_density(pixels_BCHW, mu, floored(ln_b, run.loss.ln_b_min)).mean()
        if logits_BKhw is None:
            return nll, {"total": nll.detach(), "nll": nll.detach()}
        usage_kl = None
        if run.loss.usage_weight:
            kl_per_cell, usage_kl = kl_terms(logits_BKhw)
        else:
            kl_per_cell = kl_to_uniform(logits_BKhw).mean()
        loss = nll + kl_weight * kl_per_cell * (run.model.n_tokens / n_subpixels)
        terms = {"nll": nll.detach(), "kl_per_cell": kl_per_cell.detach()}
        if usage_kl is not None:
            usage_weight = run.loss.usage_weight * self.codebook.watch.usage_factor
            loss = loss + usage_weight * usage_kl * (run.model.n_tokens / n_subpixels)
            terms["usage_kl"] = usage_kl.detach()
        terms = {"total": loss.detach(), **terms}
        if self.codebook.looks_soon(self.update):
            terms["codes"] = logits_BKhw.detach().argmax(1)
        return loss, terms

    # ---- measuring -------------------------------------------------------------------------------------------------------

    def _validate(self) -> DVAEValidation:
        """Validate the EMA weights. Metrics and images are logged to the tracker, which draws the images meanwhile."""
        tau = self.recipe.schedules.tau.at(self.n_relaxed)
        with self.ema.in_place_of(self._weights()):
            numbers, counts_K = measure(self.model, self.validation, tau, self.recipe.loss.ln_b_min, self.ranks)
            if not self.ranks.is_main:
                return numbers
            pairs = reconstructions(self.model, self.validation)
        self.run.tracker.metrics(numbers.metrics(), self.update)
        self.run.tracker.image("reconstructions", partial(reconstruction_grid, *pairs), self.update)
        title = f"{numbers.codes_used} of {numbers.n_codes} codes in use, perplexity {numbers.perplexity:.0f}"
        self.run.tracker.image("codebook_usage", partial(usage_chart, counts_K, title), self.update)
        log.info("update %d, validation: PSNR %.2f dB, SSIM %.3f, %s", self.update, numbers.psnr, numbers.ssim, title)
        if numbers.has_collapsed and self.n_relaxed >= self.recipe.schedules.kl_weight.updates:
            log.warning("the codebook has COLLAPSED: %s; %s", title, COLLAPSE_CAUSES)
        return numbers

    def _finish(self) -> dict[str, Any]:
        """Validate and write the results. Returns the report."""
        numbers = self._validate()
        report = self.ranks.once(lambda: self._write_results(numbers))
        self.run.finished()
        return report

    def _write_results(self, numbers: DVAEValidation) -> dict[str, Any]:
        """Write the EMA weights and reconstructions, then the report. The report marks the run as finished. Returns it."""
        model, ln_b_min = self.recipe.model, self.recipe.loss.ln_b_min
        with self.ema.in_place_of(self._weights()):
            reconstruction_grid(*reconstructions(self.model, self.validation)).save(self.folder / RECONSTRUCTIONS_FILE)
            state = {name: value.contiguous() for name, value in self.model.state_dict().items()}
            fingerprint = write_weights(
                self.folder / DVAE_FILE,
                kind="dvae",
                config=model.model_dump(),
                state=state,
                extra={
                    "run": self.identity,
                    "validation": json.dumps(asdict(numbers)),
                    "validation_fraction": str(self.recipe.data.validation_fraction),
                    **({} if ln_b_min is None else {"ln_b_min": str(ln_b_min)}),
                },
            )
        report = {
            "dvae": fingerprint,
            "run": self.identity,
            "weights": str(self.folder / DVAE_FILE),
            "image_size": model.image_size,
            "grid": model.grid,
            **asdict(numbers),
            "updates": self.update,
            "skipped_updates": self.skipped.total,
            "codebook_returns": self.codebook.watch.n_returns,
            "seconds": round(self.watch.seconds, 1),
            "n_parameters": self._n_parameters(),
            "reconstructions": str(self.folder / RECONSTRUCTIONS_FILE),
        }
        self.run.write_results(REPORT_FILE, report)  # last, because it marks the run as finished
        self.run.tracker.tags({"fingerprint.dvae": fingerprint})
        for name in RESULTS:
            self.run.tracker.artifact(self.folder / name)
        return report

    # ---- stop and resume -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "update": self.update,
            "skipped_updates": self.skipped.total,
            "seconds": self.watch.seconds,
            "cursors": all_cursors(self.cursors, self.ranks),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": self.scaler.state_dict(),
            "codebook": self.codebook.watch.state_dict(),
        }
        self.checkpoints.save(self.update, state)

    def _restore(self, state: dict[str, Any] | None) -> float:
        """Load the state of the newest checkpoint, if any. Returns the seconds that the run had taken by then."""
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.scaler.load_state_dict(state["scaler"])
            if "codebook" in state:  # not in older checkpoints
                self.codebook.watch.load_state_dict(state["codebook"])
            self.update = state["update"]
            self.skipped.total = state.get("skipped_updates", 0)  # older checkpoints have no count
            log.info("resuming at update %d", self.update)
        self._require_same_start()
        return 0.0 if state is None else state["seconds"]


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _finished(folder: Path, identity: str) -> dict[str, Any] | None:
    """Return the report of a finished run in this folder. None if the report or the weights file is missing.

    Raises:
        FingerprintMismatch: the weights file is not the one of the report.
    """
    report = finished_report(folder / REPORT_FILE, identity)
    if report is None or not (folder / DVAE_FILE).exists():
        return None  # the last checkpoint is complete, so the trainer writes the weights again from it
    fingerprint = read_weights(folder / DVAE_FILE, "dvae").fingerprint
    require_same(f"weights {folder / DVAE_FILE}", report.get("dvae", "none"), fingerprint)
    return report


def _device(run: DVAERunConfig, ranks: Ranks) -> torch.device:
    device = device_of(run.device, ranks)
    if run.precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"precision is fp16, which needs a CUDA device, but device is {device}; set precision=bf16 or fp32")
    return device
