"""Metrics, charts, log lines and progress bar of a prior run."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial

from PIL import Image
from torch import Tensor

from dalle_ds.console import progress
from dalle_ds.data.tokens.batches import TokenStream
from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.engine import PriorEngine, UpdateReport
from dalle_ds.parallel.step_timer import collective_share
from dalle_ds.precision.resblock_scaling import ResblockGradScaler
from dalle_ds.tracking.charts import MAX_POINTS, gradient_scales, position_heatmap
from dalle_ds.tracking.tracker import NullTracker
from dalle_ds.training.prior.config import PriorRunConfig
from dalle_ds.training.prior.paper import Difference
from dalle_ds.training.prior.state import TrainState
from dalle_ds.training.prior.throughput import Throughput, known_peak_tflops, peak_gigabytes

log = logging.getLogger(__name__)

SAMPLES = "samples"


def describe(run: PriorRunConfig, n_parameters: int, world_size: int, different: Sequence[Difference]) -> str:
    """Describe the run and its main metrics in Markdown, for the run's MLflow page. `different` compares it with the paper."""
    told = "No setting differs from the paper's recipe"
    if different:
        told = f"Settings that differ from the paper's recipe (its value in brackets): {', '.join(map(str, different))}"
    lines = [
        f"Prior `{run.model.preset}` with {n_parameters / 1e6:.1f} million parameters: {run.updates} updates of "
        f"{run.global_batch} samples from `{run.data.sources}` on {world_size} ranks.",
        "",
        "Where to look first, under *Model metrics*:",
        "- `loss/validation/image`: loss of the EMA weights on the validation split, in nats per image token. It should fall "
        "to the end. If it rises while `loss/train/image` falls, the prior overfits.",
        "- `optimizer/skipped_updates`, and the image `optimizer/gradient_scales`: a few skipped updates and slowly rising "
        "scales are healthy. A residual block whose scale keeps falling is not.",
        "- `speed/tokens_per_second`, `speed/mfu` (if the peak of the device is known), `time_share/data_wait`: if the last is "
        "not near 0, training waits for its data.",
        "- the images `samples/validation` and `loss/by_position`, by update.",
        "",
        f"{told}. What no setting changes is in `launchers/REPRODUCE.md`, *What is known to differ from the paper*. All "
        "settings are in `recipe.yaml` and `deepspeed.json` under *Artifacts*.",
    ]
    if run.tracking.samples_every and run.tracking.scene_captions:
        lines.insert(
            -2,
            "- `scenes/seen/mean` and `scenes/zero_shot/mean`, if the data are drawn scenes: share of the samples that show "
            "what their caption says, for combinations that training sees and for those that it never sees.",
        )
    if run.tracking.samples_every:
        lines += ["", f"![Newest samples](get-artifact?path=latest_images%2F{SAMPLES}.png&run_uuid=RUN_ID)"]
    return "\n".join(lines)


