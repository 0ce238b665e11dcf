"""What each stage is told: sections of a recipe, and options of `dalle-ds data VERB`. Imports nothing heavy."""

from typing import ClassVar, Final, Literal

from pydantic import Field, field_validator, model_validator

from dalle_ds.recipes import VALIDATION_FRACTION, Config

Engine = Literal["local", "ray"]
Precision = Literal["fp32", "bf16", "fp16"]
PAPER_SAMPLES: Final = 250_000_000
_LANGUAGES = "ar cs da de el en es fa fi fr he hi hu id it ja ko nl no pl pt ro ru sv th tr uk vi zh"
LANGUAGES: Final = tuple(_LANGUAGES.split(" "))
"""Fewer candidates make fewer mistakes on captions: the languages that most of the web is written in."""

ENGINE = "local: processes of this machine; ray: actors of a Ray cluster"
FRACTION = "share of the groups of samples that no stage trains on; the paper holds out 606,000 of 250 million"


class SceneDrawingConfig(Config):
    """What `fetch.source: scenes` draws."""

    image_size: int = Field(32, ge=24, description="pixels a side")
    seed: int = Field(0, ge=0, description="another seed, other scenes")
    textured: float = Field(0.25, ge=0, le=1, description="share of the scenes on a striped, checked or dotted ground")
    evaluation_captions: int = Field(20, ge=1, description="of each category, seen and zero-shot each, in the list beside")


class FetchConfig(Config):
    """The images of the demo."""

    section: ClassVar = "fetch"
    out: str = Field(description="local folder for the images and their captions")
    source: Literal["auto", "fluent", "tuxpaint", "openclipart", "drawn", "scenes"] = Field(
        "auto", description="auto takes the first that can be had here, never scenes"
    )
    limit: int | None = Field(None, ge=1, description="images at most; unset: all, of scenes 20,000")
    scenes: SceneDrawingConfig = SceneDrawingConfig()

    @model_validator(mode="after")
    def _has_no_idle_keys(self) -> "FetchConfig":
        if "scenes" in self.model_fields_set and self.source != "scenes":
            raise ValueError(f"fetch.scenes is set and source is {self.source}: expected source scenes")
        return self


class ColumnsConfig(Config):
    """The names of a parquet file's columns. An image is its file's bytes, or a struct whose field `bytes` holds them."""

    image: tuple[str, ...] = Field(("image", "jpg", "image_bytes"), description="the first of these columns that is there")
    caption: tuple[str, ...] = Field(("caption", "text"), description="the first of these columns that is there")


class FilterConfig(Config):
    """Thresholds. They are part of the fingerprint of the raw shards."""

    min_letters: int = Field(3, description="letters that a caption must have")
    max_characters: int = Field(2000, description="characters that a caption may have")
    max_boilerplate: float = Field(0.7, description="share of a caption's letters and digits that may be boilerplate")
    language: str | None = Field("en", description="language of the captions; null keeps all")
    max_other_language: float = Field(
        0.8, ge=0, le=1, description="probability of another language above which a caption is dropped"
    )
    min_side: int = Field(32, description="pixels of the shorter side")
    max_pixels: int = Field(64 * 2**20, ge=1, description="pixels by the header; 64 Mi take up to 1.3 GiB to decode")
    min_aspect: float = Field(0.5, description="width / height; the paper keeps 1/2 to 2")
    max_aspect: float = Field(2.0, description="width / height")

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
    """Captioned images to raw shards."""

    section: ClassVar = "ingest"
    images: str = Field(description="folder of images with captions, of WebDataset tars, or of parquet files")
    out: str = Field(description="root of the raw shards")
    samples_per_shard: int = Field(256, ge=1, description="of a folder of images; each tar or parquet file becomes one shard")
    columns: ColumnsConfig = ColumnsConfig()
    engine: Engine = Field("local", description=ENGINE)
    workers: int | None = Field(None, ge=1, description="processes; unset: all cores, with ray all CPUs of the cluster")
    filters: FilterConfig = FilterConfig()


