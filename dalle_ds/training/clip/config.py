"""Recipe schema of a training run of a small CLIP."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dalle_ds.optim.schedules import half_cosine, linear_warmup
from dalle_ds.recipes import DEVICE, VALIDATION_FRACTION, Config, OutFolder, Seed
from dalle_ds.tracking.config import TrackingConfig
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


class ClipDataConfig(Config):
    """Source of the images, and memory for them."""

    raw: RawShards
    validation_fraction: ValidationFraction = VALIDATION_FRACTION
    window_mb: int = Field(
        2048,
        ge=1,
        description="MiB of encoded images. If all shards fit, every rank holds the decoded images; larger sets are streamed, "
        "and a batch is drawn among so many",
    )
    streams: int = Field(
        8, ge=1, description="streams into which a larger set is divided: they divide global_batch, and ranks divide them"
    )
    decoders: int = Field(
        2, ge=0, le=1024, description="processes per rank that decode streamed images; 0: a thread of the trainer"
    )
    fold: int = Field(0, ge=0, description="index of the fold to train on; the hash of its group assigns an image to a fold")
    folds: int = Field(
        1,
        ge=1,
        description="number of disjoint folds of the training images; a model of one fold can evaluate the reranking by a "
        "model of another, as they share no image",
    )
    damaged_copies: bool = Field(
        False,
        description="true: a damaged copy of every image is a further negative of its caption, so that CLIP learns to tell a "
        "flawed sample from a right one; the paper's CLIP has none",
    )

    @model_validator(mode="after")
    def _check(self) -> "ClipDataConfig":
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds}: expected 0 to {self.folds - 1}")
        return self


class ClipModelConfig(Config):
    """Two small transformers of the same width."""

    image_size: int = Field(32, ge=8, le=2**12, description="width and height in pixels, to which images are resized")
    patch_size: int = Field(8, ge=1, description="width and height of a patch in pixels")
    width: int = Field(128, ge=8, le=2**14, description="width of both transformers")
    n_heads: int = Field(4, ge=1, description="attention heads of both transformers")
    n_image_layers: int = Field(4, ge=1, le=1024, description="layers of the image transformer")
    n_text_layers: int = Field(2, ge=1, le=1024, description="layers of the text transformer")
    text_len: int = Field(32, ge=3, le=2**16, description="maximum tokens in a caption, start and end token included")
    vocab_size: int = Field(
        2048, ge=514, le=2**24, description="maximum vocabulary: 512 byte tokens, start and end token, merges"
    )
    n_features: int = Field(64, ge=1, le=2**16, description="size of the vectors whose cosine similarity is the score")

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


class ClipFailureConfig(Config):
    collective_timeout: float = Field(1800, gt=0, description="seconds that a collective may wait for a rank")
    updates_without_step: UpdatesWithoutStep = 100


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
    seed: Seed = Field(0, description="seed of the initial weights, and of the images and captions of each batch")
    checkpoint: ClipCheckpointConfig = ClipCheckpointConfig()
    validation: ClipValidationConfig = ClipValidationConfig()
    tracking: ClipTrackingConfig = ClipTrackingConfig()
    failure: ClipFailureConfig = ClipFailureConfig()
