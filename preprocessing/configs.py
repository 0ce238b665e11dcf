"""Config classes of the stages: sections of a recipe and options of `dalle-ds data VERB`. Imports no heavy package."""

from typing import ClassVar, Final, Literal

from pydantic import Field, field_validator, model_validator

from dalle_ds.recipes import (
    VALIDATION_FRACTION,
    Config,
    OptionalOutFile,
    OptionalPlace,
    OutFile,
    OutFolder,
    Place,
    Places,
    Seed,
)
from dalle_ds.scenes.vocabulary import GROUNDS

Engine = Literal["local", "ray"]
Precision = Literal["fp32", "bf16", "fp16"]
PAPER_SAMPLES: Final = 250_000_000
_LANGUAGES = "ar cs da de el en es fa fi fr he hi hu id it ja ko nl no pl pt ro ru sv th tr uk vi zh"
LANGUAGES: Final = tuple(_LANGUAGES.split(" "))
"""The most common languages on the web. Fewer candidates mean fewer classification errors on captions."""

ENGINE = "local: processes on this machine; ray: actors of a Ray cluster"
MACHINE = "number of this machine among those that fill one output, counted from 0 or from 1; each needs a number of its own"
MACHINES = "number of machines that fill one output together; fewer may come"
FRACTION = "fraction of the sample groups in the validation split; no stage trains on them; the paper: 606,000 of 250 million"


class SceneDrawingConfig(Config):
    """What `fetch.source: scenes` draws."""

    image_size: int = Field(32, ge=24, le=4096, description="width and height in pixels")
    seed: Seed = Field(0, description="seed of the scenes")
    textured: float = Field(0.25, ge=0, le=1, description="fraction of the scenes on a striped, checked or dotted ground")
    n_grounds: int = Field(
        len(GROUNDS), ge=1, le=len(GROUNDS), description="pale colours of the grounds; 1: white alone, for a small codebook"
    )
    evaluation_captions: int = Field(
        20,
        ge=1,
        le=100_000,
        description="captions of each category, seen and zero-shot each, in the list of captions to sample",
    )


class FamiliesConfig(Config):
    """What `fetch.source: families` lists beside the images."""

    evaluation_captions: int = Field(
        100, ge=1, description="captions of each style, seen and zero-shot each, in the lists of captions to sample"
    )


class FetchConfig(Config):
    """Settings of `fetch`, which gets the demo's images."""

    section: ClassVar = "fetch"
    out: OutFolder = Field(description="local folder for the images and their captions")
    source: Literal["auto", "fluent", "tuxpaint", "openclipart", "drawn", "scenes", "families"] = Field(
        "auto", description="source of the images; auto: the first available source, never scenes or families"
    )
    limit: int | None = Field(
        None, ge=1, description="maximum number of images, of families of things; unset: all, of scenes 20,000"
    )
    validation_fraction: float = Field(VALIDATION_FRACTION, ge=0, lt=1, description=FRACTION)
    scenes: SceneDrawingConfig = SceneDrawingConfig()
    families: FamiliesConfig = FamiliesConfig()

    @model_validator(mode="after")
    def _has_no_idle_keys(self) -> "FetchConfig":
        for source in ("scenes", "families"):
            if source in self.model_fields_set and self.source != source:
                raise ValueError(f"fetch.{source} is set and source is {self.source}: expected source {source}")
        return self


