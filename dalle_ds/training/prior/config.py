"""Recipe schema of a prior training run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dalle_ds import project_files
from dalle_ds.data.manifest import DatasetInfo, Split
from dalle_ds.data.tokens.batches import BPE_DROPOUT
from dalle_ds.data.tokens.dataset_files import DatasetFiles
from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.presets import PRESETS
from dalle_ds.models.prior import PriorConfig
from dalle_ds.ops.attention.backends import BackendName
from dalle_ds.optim.adamw import VARIANCE_CLIP, Master, Moments
from dalle_ds.optim.ema import PriorEMAConfig
from dalle_ds.optim.learning_rate import LearningRateConfig
from dalle_ds.parallel.replicas.groups import ReplicasConfig
from dalle_ds.recipes import Config, OptionalOutFolder, OptionalPlace, OutFolder, Place, Seed, from_values
from dalle_ds.sampling.settings import PriorSamplingConfig
from dalle_ds.storage.disk_cache import DiskCache
from dalle_ds.storage.names import DATASET_FILE
from dalle_ds.tracking.config import TrackingConfig
from dalle_ds.training.fields import CheckpointEvery, CheckpointsKept, MetricsEvery, ValidationEvery


class PriorModelConfig(Config):
    """A preset, and overrides of its values. The data set determines grid and vocabularies; if set here, they must agree."""

    preset: Literal["tiny", "0.3b", "1.2b", "2.8b", "5.6b", "12b"] = Field(
        "12b", description="named size, whose values the other keys replace; the paper's model is 12b"
    )
    n_layers: int | None = Field(None, ge=1, description="layers, each of an attention and an MLP residual block (12b: 64)")
    n_heads: int | None = Field(None, ge=1, description="attention heads; the model width is n_heads * d_head (12b: 62)")
    d_head: int | None = Field(None, ge=1, description="width of a head (the paper: 64)")
    text_len: int | None = Field(None, ge=1, description="text slots, including start-of-text (the paper: 256)")
    conv_kernel: int | None = Field(None, ge=1, description="side of the last layer's attention window, odd (the paper: 11)")
    grid: int | None = Field(None, ge=1, description="image tokens along one side; unset: the data set's (the paper: 32)")
    vocab_size: int | None = Field(None, ge=1, description="text vocabulary; unset: the data set's (the paper: 16,384)")
    n_codes: int | None = Field(None, ge=1, description="codes of the codebook; unset: the data set's (the paper: 8192)")
    embedding_std: float | None = Field(
        None,
        gt=0,
        description="standard deviation of the first embeddings (the paper names none; 12b: 0.02). Near 1, small models in "
        "short runs learn from half of the samples",
    )
    position_init: Literal["normal", "fourier"] | None = Field(
        None,
        description="first positions (the paper names none; 12b: normal): unrelated normal numbers, or waves of random "
        "frequencies, with which small models in short runs bind words sooner",
    )

    def resolve(self, data: DatasetInfo, vocab_size: int, source: str) -> PriorConfig:
        """The model's geometry for the data set at `source`. Raises ConfigError if recipe and data disagree."""
        from_data = {"grid": data.grid, "n_codes": data.n_codes, "vocab_size": vocab_size}
        for key, found in from_data.items():
            wanted = getattr(self, key)
            if wanted is not None and wanted != found:
                raise ConfigError(f"the recipe's model.{key} is {wanted}, but the data set {source} has {found}")
        return from_values(PriorConfig, {**self.on_paper().model_dump(), **from_data}, "the recipe's model with its data set")

    def on_paper(self) -> PriorConfig:
        """The model's geometry without a data set: grid and vocabularies that are not set come from the preset."""
        own = {key: value for key, value in self.model_dump(exclude={"preset"}).items() if value is not None}
        return from_values(PriorConfig, {**PRESETS[self.preset].model_dump(), **own}, "the recipe's model")


class DataShareConfig(Config):
    """One data set of a mix."""

    dataset: Place = Field(description="root of a token data set: a path or s3:// url")
    weight: float = Field(gt=0, description="fraction of the samples drawn from this data set is weight / sum of the weights")


class CacheConfig(Config):
    """Local disk cache for blocks of s3:// data sets. The ranks of a machine share it; the least recently used are deleted."""

    folder: OutFolder = Field(pattern="^[^:]+$", description="path on a local disk of each machine; not a url")
    gib: float = Field(gt=0, description="maximum size in GiB")


