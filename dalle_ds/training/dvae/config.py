"""Recipe schema of a dVAE training run. The defaults are the paper's (section 2.1 and appendix A)."""

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dalle_ds.errors import ConfigError
from dalle_ds.models.dvae import DVAEConfig
from dalle_ds.optim.ema import EMAConfig
from dalle_ds.optim.schedules import HalfCosineConfig, half_cosine, linear_warmup
from dalle_ds.recipes import DEVICE, VALIDATION_FRACTION, Config, OutFolder, Seed
from dalle_ds.tracking.config import TrackingConfig
from dalle_ds.training.dvae.codebook_start import CodebookStartConfig
from dalle_ds.training.dvae.codebook_watch import CollapseConfig
from dalle_ds.training.fields import (
    CheckpointEvery,
    CheckpointsKept,
    MetricsEvery,
    RawShards,
    UpdatesWithoutStep,
    ValidationEvery,
    ValidationFraction,
    ValidationImages,
)


class DVAEDataConfig(Config):
    """Source of the images, memory for them, and augmentation."""

    raw: RawShards
    validation_fraction: ValidationFraction = VALIDATION_FRACTION
    window_mb: int = Field(
        2048,
        ge=1,
        description="MiB of encoded images among which a batch is drawn. If all shards fit, every rank holds them; else each "
        "micro-batch has its share, and a rank holds the shares of its micro-batches twice",
    )
    decoded_mb: int = Field(
        2048, ge=0, description="MiB of decoded images cached per rank, if all shards fit in one window; otherwise unused"
    )
    min_zoom: float = Field(9 / 8, ge=1, description="random resize before the crop: smallest multiple of image_size")
    max_zoom: float = Field(12 / 8, ge=1, description="random resize before the crop: largest multiple of image_size")
    prefetch: int = Field(4, ge=1, le=1024, description="batches prepared in advance")
    decoders: int = Field(
        2, ge=0, le=1024, description="processes per rank that decode images beyond decoded_mb; 0: a thread of the trainer does"
    )

    @model_validator(mode="after")
    def _check(self) -> "DVAEDataConfig":
        if self.max_zoom < self.min_zoom:
            raise ValueError(f"max_zoom {self.max_zoom} is below min_zoom {self.min_zoom}")
        return self


class DVAEOptimizerConfig(Config):
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the gradient's mean; the paper's")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the squared gradient's mean; the paper's")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment; the paper's")
    weight_decay: float = Field(1e-4, ge=0, description="of all parameters; the paper's")
    clip: float | None = Field(
        None, gt=0, description="gradient clipping: maximum global norm; unset: off (the paper names none for the dVAE)"
    )


class DVAEScheduleConfig(Config):
    """Half cosines over updates. Each value then stays at its end."""

    tau: HalfCosineConfig = HalfCosineConfig(start=1.0, end=1 / 16, updates=150_000)
    kl_weight: HalfCosineConfig = HalfCosineConfig(start=0.0, end=6.6, updates=5_000)


class DVAELearningRateConfig(Config):
    """A half cosine from `peak` to `final`, multiplied by a linear warm-up."""

    peak: float = Field(1e-4, gt=0, description="learning rate at the start of the half cosine; the paper's")
    final: float = Field(1.25e-6, ge=0, description="learning rate after the half cosine")
    decay_updates: int = Field(1_200_000, ge=0, description="updates of the half cosine, warm-up included")
    warmup_updates: int = Field(0, ge=0, description="updates of the linear warm-up; the paper names none")

    def at(self, update: int) -> float:
        """Learning rate of update number `update`, counted from 0."""
        return half_cosine(update, self.peak, self.final, self.decay_updates) * linear_warmup(update, self.warmup_updates)


class DVAELossConfig(Config):
    """Changes to the paper's loss for short runs. The defaults change nothing."""

    ln_b_min: float | None = Field(
        None,
        description="lower limit of ln b; unset: none. Without a limit, large uniform areas shrink b until they dominate "
        "the gradient",
    )
    usage_weight: float = Field(
        0.0,
        ge=0,
        description="weight, in units of kl_weight, of KL(mean of q over the micro-batch || uniform), which keeps codes in use",
    )


class DVAECheckpointConfig(Config):
    every: CheckpointEvery = 2000
    keep: CheckpointsKept = 2