class ColumnsConfig(Config):
    """Column names of a parquet file. An image is stored as encoded bytes, or as a struct with the encoded bytes in `bytes`."""

    image: tuple[str, ...] = Field(("image", "jpg", "image_bytes"), description="image column: the first of these that exists")
    caption: tuple[str, ...] = Field(("caption", "text"), description="caption column: the first of these that exists")

    @field_validator("image", "caption", mode="before")
    @classmethod
    def _may_be_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class FilterConfig(Config):
    """Thresholds of the filters. They are part of the fingerprint of the raw shards."""

    min_letters: int = Field(3, description="minimum number of letters in a caption")
    max_characters: int = Field(2000, description="maximum number of characters in a caption")
    max_boilerplate: float = Field(0.7, description="maximum boilerplate fraction of a caption's letters and digits")
    language: str | None = Field("en", description="language of the captions; null keeps all languages")
    max_other_language: float = Field(
        0.8, ge=0, le=1, description="drop a caption if the probability of another language exceeds this"
    )
    min_side: int = Field(32, description="minimum length of the shorter side in pixels")
    max_pixels: int = Field(
        64 * 2**20, ge=1, description="maximum pixels according to the header; 64 Mi need up to 1.3 GiB to decode"
    )
    min_aspect: float = Field(0.5, description="minimum width / height; the paper keeps 1/2 to 2")
    max_aspect: float = Field(2.0, description="maximum width / height")

    @field_validator("language")
    @classmethod
    def _is_known(cls, language: str | None) -> str | None:
        if language is not None and language not in LANGUAGES:
            raise ValueError(f"{language!r}: expected one of {', '.join(LANGUAGES)}, or null to keep all languages")
        return language

    @field_validator("max_pixels")
    @classmethod
    def _can_be_decoded(cls, max_pixels: int) -> int:
        from dalle_ds.data.images import MAX_PIXELS

        if max_pixels > MAX_PIXELS:
            raise ValueError(f"{max_pixels}: expected at most {MAX_PIXELS}")
        return max_pixels


class IngestConfig(Config):
    """Settings of `ingest`, which converts captioned images to raw shards."""

    section: ClassVar = "ingest"
    images: Place = Field(description="folder of images with captions, of WebDataset tars, or of parquet files")
    out: OutFolder = Field(description="root of the raw shards")
    samples_per_shard: int = Field(
        256, ge=1, description="samples per shard of an image folder; a tar or parquet file is one shard"
    )
    columns: ColumnsConfig = ColumnsConfig()
    follow_links: bool = Field(False, description="read files and folders outside the input that links in it lead to")
    engine: Engine = Field("local", description=ENGINE)
    workers: int | None = Field(
        None, ge=1, description="number of workers; unset: one per core, with ray one per CPU of the cluster"
    )
    machine: int = Field(0, ge=0, description=MACHINE)
    machines: int = Field(1, ge=1, description=MACHINES)
    filters: FilterConfig = FilterConfig()


class DuplicatesConfig(Config):
    """Settings of `dedup`, which finds images that resemble an earlier image or an image of an evaluation set."""

    section: ClassVar = "dedup"
    raw: Place = Field(description="root of the raw shards")
    against: Places = Field((), description="root of an evaluation set's raw shards, to compare with; repeatable")
    drop: Literal["evaluation", "training"] = Field(
        "evaluation",
        description="of images in both, drop those of the evaluation sets, as the paper does, or those of the training data",
    )
    max_distance: int = Field(
        2, ge=0, le=7, description="duplicates differ in at most this many of 64 bits; colours are ignored"
    )
    memory_gib: float = Field(4.0, ge=1.25, le=100_000, description="memory of the comparison; what exceeds it goes to TMPDIR")
    workers: int | None = Field(
        None, ge=1, description="number of threads, fewer if `memory_gib` is too small for them; unset: one per core"
    )


class TokenizerConfig(Config):
    """Settings of `tokenizer`, which trains a BPE tokenizer on the captions."""

    section: ClassVar = "tokenizer"
    raw: Place = Field(description="root of the raw shards")
    out: OutFile = Field(description="output file, such as tokenizer.model")
    vocab_size: int = Field(
        16384, ge=2, le=2**24, description="vocabulary size (the paper's by default); smaller if the captions are few"
    )
    validation_fraction: float = Field(VALIDATION_FRACTION, ge=0, lt=1, description=FRACTION)
    spaces: bool = Field(
        True,
        description="whether a space is a token, as in the paper; if not, spaces only separate words, and captions of common "
        "words have half as many tokens",
    )
    max_captions: int = Field(
        20_000_000, ge=1, description="captions to sample, spread evenly over the shards; all if there are fewer"
    )