class PriorDataConfig(Config):
    """Either one `dataset` or a `mix` of several."""

    dataset: OptionalPlace = Field(None, description="root of a token data set: a path or s3:// url")
    mix: list[DataShareConfig] = Field([], description="several data sets, sampled by weight; instead of `dataset`")
    dvae: str | None = Field(None, description="fingerprint that the data's dVAE must have; unset: any")
    tokenizer: str | None = Field(None, description="fingerprint that the data's tokenizer must have; unset: any")
    bpe_dropout: float = Field(
        BPE_DROPOUT, ge=0, lt=1, description="probability of skipping a merge when a training caption is tokenized; the paper's"
    )
    caption_dropout: float = Field(
        0.0, ge=0, lt=1, description="fraction of training captions dropped, for classifier-free guidance; the paper drops none"
    )
    prefetch: int = Field(2, ge=1, le=1024, description="global batches to prefetch")
    cache: CacheConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> "PriorDataConfig":
        if (self.dataset is None) == (not self.mix):
            raise ValueError("expected either `dataset`, or `mix` with a list of {dataset, weight}")
        return self

    @property
    def shares(self) -> list[DataShareConfig]:
        """The data sets with their weights; a single `dataset` has weight 1."""
        return self.mix or [DataShareConfig(dataset=str(self.dataset), weight=1.0)]

    @property
    def sources(self) -> str:
        """The data sets and their weights as text for display."""
        return self.dataset or " + ".join(f"{share.weight:g} * {share.dataset}" for share in self.mix)

    def read(self) -> list[DatasetFiles]:
        """Read the files of the data sets. One rank does it for all."""
        return [DatasetFiles.read(share.dataset) for share in self.shares]

    def open(self, files: Sequence[DatasetFiles], split: Split) -> TokenMix:
        """Open a split of the data sets and check that they match each other (see `TokenMix` for the errors)."""
        disk = DiskCache(self.cache.folder, int(self.cache.gib * 2**30)) if self.cache else None
        shares = [(of_set, share.weight) for of_set, share in zip(files, self.shares, strict=True)]
        return TokenMix.open(shares, split, disk)


class PriorOptimizerConfig(Config):
    """AdamW. The numbers are the paper's by default (appendix B.2). Note beta2 = 0.96 and weight decay 0.045."""

    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the gradient's mean; the paper's")
    beta2: float = Field(0.96, ge=0, lt=1, description="AdamW's decay of the squared gradient's mean; the paper's")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment; the paper's")
    weight_decay: float = Field(4.5e-2, ge=0, description="of matrices and unembeddings; the paper's")
    embedding_rate: float = Field(
        1.0,
        gt=0,
        description="learning rate of embeddings, positions, pads and unembeddings, relative to that of the other parameters. "
        "Small models learn more with about 3",
    )
    clip: float = Field(4.0, gt=0, description="gradient clipping: maximum global norm")
    variance_clip: float = Field(
        VARIANCE_CLIP, gt=0, le=7.99, description="maximum of the squared gradient's mean, before it is used; the paper's"
    )
    moments: Moments = Field(
        "fp32", description="low_bit: the layers' matrices have 16-bit moments (mean 1-6-9, variance 0-6-10), as in the paper"
    )
    master: Master = Field(
        "fp32",
        description="none: no fp32 master weights; the layers' matrices are fp16 with stochastic rounding and their gradients "
        "1-6-9, as in the paper. Needs moments low_bit; together 8 bytes per parameter instead of 16",
    )


class PriorCheckpointConfig(Config):
    folder: OptionalOutFolder = Field(
        None,
        description="a path on a file system that all ranks share, or an s3:// url, with which they need no shared file "
        "system; unset: checkpoints/ in the run folder",
    )
    every: CheckpointEvery = 1000
    keep: CheckpointsKept = 2
    background: bool = Field(True, description="write while training continues; needs CPU memory for a copy of the state")


class PriorValidationConfig(Config):
    every: ValidationEvery = 1000
    samples: int | None = Field(8192, ge=1, description="maximum number of validation samples; null: all")


class PriorTrackingConfig(TrackingConfig):
    run_name: str = Field("prior", description="name of the MLflow run")
    every: MetricsEvery = 10
    samples_every: int | None = Field(
        None,
        ge=1,
        description="updates between sample sheets for validation captions; unset: none. They are of temperature 0.8 without "
        "guidance, whatever `sampling` says. For small models only: the main rank generates them from a full copy of the "
        "model while the other ranks wait",
    )
    scene_captions: int = Field(
        0,
        ge=0,
        description="captions whose samples are judged beside each sample sheet, where the data are drawn scenes; 0: none. "
        "The metrics are scenes/seen/mean, scenes/zero_shot/mean, and those of the categories",
    )
    profile_every: int = Field(500, ge=1, description="updates between measurements of the time in collectives")
    peak_tflops: float | None = Field(
        None, gt=0, description="16-bit peak of one device, for MFU; unset: the known peak of common GPUs, otherwise no MFU"
    )


