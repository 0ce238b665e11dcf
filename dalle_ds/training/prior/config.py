"""What a prior training run is: the tree behind a recipe file."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

import dalle_ds
from dalle_ds.data.manifest import DatasetInfo, Split
from dalle_ds.data.token_mix import TokenMix
from dalle_ds.data.tokens import BPE_DROPOUT
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.presets import PRESETS
from dalle_ds.models.prior import PriorConfig
from dalle_ds.ops.attention.backends import BackendName
from dalle_ds.optim.adamw import Master, Moments
from dalle_ds.optim.ema import PriorEMAConfig
from dalle_ds.optim.learning_rate import LearningRateConfig
from dalle_ds.parallel.replicas.groups import ReplicasConfig
from dalle_ds.recipes import Config
from dalle_ds.storage.disk_cache import DiskCache
from dalle_ds.storage.names import DATASET_FILE
from dalle_ds.tracking.config import TrackingConfig


class PriorModelConfig(Config):
    """A preset, and what differs from it. Grid and vocabularies follow from the data; set here, they must agree with it."""

    preset: Literal["tiny", "0.3b", "1.2b", "2.8b", "5.6b", "12b"] = "12b"
    n_layers: int | None = Field(None, ge=1)
    n_heads: int | None = Field(None, ge=1)
    d_head: int | None = Field(None, ge=1)
    text_len: int | None = Field(None, ge=1)
    conv_kernel: int | None = Field(None, ge=1)
    grid: int | None = Field(None, ge=1)
    vocab_size: int | None = Field(None, ge=1)
    n_codes: int | None = Field(None, ge=1)

    def resolve(self, data: DatasetInfo, vocab_size: int, source: str) -> PriorConfig:
        """The geometry for the data set at `source`. Raises ConfigError where recipe and data disagree."""
        from_data = {"grid": data.grid, "n_codes": data.n_codes, "vocab_size": vocab_size}
        for key, found in from_data.items():
            wanted = getattr(self, key)
            if wanted is not None and wanted != found:
                raise ConfigError(f"the recipe's model.{key} is {wanted}, but the data set {source} has {found}")
        return PriorConfig(**{**self.on_paper().model_dump(), **from_data})

    def on_paper(self) -> PriorConfig:
        """The geometry before any data is seen: grid and vocabularies that are not set are the preset's."""
        own = {key: value for key, value in self.model_dump(exclude={"preset"}).items() if value is not None}
        return PriorConfig(**{**PRESETS[self.preset].model_dump(), **own})


class DataShareConfig(Config):
    """A data set of a mix."""

    dataset: str = Field(description="root of a token data set: a path or s3:// url")
    weight: float = Field(gt=0, description="its part of the samples, as against the other sets' weights")


class CacheConfig(Config):
    """Blocks of s3:// data sets on a disk of each machine, shared by its ranks, those used least recently removed."""

    folder: str = Field(pattern="^[^:]+$", description="a path, no url; of each machine")
    gib: float = Field(gt=0, description="bound of its size")


class PriorDataConfig(Config):
    """One `dataset`, or several in a `mix`."""

    dataset: str | None = Field(None, description="root of a token data set: a path or s3:// url")
    mix: list[DataShareConfig] = Field([], description="several, each by its weight")
    dvae: str | None = Field(None, description="fingerprint that the data's dVAE must have; unset: any")
    tokenizer: str | None = Field(None, description="fingerprint that the data's tokenizer must have; unset: any")
    bpe_dropout: float = Field(BPE_DROPOUT, ge=0, lt=1)
    caption_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of training captions left out, for classifier-free guidance; the paper has none"
    )
    prefetch: int = Field(2, ge=1, description="global batches read ahead")
    cache: CacheConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> "PriorDataConfig":
        if (self.dataset is None) == (not self.mix):
            raise ValueError("expected either `dataset`, or `mix` with a list of {dataset, weight}")
        return self

    @property
    def shares(self) -> list[DataShareConfig]:
        """The data sets, one or many."""
        return self.mix or [DataShareConfig(dataset=str(self.dataset), weight=1.0)]

    @property
    def sources(self) -> str:
        """The data sets and their weights, for people."""
        return self.dataset or " + ".join(f"{share.weight:g} * {share.dataset}" for share in self.mix)

    def open(self, split: Split) -> TokenMix:
        """The data sets, checked against each other."""
        disk = DiskCache(self.cache.folder, int(self.cache.gib * 2**30)) if self.cache else None
        return TokenMix.open([(share.dataset, share.weight) for share in self.shares], split, disk)