class DVAEValidationConfig(Config):
    every: ValidationEvery = 5000
    samples: ValidationImages = 4096


class DVAETrackingConfig(TrackingConfig):
    run_name: str = Field("dvae", description="name of the MLflow run")
    every: MetricsEvery = 50


class DVAEFailureConfig(Config):
    collective_timeout: float = Field(
        1800,
        gt=0,
        description="seconds that a collective may wait for a rank: for its batch, or at the first start for the main rank, "
        "which lists the raw shards",
    )
    updates_without_step: UpdatesWithoutStep = 100


class DVAERunConfig(Config):
    """One training run of the dVAE, with all its restarts."""

    section: ClassVar = "dvae"
    folder: OutFolder = Field(description="run folder: checkpoints, weights, report and the merged recipe")
    data: DVAEDataConfig
    model: DVAEConfig = DVAEConfig()
    optimizer: DVAEOptimizerConfig = DVAEOptimizerConfig()
    codebook_start: CodebookStartConfig = CodebookStartConfig()
    collapse: CollapseConfig = CollapseConfig()
    schedules: DVAEScheduleConfig = DVAEScheduleConfig()
    learning_rate: DVAELearningRateConfig = DVAELearningRateConfig()
    loss: DVAELossConfig = DVAELossConfig()
    ema: EMAConfig = EMAConfig()
    updates: int = Field(3_000_000, ge=1, description="updates of the run; the paper's")
    global_batch: int = Field(512, ge=1, description="images per update, of all ranks together; the paper's")
    micro_batch: int | None = Field(
        None, ge=1, description="images per forward pass; unset: global_batch. Micro-batches are distributed over the ranks"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp16", description="fp16 needs CUDA and uses one loss scale, as in the paper"
    )
    device: str = Field("auto", description=DEVICE)
    workers: int = Field(1, ge=1, le=1024, description="threads that process micro-batches of an update in parallel; for CPUs")
    threads: int | None = Field(None, ge=1, description="CPU threads inside one operation; unset: PyTorch's default")
    seed: Seed = Field(0, description="seed of the initial weights, the order and crops of the images, and the Gumbel noise")
    checkpoint: DVAECheckpointConfig = DVAECheckpointConfig()
    validation: DVAEValidationConfig = DVAEValidationConfig()
    tracking: DVAETrackingConfig = DVAETrackingConfig()
    failure: DVAEFailureConfig = DVAEFailureConfig()

    @property
    def part_size(self) -> int:
        """Images of a part. A part is one micro-batch, or the whole batch if `micro_batch` is unset."""
        return self.micro_batch or self.global_batch

    @property
    def n_parts(self) -> int:
        """Number of parts in the batch of an update. Their losses are averaged."""
        return self.global_batch // self.part_size

    @property
    def first_loss_scale(self) -> float:
        """Loss scale at which fp16 training starts: 2^24 for the paper's batch and images.

        The loss is divided by the sub-pixels and by all images of the batch before the backward pass, so the scale multiplies
        by both, up to a constant. PyTorch's 2^16 would turn most gradients of the encoder's branches into 0 until growth by 2
        every 2000 updates has made up for it, while a scale that is too large costs one skipped update per factor of 2.
        """
        n_subpixels = self.model.in_channels * self.model.image_size**2
        return 2.0 ** round(math.log2(self.global_batch * n_subpixels / 8))

    def n_relaxed(self, update: int) -> int:
        """Updates with relaxed codes after `update` updates; negative during the updates of `codebook_start`."""
        return update - self.codebook_start.updates

    def parts_of(self, rank: int, world_size: int) -> range:
        """The parts of every batch that a rank processes. Raises ConfigError if the parts do not divide among the ranks."""
        n_of_each, left = divmod(self.n_parts, world_size)
        if left:
            raise ConfigError(
                f"global_batch {self.global_batch} in parts of micro_batch {self.part_size} is {self.n_parts} parts, "
                f"expected a multiple of the {world_size} ranks"
            )
        return range(rank * n_of_each, (rank + 1) * n_of_each)

    @model_validator(mode="after")
    def _check(self) -> "DVAERunConfig":
        if self.model.image_size < 11:
            raise ValueError(f"model.image_size is {self.model.image_size}, expected at least 11, the window of SSIM")
        if self.global_batch % self.part_size:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        self.codebook_start.check(self.model.n_features, self.model.n_codes, self.updates)
        return self
