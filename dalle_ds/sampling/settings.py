"""What may be set when samples are drawn, and when a page draws them. Without torch: options of commands are made of it."""

from pydantic import Field, model_validator

from dalle_ds.recipes import Config


class SamplingConfig(Config):
    """What decides which images come out, beside the export, the scorer and the captions."""

    n: int = Field(4, ge=1, description="candidates for each caption")
    keep: int | None = Field(None, ge=1, description="the best of them, by the scorer; unset: all")
    temperature: float = Field(1.0, ge=0, description="the paper's is 1; 0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="0 keeps all tokens, as the paper")
    top_p: float = Field(1.0, gt=0, le=1)
    guidance: float = Field(1.0, ge=0, description="of captions over none; 1 leaves it out, as the paper")
    seed: int = Field(0, ge=0)
    batch: int = Field(32, ge=1, description="images at once")

    @property
    def n_kept(self) -> int:
        return self.n if self.keep is None else self.keep

    @model_validator(mode="after")
    def _check(self) -> "SamplingConfig":
        if self.n_kept > self.n:
            raise ValueError(f"keep {self.keep} of n {self.n}: expected at most as many as are drawn")
        return self


class PageLimitsConfig(Config):
    """What one request may ask for."""

    max_n: int = Field(64, ge=1, description="candidates")
    max_caption: int = Field(500, ge=1, description="characters")
    max_upload_mb: float = Field(10, gt=0, description="megabytes of an image")
    max_waiting: int = Field(100, ge=1, description="requests in the queue; more are turned away")