class PriorFailureConfig(Config):
    """When to give up: hung collectives, and updates that make no progress."""

    collective_timeout: float = Field(
        1800, gt=0, description="seconds that a collective may wait for a rank, e.g. for its data or for the main rank's disk"
    )
    nonfinite_losses: int = Field(
        20, ge=1, description="consecutive updates with a loss of Inf or NaN after which the run stops with a diagnosis"
    )
    updates_without_step: int = Field(
        1500,
        ge=1,
        description="consecutive updates without an optimizer step, of the model or of one residual block, after which the run "
        "stops with a diagnosis. The paper lowers a gradient scale by sqrt(2) at most every 125 updates: 1500 updates bring it "
        "from its start, 2^13, to its floor, 2^7",
    )


class PriorRunConfig(Config):
    """One training run of the prior, on all its nodes and with all its restarts.

    Model, batch and length are the paper's by default. The recipe 12b.yaml also sets its halvings of the learning rate, its
    16-bit moments and its PowerSGD, which are off by default. `training/prior/paper.py` has all its values.
    """

    section: ClassVar = "prior"
    folder: OutFolder = Field(description="run folder: checkpoints, logs and the merged recipe")
    deepspeed_config: str = Field(
        "ds_configs/zero3_fp16.json", description="DeepSpeed JSON: a path, or the name of a shipped file"
    )
    updates: int = Field(430_000, ge=1, description="updates of the run; the paper's")
    global_batch: int = Field(1024, ge=1, description="samples per update, of all ranks together; the paper's")
    micro_batch: int = Field(1, ge=1, description="samples per rank and forward pass; limited to global_batch / ranks")
    seed: Seed = Field(0, description="seed of the initial weights, the order of the samples, and BPE dropout")
    attention: Literal["auto", BackendName] = Field(
        "auto", description="backend; auto: flex on CUDA, structured on CPUs, dense if these are not available"
    )
    activation_checkpointing: bool | Annotated[int, Field(ge=1)] = Field(
        True, description="recompute the layers in the backward pass; a number k: only every k-th layer"
    )
    data: PriorDataConfig
    model: PriorModelConfig = PriorModelConfig()
    optimizer: PriorOptimizerConfig = PriorOptimizerConfig()
    learning_rate: LearningRateConfig = LearningRateConfig()
    ema: PriorEMAConfig = PriorEMAConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    checkpoint: PriorCheckpointConfig = PriorCheckpointConfig()
    validation: PriorValidationConfig = PriorValidationConfig()
    tracking: PriorTrackingConfig = PriorTrackingConfig()
    failure: PriorFailureConfig = PriorFailureConfig()
    sampling: PriorSamplingConfig = PriorSamplingConfig()

    @model_validator(mode="after")
    def _check(self) -> "PriorRunConfig":
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.sampling.guidance != 1 and self.data.caption_dropout == 0:
            raise ValueError(f"sampling.guidance {self.sampling.guidance:g} requires data.caption_dropout above 0, found 0")
        return self

    def require_default_inputs(self, recipe: Path) -> None:
        """Check the project's default `recipe`. Raises DataError if its data set, which the demo creates, does not exist."""
        dataset = self.data.dataset
        if dataset and "://" not in dataset and not Path(dataset, DATASET_FILE).exists():
            raise DataError(
                f"no token data set at {dataset} (from {recipe}): run `bash launchers/demo.sh` to create it, or pass your own "
                "recipe"
            )

    @property
    def deepspeed_path(self) -> Path:
        """Path of the DeepSpeed JSON in the working folder, else of the shipped file of that name."""
        return project_files.here_or_shipped(self.deepspeed_config)

    @property
    def checkpoint_folder(self) -> str:
        return self.checkpoint.folder or f"{self.folder}/checkpoints"

    def on_ranks(self, world_size: int) -> "PriorRunConfig":
        """Limit the micro-batch to a rank's share of the global batch, so that a recipe for one GPU also runs on eight."""
        share, left = divmod(self.global_batch, world_size)
        return self if left or share >= self.micro_batch else self.model_copy(update={"micro_batch": share})

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and update. Raises ConfigError if micro_batch * world_size does not divide global_batch."""
        per_pass = self.micro_batch * world_size
        if self.global_batch % per_pass:
            raise ConfigError(
                f"global_batch {self.global_batch} is not a multiple of "
                f"micro_batch {self.micro_batch} x {world_size} ranks = {per_pass}"
            )
        return self.global_batch // per_pass
