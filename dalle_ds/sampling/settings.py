"""Settings of sampling, and limits of the web page. Imports no torch: the command line reads options from these classes."""

from pydantic import Field, model_validator

from dalle_ds.recipes import Config, Seed


class SamplingConfig(Config):
    """The settings that, with the export, the scorer and the captions, determine which images are sampled."""

    n: int = Field(4, ge=1, le=65_536, description="candidates per caption")
    keep: int | None = Field(None, ge=1, description="keep only the N best candidates by score; unset: all")
    temperature: float = Field(1.0, ge=0, description="softmax temperature; 1 as in the paper, 0 takes the most likely token")
    top_k: int = Field(0, ge=0, description="sample only from the N most likely tokens; 0: from all, as in the paper")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the smallest set of likeliest tokens with this total probability; 1: all"
    )
    guidance: float = Field(1.0, ge=0, description="scale of classifier-free guidance by the caption; 1: none, as in the paper")
    seed: Seed = Field(0, description="seed of the run")
    batch: int = Field(32, ge=1, description="images per batch")

    @property
    def n_kept(self) -> int:
        return self.n if self.keep is None else self.keep

    @model_validator(mode="after")
    def _check(self) -> "SamplingConfig":
        if self.n_kept > self.n:
            raise ValueError(f"keep {self.keep} of n {self.n}: expected keep to be at most n")
        return self


class PageLimitsConfig(Config):
    """Upper limits for one request."""

    max_n: int = Field(64, ge=1, description="candidates per caption")
    max_caption: int = Field(500, ge=1, description="length of a caption in characters")
    max_upload_mb: float = Field(10, gt=0, description="size of an image prompt in megabytes")
    max_upload_megapixels: float = Field(16, gt=0, description="size of an image prompt in million pixels")
    max_waiting: int = Field(100, ge=1, description="requests in the queue; further requests are rejected")
