"""Recipe schema of a training run of a small CLIP."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dalle_ds.optim.schedules import half_cosine, linear_warmup
from dalle_ds.recipes import DEVICE, VALIDATION_FRACTION, Config, OutFolder, Place
from dalle_ds.tracking.config import TrackingConfig
from dalle_ds.training.fields import CheckpointEvery, CheckpointsKept, MetricsEvery, ValidationEvery, ValidationImages


class ClipDataConfig(Config):
    """Source of the images, which are all held in memory."""

    raw: Place = Field(description="root of raw shards: a path or s3:// url")
    validation_fraction: float = Field(
        VALIDATION_FRACTION, gt=0, lt=1, description="fraction of the groups in the validation split, which no stage trains on"
    )
    fold: int = Field(0, ge=0, description="index of the fold to train on; the hash of its group assigns an image to a fold")
    folds: int = Field(
        1,
        ge=1,
        description="number of disjoint folds of the training images; a model of one fold can evaluate the reranking by a "
        "model of another, as they share no image",
    )

    @model_validator(mode="after")
    def _check(self) -> "ClipDataConfig":
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds}: expected 0 to {self.folds - 1}")
        return self


class ClipModelConfig(Config):
    """Two small transformers of the same width."""

    image_size: int = Field(32, ge=8, description="width and height in pixels, to which images are resized")
    patch_size: int = Field(8, ge=1, description="width and height of a patch in pixels")
    width: int = Field(128, ge=8, description="width of both transformers")
    n_heads: int = Field(4, ge=1, description="attention heads of both transformers")
    n_image_layers: int = Field(4, ge=1, description="layers of the image transformer")
    n_text_layers: int = Field(2, ge=1, description="layers of the text transformer")
    text_len: int = Field(32, ge=3, description="maximum tokens in a caption, start and end token included")
    vocab_size: int = Field(2048, ge=514, description="maximum vocabulary: 512 byte tokens, start and end token, merges")
    n_features: int = Field(64, ge=1, description="size of the vectors whose cosine similarity is the score")

    @model_validator(mode="after")
    def _check(self) -> "ClipModelConfig":
        if self.image_size % self.patch_size or self.width % self.n_heads:
            raise ValueError(
                f"patch_size {self.patch_size} must divide image_size {self.image_size}, "
                f"and n_heads {self.n_heads} must divide width {self.width}"
            )
        return self


class ClipOptimizerConfig(Config):
    weight_decay: float = Field(0.2, ge=0, description="applied to matrices only, as in CLIP")
    beta2: float = Field(0.98, ge=0, lt=1, description="AdamW's decay of the squared gradient's mean; CLIP's")
    clip: float = Field(1.0, gt=0, description="gradient clipping: maximum global norm")


class ClipLearningRateConfig(Config):
    """A half cosine from `peak` to 0 over the run, multiplied by a linear warm-up."""

    peak: float = Field(1e-3, gt=0, description="learning rate after the warm-up")
    warmup_updates: int = Field(50, ge=0, description="updates of the linear warm-up")

    def at(self, update: int, n_updates: int) -> float:
        """Learning rate of update number `update`, counted from 0, in a run of `n_updates`."""
        return half_cosine(update, self.peak, 0.0, n_updates) * linear_warmup(update, self.warmup_updates)


class ClipCheckpointConfig(Config):
    every: CheckpointEvery = 200
    keep: CheckpointsKept = 2


class ClipValidationConfig(Config):
    every: ValidationEvery = 200
    samples: ValidationImages = 512


class ClipTrackingConfig(TrackingConfig):
    run_name: str = Field("clip", description="name of the MLflow run")
    every: MetricsEvery = 20


class ClipRunConfig(Config):
    """One training run of a CLIP, with all its restarts."""

    section: ClassVar = "clip"
    folder: OutFolder = Field(description="run folder: checkpoints, model, report and the merged recipe")
    data: ClipDataConfig
    model: ClipModelConfig = ClipModelConfig()
    optimizer: ClipOptimizerConfig = ClipOptimizerConfig()
    learning_rate: ClipLearningRateConfig = ClipLearningRateConfig()
    updates: int = Field(2000, ge=1, description="updates of the run")
    global_batch: int = Field(
        128, ge=2, description="image-caption pairs per update; the other pairs of a batch are the negatives"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast")
    device: str = Field("auto", description=DEVICE)
    threads: int | None = Field(None, ge=1, description="CPU threads inside one operation; unset: PyTorch's default")
    seed: int = Field(0, description="seed of the initial weights, and of the images and captions of each batch")
    checkpoint: ClipCheckpointConfig = ClipCheckpointConfig()
    validation: ClipValidationConfig = ClipValidationConfig()
    tracking: ClipTrackingConfig = ClipTrackingConfig()
