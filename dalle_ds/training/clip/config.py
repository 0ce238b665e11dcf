"""What a training run of a small CLIP is: the tree behind a recipe file."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dalle_ds.optim.schedules import half_cosine, linear_warmup
from dalle_ds.recipes import VALIDATION_FRACTION, Config
from dalle_ds.tracking.config import TrackingConfig


class ClipDataConfig(Config):
    """Raw shards, in memory as a whole."""

    raw: str = Field(description="root of raw shards: a path or s3:// url")
    validation_fraction: float = Field(
        VALIDATION_FRACTION, gt=0, lt=1, description="share of the groups that no stage trains on"
    )
    fold: int = Field(0, ge=0, description="of `folds` parts of the training images, by hash of the group, the one to learn")
    folds: int = Field(1, ge=1, description="several models that have no image in common can judge each other's choices")

    @model_validator(mode="after")
    def _check(self) -> "ClipDataConfig":
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds}: expected 0 to {self.folds - 1}")
        return self


class ClipModelConfig(Config):
    """Two small transformers of one width."""

    image_size: int = Field(32, ge=8, description="pixels a side; other images are resized to it")
    patch_size: int = Field(8, ge=1)
    width: int = Field(128, ge=8)
    heads: int = Field(4, ge=1)
    image_layers: int = Field(4, ge=1)
    text_layers: int = Field(2, ge=1)
    text_len: int = Field(32, ge=3, description="tokens of a caption at most, with its two marks")
    vocab_size: int = Field(2048, ge=514, description="tokens at most: 512 of bytes, two marks, merges")
    n_features: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "ClipModelConfig":
        if self.image_size % self.patch_size or self.width % self.heads:
            raise ValueError(
                f"patch_size {self.patch_size} must divide image_size {self.image_size}, "
                f"and heads {self.heads} must divide width {self.width}"
            )
        return self


class ClipOptimizerConfig(Config):
    weight_decay: float = Field(0.2, ge=0, description="of matrices, as CLIP")
    beta2: float = Field(0.98, ge=0, lt=1)
    clip: float = Field(1.0, gt=0, description="global gradient norm")


class ClipLearningRateConfig(Config):
    """A half cosine from `peak` to 0 over the run, times a linear warm-up."""

    peak: float = Field(1e-3, gt=0)
    warmup_updates: int = Field(50, ge=0, description="updates of the linear warm-up")

    def at(self, update: int, n_updates: int) -> float:
        """Rate for the update of that number (from 0) in a run of `n_updates`."""
        return half_cosine(update, self.peak, 0.0, n_updates) * linear_warmup(update, self.warmup_updates)


class ClipCheckpointConfig(Config):
    every: int = Field(200, ge=1, description="updates between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")


class ClipValidationConfig(Config):
    every: int = Field(200, ge=1, description="updates between validations")
    samples: int = Field(512, ge=1, description="validation images at most")


class ClipTrackingConfig(TrackingConfig):
    run_name: str = "clip"
    every: int = Field(20, ge=1, description="updates between metrics")


class ClipRunConfig(Config):
    """One training job of a CLIP over all its restarts."""

    section: ClassVar = "clip"
    folder: str = Field(description="checkpoint, model, report and the merged recipe go here")
    data: ClipDataConfig
    model: ClipModelConfig = ClipModelConfig()
    optimizer: ClipOptimizerConfig = ClipOptimizerConfig()
    learning_rate: ClipLearningRateConfig = ClipLearningRateConfig()
    updates: int = Field(2000, ge=1)
    global_batch: int = Field(128, ge=2, description="images, each the others' wrong answer")
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    threads: int | None = Field(None, ge=1, description="CPU threads inside one operation; unset: torch's choice")
    seed: int = 0
    checkpoint: ClipCheckpointConfig = ClipCheckpointConfig()
    validation: ClipValidationConfig = ClipValidationConfig()
    tracking: ClipTrackingConfig = ClipTrackingConfig()