class DuplicatesConfig(Config):
    """Images that look like an earlier one, or like one of an evaluation set."""

    section: ClassVar = "dedup"
    raw: str = Field(description="root of the raw shards")
    against: tuple[str, ...] = Field((), description="root of raw shards that training must not see; may be repeated")
    max_distance: int = Field(2, ge=0, le=7, description="bits of 64 that may differ between equal images; colours don't count")
    workers: int | None = Field(None, ge=1, description="processes; unset: all cores")


class TokenizerConfig(Config):
    """BPE of the captions."""

    section: ClassVar = "tokenizer"
    raw: str = Field(description="root of the raw shards")
    out: str = Field(description="file for the tokenizer, such as tokenizer.model")
    vocab_size: int = Field(16384, ge=2, description="tokens, as the paper; at most what the captions support")
    validation_fraction: float = Field(VALIDATION_FRACTION, ge=0, lt=1, description=FRACTION)


class EncodeConfig(Config):
    """Raw shards to token shards."""

    section: ClassVar = "encode"
    raw: str = Field(description="root of the raw shards, or a folder of WebDataset tars")
    dvae: str = Field(description="dvae.safetensors")
    tokenizer: str = Field(description="tokenizer.model")
    out: str = Field(description="root of the token data set")
    validation_fraction: float = Field(VALIDATION_FRACTION, ge=0, lt=1, description=FRACTION)
    max_failure_rate: float = Field(0.1, ge=0, le=1, description="a shard with a larger share of failed samples stays open")
    min_codes_used: float = Field(0.25, ge=0, le=1, description="share of the codebook that validation images must use")
    engine: Engine = Field("local", description=ENGINE)
    workers: int | None = Field(
        None, ge=1, description="processes; unset: all cores, or one on a GPU; with ray all CPUs or GPUs of the cluster"
    )
    machine: int = Field(0, ge=0, description="number of this machine among those that encode into one output")
    machines: int = Field(1, ge=1, description="number of these machines; each begins at another shard")
    batch_size: int = Field(32, ge=1, description="images at a time; at 256 pixels in fp32 each takes a quarter GiB of a GPU")
    precision: Precision = Field("fp32", description="of the encoder's branches; bf16 on CPU or CUDA, fp16 on CUDA alone")
    tf32: bool = Field(False, description="fp32 convolutions in TF32, on CUDA: faster, and no longer the tokens of a CPU")
    min_agreement: float = Field(0.995, ge=0, le=1, description="share of tokens that must equal those of fp32")
    block_samples: int = Field(256, ge=1, description="samples of a block, which one ranged request reads")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the encoder runs")


class StatusConfig(Config):
    """How far an ingest or encode is."""

    section: ClassVar = "status"
    root: str = Field(description="output of ingest or encode")


class VerifyConfig(Config):
    """Everything read back."""

    section: ClassVar = "verify"
    root: str = Field(description="root of raw shards or of a token data set")
    workers: int | None = Field(None, ge=1, description="processes; unset: all cores")
    images_per_shard: int = Field(
        1, ge=0, description="images of each split that are decoded and compared with their source; 0: none"
    )
    delete_orphans: bool = Field(
        False, description="remove objects that no manifest names, leftovers of killed workers; not while an encode runs"
    )


class StatsConfig(Config):
    """Counts and a page."""

    section: ClassVar = "stats"
    root: str = Field(description="root of raw shards or of a token data set")
    project_to: int = Field(PAPER_SAMPLES, description="samples to project sizes to")
    page: str | None = Field(None, description="HTML file; unset: stats.html below the root, where that can be written")
    images: int = Field(24, ge=0, description="example images on the page")


class DataPlanConfig(Config):
    """What so many pairs become and need."""

    section: ClassVar = "data_plan"
    pairs: float = Field(PAPER_SAMPLES, description="raw image-caption pairs")
    measured: str | None = Field(None, description="root of a finished encode, whose manifests tell rates and sizes")
    rate: float | None = Field(None, description="images/s of one worker")
    gpu_rate: float | None = Field(None, description="images/s of one GPU")
    raw_bytes: float | None = Field(None, description="bytes of a raw pair")
    accepted: float | None = Field(None, description="share of the pairs that become samples")
    shard_samples: int = Field(10_000, description="pairs of a shard")
    workers: int = Field(64, description="workers at the same time")
    price: float | None = Field(None, description="of an hour of a GPU, or of a worker where gpu_rate is unset")