class EncodeConfig(Config):
    """Settings of `encode`, which converts raw shards to token shards."""

    section: ClassVar = "encode"
    raw: Place = Field(description="root of the raw shards, or a folder of WebDataset tars")
    dvae: Place = Field(description="dvae.safetensors")
    tokenizer: Place = Field(description="tokenizer.model")
    out: OutFolder = Field(description="root of the token data set")
    validation_fraction: float = Field(VALIDATION_FRACTION, ge=0, lt=1, description=FRACTION)
    crops: int = Field(
        1,
        ge=1,
        le=64,
        description="crops to draw of each training image; every epoch of a prior reads the next one. The paper draws one each "
        "time it reads an image, which takes as many crops as epochs. Time and size grow with them",
    )
    max_failure_rate: float = Field(0.1, ge=0, le=1, description="maximum fraction of failed samples in a finished shard")
    min_codes_used: float = Field(0.25, ge=0, le=1, description="minimum fraction of the codebook that validation images use")
    engine: Engine = Field("local", description=ENGINE)
    workers: int | None = Field(
        None,
        ge=1,
        description="number of workers; unset: one per core, or one per GPU; with ray as many as the cluster has room for",
    )
    worker_cpus: int | None = Field(
        None, ge=1, description="CPU cores that a worker decodes images on, with ray; unset: 1, or 8 beside a GPU"
    )
    machine: int = Field(0, ge=0, description=MACHINE)
    machines: int = Field(1, ge=1, description=MACHINES)
    batch: int = Field(32, ge=1, description="images per batch; an image of 256 pixels in fp32 takes 1/4 GiB of GPU memory")
    precision: Precision = Field(
        "fp32", description="number format of the encoder's residual branches; bf16: CPU or CUDA, fp16: CUDA only"
    )
    tf32: bool = Field(False, description="run fp32 convolutions in TF32 on CUDA: faster, but the tokens differ from a CPU's")
    min_agreement: float = Field(0.995, ge=0, le=1, description="minimum fraction of tokens that equal those of fp32")
    block_samples: int = Field(256, ge=1, description="samples per block; one ranged request reads a block")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the encoder; auto: a GPU if there is one")

    @model_validator(mode="after")
    def _has_no_idle_keys(self) -> "EncodeConfig":
        if self.worker_cpus is not None and self.engine != "ray":
            raise ValueError(f"encode.worker_cpus is set and engine is {self.engine}: expected engine ray")
        return self


class StatusConfig(Config):
    """Settings of `status`, which shows the progress of an ingest or encode."""

    section: ClassVar = "status"
    root: Place = Field(description="output folder of ingest or encode")


class VerifyConfig(Config):
    """Settings of `verify`, which reads a data set back and checks it."""

    section: ClassVar = "verify"
    root: Place = Field(description="root of raw shards or of a token data set")
    workers: int | None = Field(None, ge=1, description="number of worker processes; unset: one per core")
    engine: Engine = Field("local", description=ENGINE)
    shards: int | None = Field(
        None,
        ge=1,
        description="number of shards to read back, spread over all; of the others, only manifests and sizes are checked; "
        "unset: all",
    )
    images_per_shard: int = Field(
        1, ge=0, description="images to decode and compare with their source, per split of a shard; 0: none"
    )
    delete_orphans: bool = Field(
        False,
        description="delete objects that no manifest names, hidden temporary files and claims to publish, which killed workers "
        "leave, and indices that later ones have replaced; do not use while an encode runs or a reader begins",
    )


class StatsConfig(Config):
    """Settings of `stats`, which writes counts and an HTML page."""

    section: ClassVar = "stats"
    root: Place = Field(description="root of raw shards or of a token data set")
    project_to: int = Field(PAPER_SAMPLES, description="number of samples for which sizes are projected")
    page: OptionalOutFile = Field(
        None, description="output HTML file; unset: stats.html below the root if the root is writable"
    )
    images: int = Field(24, ge=0, le=10_000, description="number of example images on the page")


class DataPlanConfig(Config):
    """Settings of `plan`, which estimates size, time and cost of preprocessing a number of pairs."""

    section: ClassVar = "data_plan"
    pairs: float = Field(PAPER_SAMPLES, description="number of raw image-caption pairs")
    measured: OptionalPlace = Field(None, description="root of a finished encode; its manifests provide rates and sizes")
    rate: float | None = Field(None, description="crops/s of one worker")
    gpu_rate: float | None = Field(None, description="crops/s of one GPU")
    raw_bytes: float | None = Field(None, description="bytes per raw pair")
    crops: int | None = Field(None, ge=1, description="crops of each image (encode.crops); unset: as measured, or 1")
    accepted: float | None = Field(None, description="fraction of the pairs that become samples")
    samples_per_shard: int = Field(10_000, description="pairs per shard")
    workers: int = Field(64, description="number of parallel workers")
    price: float | None = Field(None, description="price of one GPU hour, or of one worker hour if gpu_rate is unset")