class PriorMetrics:
    """Logs metrics of a prior run. All ranks must call every method together; only the main rank logs."""

    def __init__(
        self,
        recipe: PriorRunConfig,
        model_config: PriorConfig,
        engine: PriorEngine,
        stream: TokenStream,
        state: TrainState,
        tracker: NullTracker,
    ) -> None:
        self._is_main = engine.ranks.is_main
        self._engine, self._stream, self._state, self._tracker = engine, stream, state, tracker
        self._every, self._profile_every, self._grid = recipe.tracking.every, recipe.tracking.profile_every, model_config.grid
        ranks = engine.ranks
        peak = recipe.tracking.peak_tflops or known_peak_tflops(ranks.device)
        self._throughput = Throughput(model_config, recipe.global_batch, peak * ranks.world_size if peak else None)
        # a deep prior has 128 of 150 metrics in its blocks: MLflow gets as many points of them as a chart shows
        self._blocks_every = self._every * -(-recipe.updates // (self._every * MAX_POINTS))
        self._scale_history: list[tuple[int, dict[str, float]]] = []
        self._at_limits: dict[str, str] = {}
        self._moments, self._optimizer_bytes = recipe.optimizer.moments, 0.0
        self.bar = progress(total=recipe.updates, initial=state.update, what="prior", unit="update", enabled=self._is_main)

    @contextmanager
    def profile(self) -> Iterator[None]:
        """Wrap an update. Every `tracking.profile_every` updates, measures the fraction of its time spent in collectives."""
        if not self._is_main or not self._state.update or self._state.update % self._profile_every:
            yield
            return
        with collective_share(self._engine.ranks.device) as share:
            yield
        self._tracker.metrics({"time_share/collectives": share.value}, self._state.update)

    def log(self, report: UpdateReport, lr: float) -> None:
        """Call after every update, when `state` has already counted it."""
        if report.took_step and not self._optimizer_bytes:
            self._log_optimizer_bytes()
        if not self._is_main:
            return
        state = self._state
        self.bar.update(1)
        self._throughput.add()
        if report.nonfinite_blocks:
            what = "skipped some blocks" if report.took_step else "skipped"
            log.warning("update %d %s: non-finite gradient in %s", state.update, what, ", ".join(report.nonfinite_blocks))
        elif not report.took_step and report.loss_scale is not None:
            log.warning("update %d skipped: non-finite gradient at loss scale 2^%g", state.update, math.log2(report.loss_scale))
        elif not report.took_step:
            log.warning(
                "update %d skipped: gradient norm %s, but the gradients of all residual blocks are finite",
                state.update,
                report.grad_norm,
            )
        if state.update % self._every and report.took_step:
            return
        values = {
            "loss/train/total": report.loss,
            "loss/train/text": report.text_loss,
            "loss/train/image": report.image_loss,
            "optimizer/learning_rate": lr,
            "optimizer/skipped_updates": state.n_skipped,
            "optimizer/epoch": state.update / self._stream.updates_per_epoch,
            **self._throughput.metrics(self._engine.phases.take(), self._stream.wait_seconds),
            "speed/data_wait_seconds": self._stream.wait_seconds,
            "data/captions_cut": self._stream.n_truncated,
            **peak_gigabytes(self._engine.ranks.device),
        }
        if len(self._stream.n_drawn) > 1:  # set 1 is the first in data.mix
            values |= {f"data/samples_of_set_{i}": n for i, n in enumerate(self._stream.n_drawn, start=1)}
        if math.isfinite(report.grad_norm):
            values["optimizer/gradient_norm"] = report.grad_norm
        if report.loss_scale is not None:
            values["optimizer/loss_scale"] = report.loss_scale
        if self._engine.scaler:
            powers = self._engine.scaler.log2_scales()
            self._warn_of_limits(self._engine.scaler, powers)
            values |= {
                "optimizer/lowest_gradient_scale_log2": min(powers.values()),
                "optimizer/highest_gradient_scale_log2": max(powers.values()),
            }
            if state.update % self._blocks_every == 0:
                values |= {f"gradient_scale_log2/{name}": power for name, power in powers.items()}
                self._scale_history.append((state.update, powers))
        self._tracker.metrics(values, state.update)
        self.bar.set_postfix_str(
            f"image {report.image_loss:.3f} text {report.text_loss:.3f} skipped {state.n_skipped}", refresh=False
        )

    def log_validation(self, text_loss: float, image_loss: float, nll_BN: Tensor) -> None:
        """Log the validation losses of the EMA weights, and a map of the image loss by grid position, from `nll_BN` of some
        samples. The tracker draws the charts; this call does not wait for them."""
        if not self._is_main:
            return
        update, grid = self._state.update, self._grid
        self._tracker.metrics({"loss/validation/text": text_loss, "loss/validation/image": image_loss}, update)
        log.info("update %d: validation image loss %.4f, text loss %.4f nats per token", update, image_loss, text_loss)
        title = f"validation loss by position, update {update}"
        heatmap = partial(position_heatmap, nll_BN.mean(0).view(grid, grid).numpy(), title)
        self._tracker.image("loss/by_position", heatmap, update)
        self.log_scales("gradient scales")
        if len(self._scale_history) > 1:
            self._tracker.image("optimizer/gradient_scales", partial(_scales_chart, tuple(self._scale_history)), update)

    def log_samples(self, sheet: Callable[[], Image.Image]) -> None:
        """Log a sample sheet twice: by update among the charts, and as the newest sheet in the run's description."""
        sheet = cache(sheet)
        self._tracker.image("samples/validation", sheet, self._state.update)
        self._tracker.image(SAMPLES, sheet)

    def log_scores(self, scores: dict[str, float]) -> None:
        """Log shares of right scenes by metric name, if there are any."""
        if scores:
            means = ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if name.endswith("/mean"))
            log.info("update %d: %s", self._state.update, means)
            self._tracker.metrics(scores, self._state.update)

    def log_scales(self, what: str) -> None:
        """Write the smallest and the largest gradient scale to the log. `what` starts the line."""
        if self._is_main and self._engine.scaler:
            powers = sorted((power, name) for name, power in self._engine.scaler.log2_scales().items())
            log.info("%s from 2^%.1f (%s) to 2^%.1f (%s)", what, *powers[0], *powers[-1])

    def _log_optimizer_bytes(self) -> None:
        """Log the optimizer bytes per parameter, counted over its tensors, which exist only after the first step."""
        self._optimizer_bytes = self._engine.optimizer_bytes_per_parameter()
        if self._is_main:
            self._tracker.tags({"optimizer_bytes_per_parameter": round(self._optimizer_bytes, 4)})
            log.info("%s moments: %.2f bytes per parameter", self._moments, self._optimizer_bytes)

    def _warn_of_limits(self, scaler: ResblockGradScaler, powers: Mapping[str, float]) -> None:
        now = scaler.at_limits(powers)
        for name, limit in now.items():
            if self._at_limits.get(name) != limit:
                log.warning(
                    "update %d: the gradient scale of %s is at its %s, 2^%g; if it stays there, widen the limits in "
                    "the DeepSpeed JSON",
                    self._state.update,
                    name,
                    limit,
                    powers[name],
                )
        self._at_limits = now


def _scales_chart(history: Sequence[tuple[int, dict[str, float]]]) -> Image.Image:
    """Chart of gradient scales.

    Args:
        history: updates, each with the log2 of every block's scale.
    """
    updates, powers = zip(*history, strict=True)
    return gradient_scales(updates, {name: [2.0 ** of_all[name] for of_all in powers] for name in powers[0]})
