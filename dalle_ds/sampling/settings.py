"""Settings of sampling, and limits of the web page. Imports no torch: the command line reads options from these classes."""

from pydantic import Field, model_validator

from dalle_ds.recipes import Config, Seed


class PriorSamplingConfig(Config):
    """The settings that samples of a prior are meant for. A run's recipe has them, and exports of the run carry them."""

    temperature: float = Field(
        1.0, ge=0, description="softmax temperature; the paper's. Small models draw more right images with about 0.5"
    )
    guidance: float = Field(
        1.0, ge=0, description="scale of classifier-free guidance by the caption, for runs with data.caption_dropout; 1: none"
    )


class SampleOptionsConfig(Config):
    """The options of a request for samples. Where one is not set, the export decides: see `for_prior`."""

    n: int = Field(4, ge=1, le=65_536, description="candidates per caption")
    keep: int | None = Field(None, ge=1, description="keep only the N best candidates by score; unset: all")
    temperature: float | None = Field(
        None,
        ge=0,
        description="softmax temperature; 1 as in the paper, 0 takes the most likely token; unset: the export's, or 1",
    )
    top_k: int = Field(0, ge=0, description="sample only from the N most likely tokens; 0: from all, as in the paper")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the smallest set of likeliest tokens with this total probability; 1: all"
    )
    guidance: float | None = Field(
        None,
        ge=0,
        description="scale of classifier-free guidance by the caption; 1: none, as in the paper; unset: the export's, or 1",
    )
    seed: Seed = Field(0, description="seed of the run")
    batch: int = Field(32, ge=1, description="images per batch")

    @property
    def n_kept(self) -> int:
        return self.n if self.keep is None else self.keep

    @model_validator(mode="after")
    def _check(self) -> "SampleOptionsConfig":
        if self.n_kept > self.n:
            raise ValueError(f"keep {self.keep} of n {self.n}: expected keep to be at most n")
        return self

    def for_prior(self, meant: PriorSamplingConfig | None) -> "SamplingConfig":
        """These options as numbers. One that is not set has the value that the prior is meant for, or 1 if that is unknown."""
        known = (meant or PriorSamplingConfig()).model_dump()
        given = {name: getattr(self, name) for name in SamplingConfig.model_fields}
        return SamplingConfig(**known | {name: value for name, value in given.items() if value is not None})


class SamplingConfig(SampleOptionsConfig):
    """The settings that, with the export, the scorer and the captions, determine which images are sampled."""

    temperature: float = Field(1.0, ge=0)
    guidance: float = Field(1.0, ge=0)


class PageLimitsConfig(Config):
    """Upper limits for one request."""

    max_n: int = Field(64, ge=1, description="candidates per caption")
    max_caption: int = Field(500, ge=1, description="length of a caption in characters")
    max_upload_mb: float = Field(10, gt=0, description="size of an image prompt in megabytes")
    max_upload_megapixels: float = Field(16, gt=0, description="size of an image prompt in million pixels")
    max_waiting: int = Field(100, ge=1, description="requests in the queue; further requests are rejected")