class PriorOptimizerConfig(Config):
    """AdamW; the defaults are the paper's (appendix B.2). Note beta2 = 0.96 and weight decay 0.045."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.96, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(4.5e-2, ge=0)
    clip: float = Field(4.0, gt=0, description="global gradient norm")
    moments: Moments = Field(
        "fp32",
        description="low_bit: of the layers' matrices 16 bits each (1-6-9, 0-6-10), variance clipped at 5, as the paper has it",
    )
    master: Master = Field(
        "fp32",
        description="none: the layers' matrices are fp16, rounded stochastically, and their gradients 1-6-9, as in the paper: "
        "with moments low_bit, which it needs, 8 bytes a parameter instead of 16",
    )


class PriorCheckpointConfig(Config):
    folder: str | None = Field(
        None, description="a path that all ranks share, or s3://, and then they need share nothing else; unset: in the run's"
    )
    every: int = Field(1000, ge=1, description="updates between checkpoints")
    keep: int = Field(2, ge=1)
    background: bool = Field(True, description="write while training goes on; takes CPU memory for a copy of the state")


class PriorValidationConfig(Config):
    every: int = Field(1000, ge=1, description="updates between validations")
    samples: int | None = Field(8192, ge=1, description="validation samples at most; null: all")


class PriorTrackingConfig(TrackingConfig):
    run_name: str = "prior"
    every: int = Field(10, ge=1, description="updates between metrics")
    samples_every: int | None = Field(
        None,
        ge=1,
        description="updates between sheets of samples for validation captions, drawn by the main rank from a whole "
        "copy of the model while the others wait: for small ones; unset: none",
    )
    profile_every: int = Field(500, ge=1, description="updates between those in which the time of collectives is measured")
    peak_tflops: float | None = Field(
        None, gt=0, description="16-bit peak of one device, for MFU; unset: known for common GPUs, else no MFU"
    )


class PriorFailureConfig(Config):
    """When a run ends rather than going on, or waiting, for nothing."""

    collective_timeout: float = Field(
        1800, gt=0, description="seconds that ranks wait for one of them, be it for its data, or for the main rank's disk"
    )
    nonfinite_losses: int = Field(20, ge=1, description="updates in a row whose loss is Inf or NaN, until a diagnosis")
    updates_without_step: int = Field(
        1500,
        ge=1,
        description="such updates in a row, of all blocks or of one, until a diagnosis; the paper's policy lowers a gradient "
        "scale once in 125 updates by sqrt(2), so that 1500 bring it from its start, 2^13, to its floor, 2^7",
    )


class PriorRunConfig(Config):
    """One training job of the prior over all its nodes and restarts; the defaults are the paper's."""

    section: ClassVar = "prior"
    folder: str = Field(description="checkpoints, logs and the merged recipe go here")
    deepspeed_config: str = Field(
        "ds_configs/zero3_fp16.json", description="DeepSpeed JSON: a path, looked for here and then in the project's own folder"
    )
    updates: int = Field(430_000, ge=1)
    global_batch: int = Field(1024, ge=1)
    micro_batch: int = Field(1, ge=1, description="samples a rank takes at a time, at most its share of the global batch")
    seed: int = 0
    attention: Literal["auto", BackendName] = Field(
        "auto", description="backend; auto: flex on CUDA, structured on CPUs, or dense where these can't run"
    )
    activation_checkpointing: bool | Annotated[int, Field(ge=1)] = Field(
        True, description="recompute each layer in the backward pass, or with a number k every k-th one"
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

    @model_validator(mode="after")
    def _check(self) -> "PriorRunConfig":
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        return self

    def require_default_inputs(self, recipe: Path) -> None:
        """Of the project's own recipe, read where none was named. Raises DataError where the demo has not made its data yet."""
        dataset = self.data.dataset
        if dataset and "://" not in dataset and not Path(dataset, DATASET_FILE).exists():
            raise DataError(
                f"no token data set at {dataset} (from {recipe}): `bash launchers/demo.sh` makes it, or name your recipe"
            )

    @property
    def deepspeed_path(self) -> Path:
        """Where the DeepSpeed JSON is, so that recipes of the project work from any folder."""
        here = Path(self.deepspeed_config)
        ours = Path(dalle_ds.__file__).resolve().parents[1] / here
        return ours if not here.exists() and ours.exists() else here

    @property
    def checkpoint_folder(self) -> str:
        return self.checkpoint.folder or f"{self.folder}/checkpoints"

    def on_ranks(self, world_size: int) -> "PriorRunConfig":
        """With a micro-batch no larger than a rank's share of the global batch: a recipe for one GPU starts on eight."""
        share, left = divmod(self.global_batch, world_size)
        return self if left or share >= self.micro_batch else self.model_copy(update={"micro_batch": share})

    def accumulation(self, world_size: int) -> int:
        """Micro-batches a rank takes for one update. Raises ConfigError where the batch does not divide among the ranks."""
        per_pass = self.micro_batch * world_size
        if self.global_batch % per_pass:
            raise ConfigError(
                f"global_batch {self.global_batch} is not a multiple of "
                f"micro_batch {self.micro_batch} x {world_size} ranks = {per_pass}"
            )
        return self.global_batch // per_pass
