"""The training engine: a prior under DeepSpeed, with fp16 branches and per-resblock scaling that DeepSpeed does not see.

Design: ZeRO-3 partitions are fp32, so they are their own master copies. The branches' weights are gathered as fp16, and
branches compute in fp16. Gradients are reduced in fp32 and un-scaled once per update, on this rank's shards, so norm and
clipping see true gradients. No class or module of DeepSpeed is patched; `fp16_gather` sets a method on each parameter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_ds.models.prior import IMAGE_WEIGHT, NLL, TEXT_WEIGHT, Prior, PriorConfig
from dalle_ds.models.resblock import ResBlock
from dalle_ds.ops.devices import on_device
from dalle_ds.optim.adamw import moment_bytes
from dalle_ds.optim.build import OptimizerSettings, build_adamw
from dalle_ds.optim.groups import decay_groups, describe_groups
from dalle_ds.optim.masterless import MasterlessAdamW
from dalle_ds.parallel.agreement import AgreementSums
from dalle_ds.parallel.checkpoint_tensors import Snapshot
from dalle_ds.parallel.deepspeed_api import deepspeed, get_accelerator, logger
from dalle_ds.parallel.engine_config import EngineConfig
from dalle_ds.parallel.engine_state import EngineState, counters_of, set_counters
from dalle_ds.parallel.fp16_gather import gather_in_half
from dalle_ds.parallel.gradient_collectives import improve_collectives
from dalle_ds.parallel.gradient_shards import GradientShards
from dalle_ds.parallel.masterless import MasterlessMatrices
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.parallel.replicas.gradients import ReplicaGradients
from dalle_ds.parallel.replicas.groups import Replicas, ReplicasConfig
from dalle_ds.parallel.resident_gather import Residents
from dalle_ds.parallel.saved_state import SavedState, open_state
from dalle_ds.parallel.sharded_model import build_model
from dalle_ds.parallel.step_timer import PhaseTimer
from dalle_ds.parallel.zero_shards import Fragment, shard_start, unchanged
from dalle_ds.precision.resblock_scaling import ResblockGradScaler


@dataclass(frozen=True)
class UpdateReport:
    """Result of one update, the same on every rank. Losses are means over the global batch, in nats per token."""

    text_loss: float
    image_loss: float
    took_step: bool
    grad_norm: float
    nonfinite_blocks: tuple[str, ...]
    """Residual blocks with a non-finite gradient. If `took_step`, only these blocks
    kept their weights and moments; otherwise the whole update was skipped."""
    loss_scale: float | None
    """DeepSpeed's loss scale for this update. None unless DeepSpeed's built-in fp16 is on."""
    stop_requested: bool
    saves_under_way: int
    """Number of ranks still writing a background checkpoint."""

    @property
    def loss(self) -> float:
        return TEXT_WEIGHT * self.text_loss + IMAGE_WEIGHT * self.image_loss


class PriorEngine:
    """Owns the sharded model and its optimizer. One call of `update` is one update on a global batch."""

    def __init__(
        self,
        model_config: PriorConfig,
        engine_config: EngineConfig,
        optimizer: OptimizerSettings,
        ranks: Ranks,
        seed: int,
        replicas: ReplicasConfig | None = None,
        initialised: bool = True,
    ) -> None:
        """Build, initialise and shard the model. The same seed gives the same weights at any world size and in all replicas.

        Args:
            initialised: False if a checkpoint is loaded next: no weights are drawn, and they are not defined until then.

        Raises:
            ConfigError: the ranks don't divide among the replicas, or the DeepSpeed configuration allows no replicas or no
                matrices without masters.
        """
        self.ranks = ranks
        self.replicas: Replicas | None = None
        if replicas is not None and replicas.count > 1:
            engine_config.require_replicable()
            self.replicas = Replicas(replicas.count, ranks.rank, ranks.world_size)
        self._accumulation = engine_config.json["gradient_accumulation_steps"]
        self._is_sharded = engine_config.zero_stage == 3
        model = build_model(model_config, engine_config, seed if initialised else None, ranks, self.replicas)
        if optimizer.master == "none":
            engine_config.require_masterless(optimizer.moments, replicas.number_format if replicas else "1-6-9")
        self.scaler: ResblockGradScaler | None = None
        self.masterless: MasterlessMatrices | None = None
        halves: list[torch.nn.Parameter] = []
        if engine_config.block_scaling is not None:
            self.scaler = ResblockGradScaler(model, engine_config.block_scaling, ranks.device, self._accumulation)
            halves = gather_in_half(model)
            if optimizer.master == "none":
                adamw = optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay
                own = MasterlessAdamW(*adamw, seed, optimizer.variance_clip)
                self.masterless = MasterlessMatrices(model, self.scaler, own)
        groups = decay_groups(model.named_parameters(), optimizer.weight_decay, optimizer.moments, optimizer.embedding_rate)
        self.groups_description = describe_groups(groups)
        self._clip, deepspeed_json = engine_config.json["gradient_clipping"], engine_config.json
        if self.masterless:
            groups = [group for group in groups if not self.masterless.parameters.keys() & set(group["names"])]
            deepspeed_json = {**deepspeed_json, "gradient_clipping": 0.0}  # we clip, by the joint norm of both optimizers
        torch_optimizer = build_adamw(groups, optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=model, config=deepspeed_json, optimizer=torch_optimizer, mpu=self.replicas
        )
        self._residents: Residents | None = None
        if self._is_sharded:
            self._residents = Residents(self._engine.optimizer, model, halves)
            improve_collectives(self._engine.optimizer)
        if self._engine.fp16_enabled():
            # Don't raise when the loss scale reaches its minimum: the recipe's `failure` section decides when a run gives up.
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self._torch_optimizer = torch_optimizer
        self._gradients = GradientShards(self._engine.optimizer)
        self.phases = PhaseTimer(ranks.device)
        """Times forward, backward (with ZeRO-3's reduction), reduce (agreement, averaging between replicas) and step."""
        self.replica_gradients: ReplicaGradients | None = None
        if replicas is not None and self.replicas is not None:
            self.replica_gradients = ReplicaGradients(
                self.module, self._gradients, replicas, self.replicas, ranks.device, self.masterless
            )
        self._state = EngineState(
            self._engine, ranks, self.replicas, self.replica_gradients, self.scaler, self._other_fragments
        )

    @property
    def module(self) -> Prior:
        return self._engine.module

    def update(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], lr: float, stop_requested: bool = False, is_saving: bool = False
    ) -> UpdateReport:
        """Run forward, backward and step over this rank's (text, image) micro-batches of one global batch.

        Besides the collectives for gradients and their norm, an update takes two all-reduces: the token counts, and an
        `Agreement`.

        Args:
            stop_requested: if any rank requests to stop, the reports of all ranks say so.
            is_saving: whether this rank is writing a background checkpoint. The report counts these ranks.
        """
        for group in self._torch_optimizer.param_groups:
            group["lr"] = lr * group.get("relative_rate", 1.0)
        skipped_before = self._engine.skipped_steps
        loss_scale = float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else None
        sums = self._accumulate(micro_batches, stop_requested, is_saving)
        agreed = sums.read()
        nonfinite_blocks = tuple(self.scaler.names[number] for number in agreed.nonfinite_blocks) if self.scaler else ()
        kept: set[str] = set()
        norm = None
        with self.phases("reduce"):
            if nonfinite_blocks and self.scaler and self.scaler.config.skip == "block":
                kept = self._leave_out(nonfinite_blocks)
            elif not agreed.is_finite:
                if self.replica_gradients:
                    self.replica_gradients.keep()
                self._veto_step()
            elif self.replica_gradients:
                self.replica_gradients.average()
        with self.phases("step"), unchanged(self._engine, kept, self._other_fragments()):
            if self.masterless and (kept or agreed.is_finite):
                norm = self._step_masterless(self.masterless, lr, kept)
            self._engine.step()
        if kept:
            self.refresh_gathered_parameters()
        if self.scaler:
            self.scaler.update(sums.nonfinite)
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return UpdateReport(
            text_loss=agreed.text_loss,
            image_loss=agreed.image_loss,
            took_step=self._engine.skipped_steps == skipped_before,
            grad_norm=float("nan") if norm is None else float(norm),
            nonfinite_blocks=nonfinite_blocks,
            loss_scale=loss_scale,
            stop_requested=agreed.stop_requested,
            saves_under_way=agreed.n_saving,
        )

    def calibrate(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Find the first gradient scales of the residual blocks on one global batch, by `ResblockGradScaler.calibrate`.

        Call it on all ranks, before the first update. If the configuration has no `calibration_trials`, it does nothing and
        returns False; otherwise it returns True. Only the scales change: a trial is an update without its step.
        """
        if not self.scaler or not self.scaler.config.calibration_trials:
            return False
        counters = counters_of(self._engine)

        def attempt() -> Tensor:
            sums = self._accumulate(micro_batches)
            self._veto_step()
            self._engine.step()
            return sums.nonfinite

        logger.disabled = True  # DeepSpeed would log an overflow in each trial
        self.scaler.calibrate(attempt)
        if self.masterless:
            self.masterless.forget()
        logger.disabled = False
        set_counters(self._engine, counters)
        self.phases.take()  # don't count the trials' time as that of an update
        return True

    def _accumulate(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], stop_requested: bool = False, is_saving: bool = False
    ) -> AgreementSums:
        """Run forward and backward over one global batch, without the step. Returns losses and flags, summed over all ranks."""
        assert len(micro_batches) == self._accumulation, (
            f"{len(micro_batches)} micro-batches, the engine expects {self._accumulation}"
        )
        self._gather_residents()
        if self.scaler:
            self.scaler.begin()
        if self.masterless:
            self.masterless.begin()
        # Means are over the global batch (paper section 2.5), so the counts must be known before the first backward pass. The
        # host counts, since it would have to wait for counts from the device.
        n_texts = [int((text >= 0).sum()) for text, _ in micro_batches]
        counts = torch.tensor([sum(n_texts), sum(image.numel() for _, image in micro_batches)], dtype=torch.float64)
        counted = self.ranks.start_sum(on_device(counts, self.ranks.device))  # while the first forward pass runs
        micro_batches = [self._on_device(batch) for batch in micro_batches]
        # The engine averages gradients over ranks and micro-batches, but these losses are summands of global means.
        share = self.ranks.world_size * self._accumulation
        sums = AgreementSums(len(self.scaler.names) if self.scaler else 0, self.ranks.device)
        for number, (text, image) in enumerate(micro_batches):
            if number:
                self._engine.step()  # only counts micro-steps before the last micro-batch
            with self.phases("forward"):
                nll = NLL(*self._engine(text, image, n_text=n_texts[number]))
                if not number:
                    n_text, n_image = counted().float()
                text_mean, image_mean = nll.text_sum / n_text.clamp(min=1), nll.image_sum / n_image
            with self.phases("backward"):
                self._engine.backward((TEXT_WEIGHT * text_mean + IMAGE_WEIGHT * image_mean) * share)
            sums.losses += torch.stack([text_mean.detach(), image_mean.detach()])
        if self._is_sharded:
            self._gradients.refresh()
        sums.request(stop_requested, is_saving)
        if self.scaler:
            with self.phases("reduce"):
                if self.masterless:
                    self.masterless.finish()
                self.scaler.unscale(self._gradient_shards)
        if self.replica_gradients:
            sums.unaverageable.copy_(self.replica_gradients.any_nonfinite())
        if self.scaler:
            sums.nonfinite.copy_(self.scaler.found_nonfinite)
        with self.phases("reduce"):
            return sums.sum(self.ranks)

    def _on_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        text, image = batch
        return on_device(text, self.ranks.device), on_device(image, self.ranks.device)

    @contextmanager
    def _gradient_shards(self, block: ResBlock) -> Iterator[list[Tensor]]:
        """Yield this rank's shards of the reduced gradients of a block's parameters. The caller may modify them in place."""
        own = set(self.masterless.parameters.values()) if self.masterless else ()  # already un-scaled
        shards = {parameter: self._gradients.read(parameter) for parameter in block.parameters() if parameter not in own}
        yield list(shards.values())
        if self._gradients.are_copies:
            for parameter, shard in shards.items():
                self._gradients.write(parameter, shard)

    def _leave_out(self, blocks: Sequence[str]) -> set[str]:
        """Zero the gradients of these blocks, so that norm and clipping see only the other blocks.
        Returns the names of the blocks' parameters."""
        names = {f"{block}.{name}" for block in blocks for name, _ in self.module.get_submodule(block).named_parameters()}
        for name in names:
            if self.masterless and name in self.masterless:
                self.masterless.set_gradient(name, torch.zeros_like(self.masterless.gradient(name)))
            else:
                parameter = self.module.get_parameter(name)
                self._gradients.write(parameter, torch.zeros_like(self._gradients.read(parameter)))
        return names

    def _step_masterless(self, masterless: MasterlessMatrices, lr: float, kept: set[str]) -> float:
        """Clip the gradients of both optimizers by their joint norm, and step on the matrices without masters. If the norm is
        not finite, neither optimizer steps. Returns the norm."""
        theirs = [self._gradients.read(p) for name, p in self.module.named_parameters() if name not in masterless]
        squares = masterless.squared_norm() + torch.stack(torch._foreach_norm(theirs)).square().sum()
        group = self.replicas.shard_group if self.replicas else None  # replicas have the same gradients
        dist.all_reduce(squares, group=group)
        norm = squares.sqrt()
        if math.isfinite(norm):
            factor = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(theirs, factor)
            masterless.step(lr, factor, kept)
        else:
            self._veto_step()
        return float(norm)

    def _veto_step(self) -> None:
        """Skip the entire update: some block of some rank had a non-finite gradient (paper appendix E.2 step 10).

        Filtering and summation may have hidden the non-finite value, so a NaN is written where DeepSpeed's own check finds it.
        DeepSpeed then leaves parameters, moments and step count unchanged.
        """
        parameter = self.module.heads.norm.weight
        # The next backward pass overwrites this value. Only the first rank of a shard group is sure to hold a real value:
        # others may hold only padding, which counts in DeepSpeed's norm and is never overwritten.
        if shard_start(parameter) == 0:
            grad = self._gradients.read(parameter).clone()
            grad[:1].fill_(float("nan"))
            self._gradients.write(parameter, grad)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean (text, image) losses over the batches of all ranks, in nats per token. All ranks pass equally many batches."""
        self._gather_residents()
        totals = torch.zeros(4, dtype=torch.float64, device=self.ranks.device)
        with _evaluating(self._engine):
            for text, image in batches:
                nll = NLL(*self._engine(*self._on_device((text, image))))
                totals += torch.stack([t.double() for t in (nll.text_sum, nll.n_text, nll.image_sum, nll.n_image)])
        text_sum, n_text, image_sum, n_image = self.ranks.sum(totals).tolist()
        return text_sum / max(n_text, 1.0), image_sum / max(n_image, 1.0)

    @torch.no_grad()
    def image_nll(self, text_BT: Tensor, image_BN: Tensor) -> Tensor:
        """Negative log-likelihood of each image token of one batch: (B, N), in nats, on the CPU.

        All ranks must call it together, with the same batch.
        """
        self._gather_residents()
        with _evaluating(self._engine):
            return self._engine(*self._on_device((text_BT, image_BN)), per_token=True).cpu()

    def optimizer_bytes_per_parameter(self) -> float:
        """Bytes of moments per parameter of the model, counted over one replica, including ZeRO's padding.

        It is 0 before the first step, since moments do not exist yet. All ranks must call it together.
        """
        n_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())
        n_bytes = sum(map(moment_bytes, filter(None, (self._torch_optimizer, self.masterless and self.masterless.optimizer))))
        total = torch.tensor(float(n_bytes), dtype=torch.float64, device=self.ranks.device)
        n_replicas = self.replicas.count if self.replicas else 1
        return float(self.ranks.sum(total)) / n_replicas / n_parameters

    # ---- this rank's shard of every parameter ---------------------------------------------------------------------------

    def shards(self) -> dict[str, Tensor]:
        """This rank's flat shard of each parameter by name, or below ZeRO stage 3 the whole parameter. The last rank's shard is
        padded. Shards are fp32, except for matrices without masters and in DeepSpeed's built-in fp16 and bf16 modes."""
        return {name: getattr(p, "ds_tensor", p.data) for name, p in self.module.named_parameters()}

    def whole_weights(self) -> dict[str, Tensor] | None:
        """All parameters by name, whole, in fp32 on the CPU; None on other ranks than the main one. All ranks must call it."""
        weights = {}
        with self._nothing_gathered():  # what stays gathered may be rounded to fp16
            for name, parameter in self.module.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    if self.ranks.is_main:
                        weights[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        return weights or None

    def refresh_gathered_parameters(self) -> None:
        """Discard ZeRO-3's gathered parameters and gather the resident ones again. Call it after writing into `shards()`.

        Small parameters are resident, that is, always gathered. Others may still be gathered too, since ZeRO-3 keeps parameters
        that it expects to need again soon.
        """
        with self._nothing_gathered():
            pass

    def _gather_residents(self) -> None:
        if self._residents is not None:
            self._residents.gather()

    @contextmanager
    def _nothing_gathered(self) -> Iterator[None]:
        """Within, ZeRO-3 holds no gathered parameter; after it, those that stay gathered are again."""
        optimizer = self._engine.optimizer
        if self._is_sharded:  # stage 3 only: it calls these two around its own checkpoints
            optimizer.checkpoint_event_prologue()
        yield
        if self._is_sharded:
            optimizer.checkpoint_event_epilogue()
            # ZeRO-3's gather stream reads the shards next. If no parameter is resident, it does not wait for other streams.
            get_accelerator().synchronize()

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path, client_state: dict[str, Any], averages: Mapping[str, Tensor] | None = None) -> None:
        """Write a checkpoint for `load` into a folder that all ranks share. All ranks must call it together."""
        self.snapshot(client_state, averages, copy=False).write(folder)

    def snapshot(
        self, client_state: dict[str, Any], averages: Mapping[str, Tensor] | None = None, copy: bool = True
    ) -> Snapshot:
        """Collect this rank's part of a checkpoint. All ranks must call it together.

        Args:
            client_state: data of the caller that JSON can hold. The main rank's is saved.
            averages: EMA of the weights, shaped like `shards()`.
            copy: copy the tensors to CPU memory, so that they can be written while training continues. Without it, the snapshot
                must be written before the next update.
        """
        return self._state.snapshot(client_state, averages or {}, copy)

    def load(self, url: str | Path, averages: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Load a checkpoint from `save` or `snapshot`, written by any number of ranks at any ZeRO stage.

        Fills `averages` in place. Returns the client state. All ranks must call it together.

        Raises:
            Damaged: as `read_state`.
        """
        saved = open_state(url)
        self.read_state(saved, averages)
        return self.start_from(saved)

    def read_state(self, saved: SavedState, averages: Mapping[str, Tensor] | None = None) -> list[str]:
        """Read this rank's part of a checkpoint: each file that holds some of it once. Ranks don't communicate, so that all of
        them can agree on another checkpoint if one of them finds damage. Without damage, `start_from` must follow.

        Fills `averages` in place. Returns the names of the files that were verified.

        Raises:
            Damaged: files are missing or damaged, or belong to another model.
        """
        return self._state.read(saved, averages or {})

    def start_from(self, saved: SavedState) -> dict[str, Any]:
        """Call on all ranks after `read_state`, to go on from what was read. Returns the client state."""
        self._state.start_from(saved)
        self.refresh_gathered_parameters()
        return saved.state["client"]

    def _other_fragments(self) -> list[Fragment]:
        return list(self.masterless.fragments()) if self.masterless else []


@contextmanager
def _evaluating(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    engine.eval()
    try:
        yield
    finally:
        engine.train()
