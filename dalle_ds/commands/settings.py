"""Config classes of the verbs other than preprocessing stages, training runs and benchmarks.

The module imports no torch: `--help` reads the options from these classes.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from dalle_ds.errors import ConfigError
from dalle_ds.planning.settings import PlanInputsConfig
from dalle_ds.recipes import (
    DEVICE,
    Config,
    LocalOutFolder,
    OptionalLocalOutFolder,
    OptionalPlace,
    OptionalStore,
    OutFile,
    OutFolder,
    Place,
    Places,
    Seed,
    load_recipe,
)
from dalle_ds.sampling.settings import PageLimitsConfig, SampleOptionsConfig
from dalle_ds.scenes.vocabulary import GROUNDS

EXPORT = "export folder: a path or s3:// url"
CLIP = "CLIP that scores the images: a folder, or hf://OWNER/MODEL of the Hugging Face hub"
DATA = "root of a token data set; unset: the data set that the export names"
IMAGES = "samples.json or its folder, raw shards, or a folder of images"


class ExportConfig(Config):
    section: ClassVar = "export"
    run: Place = Field(description="run folder of a trained prior, or the s3:// url of its checkpoints")
    out: OutFolder = Field(description="folder for the export: a path or s3:// url")
    checkpoint: str | None = Field(None, description="checkpoint to export, e.g. update_00000500; unset: the newest")
    ema: bool = Field(True, description="export the EMA of the weights; with --no-ema, the weights themselves")
    max_file_gb: float = Field(5.0, gt=0, description="GB per weights file; a larger model is split into several files")
    temperature: float | None = Field(
        None, ge=0, description="temperature of samples that name none of their own; unset: the recipe's sampling.temperature"
    )
    guidance: float | None = Field(
        None, ge=0, description="guidance of samples that name none of their own; unset: the recipe's sampling.guidance"
    )


class ImportDVAEConfig(Config):
    section: ClassVar = "import_dvae"
    encoder: Place = Field(description="OpenAI's encoder.pkl: a path or s3:// url")
    decoder: Place = Field(description="OpenAI's decoder.pkl")
    out: OutFile = Field("dvae.safetensors", description="weights file to write")
    image_size: int = Field(256, description="side in pixels of the images that the dVAE will encode")


class RegisterConfig(Config):
    section: ClassVar = "register"
    export: Place = Field(description=EXPORT)
    name: str = Field(description="name of the registered model; an existing model gets a new version")
    clip: str | None = Field(None, description="folder of a CLIP to include, which ranks the model's samples")
    mlflow_uri: OptionalStore = Field(None, description="MLflow store; unset: the store that the export names")


class SampleConfig(SampleOptionsConfig):
    section: ClassVar = "sample"
    export: Place = Field(description=EXPORT)
    caption: tuple[str, ...] = Field((), description="caption to sample images for; may be repeated")
    captions: Path | None = Field(None, description="file with one caption per line; - reads standard input")
    validation: int = Field(
        0, ge=0, description="captions to take from the validation split, no two of one group; all if there are fewer"
    )
    data: OptionalPlace = Field(None, description=DATA)
    image_prompt: Path | None = Field(None, description="image prompt: every sample starts with the top rows of this image")
    prompt_rows: int | None = Field(None, description="rows of the token grid to take from the image prompt; unset: 15 of 32")
    repeat: Path | None = Field(None, description="samples.json whose images are to be reproduced bit for bit")
    clip: str | None = Field(None, description=CLIP)
    out: LocalOutFolder = Field(Path("samples"), description="folder for images, grid.png and samples.json")
    dtype: Literal["fp32", "fp16"] = Field(
        "fp32",
        description="format of the prior's residual branches: fp16, as in training, halves memory on GPUs and gives nearly the "
        "same tokens; --repeat takes that of the record",
    )
    device: str = Field("auto", description=DEVICE)


class ServeConfig(PageLimitsConfig):
    section: ClassVar = "serve"
    export: Place = Field(description=EXPORT)
    clip: str | None = Field(None, description=CLIP)
    examples: Path | None = Field(
        None, description="file of captions to click, one a line; unset: validation captions of the export's data, if readable"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0: every address of this machine")
    port: int = Field(7860, ge=1, le=65535, description="port to listen on")
    mlflow_url: str | None = Field(
        None, description="address that people open MLflow at, for the page's link to the training run; unset: the run's own"
    )
    device: str = Field("auto", description=DEVICE)

    def limits(self) -> PageLimitsConfig:
        """Upper limits for one request."""
        return PageLimitsConfig(**{name: getattr(self, name) for name in PageLimitsConfig.model_fields})


class LossConfig(Config):
    section: ClassVar = "loss"
    export: Place = Field(description=EXPORT)
    data: OptionalPlace = Field(None, description=DATA)
    limit: int | None = Field(
        8192, ge=2, description="maximum number of validation samples, from blocks all over the split; null: all"
    )
    bound_pairs: int = Field(
        512,
        ge=0,
        le=2**15,
        description="maximum number of validation pairs whose images are read from raw shards, for the bound on ln p(image, "
        "caption) of the whole model; 0: none",
    )
    raw: OptionalPlace = Field(None, description="root of the raw shards; unset: where they were when they were encoded")
    fp16_samples: int = Field(
        64,
        ge=0,
        description="maximum number of validation samples on which tokens sampled in fp16 are compared with those in fp32, to "
        "decide on `sample --dtype fp16`; 0: none",
    )
    seed: Seed = Field(0, description="seed of the shuffled captions and of the confidence intervals")
    batch: int = Field(16, ge=1, description="samples per forward pass")
    out: LocalOutFolder = Field(Path("evaluation"), description="folder for evaluate.json, losses and charts")
    device: str = Field("auto", description=DEVICE)


class ImagesConfig(Config):
    section: ClassVar = "images"
    images: Place = Field(description=IMAGES)
    reference: Places = Field(
        (), description=f"real images: {IMAGES}; or .npz files of statistics, one per blur radius; may be repeated"
    )
    extractor: str | None = Field(None, description="features for FID and Inception Score: inception or clip:PATH")
    inception_weights: Path | None = Field(None, description="torch-fidelity's weights file, which is never downloaded")
    clip: str | None = Field(None, description="CLIP folder; also measures the CLIP score of images and captions")
    among: int | None = Field(
        None,
        ge=2,
        description="fraction of images, and of the reference, whose own caption has the highest score of --clip among so many "
        "captions; the others are drawn from those of images and reference",
    )
    alike: str | None = Field(
        None,
        description="regular expression, for --among: captions are drawn among those where it matches the same text, and each "
        "text has its row; 'in \\w+ style' draws captions of the same style",
    )
    blur: tuple[Annotated[float, Field(ge=0, le=1000)], ...] = Field(
        (0.0, 1.0, 2.0, 4.0, 8.0), min_length=1, description="blur radii in pixels for samples and reference, comma-separated"
    )
    size: int | None = Field(None, ge=1, description="side in pixels to crop to; unset: short side of the first image")
    limit: int | None = Field(None, ge=2, description="maximum number of images, per set; the paper takes 30,000")
    validation_fraction: float | None = Field(
        None, ge=0, le=1, description="if the reference is raw shards, use only their validation split of this fraction"
    )
    max_failure_rate: float = Field(
        0.0, ge=0, lt=1, description="fraction of the images of each set that may be left out because they cannot be used"
    )
    with_overlap: bool = Field(
        False,
        description="keep images of the reference that `data dedup` found in the training data; the paper shows scores of both",
    )
    cache: OptionalLocalOutFolder = Field(None, description="folder to keep the reference's statistics in")
    resamples: int = Field(20, ge=2, description="resamples for FID's interval; each takes seconds at 30,000 images")
    batch: int = Field(32, ge=1, description="images per batch")
    seed: Seed = Field(0, description="seed of the splits and the intervals")
    export: OptionalPlace = Field(None, description="export that the images come from; its MLflow run gets the scores")
    out: LocalOutFolder = Field(Path("image_metrics"), description="folder for image_metrics.json and its chart")
    device: str = Field("auto", description=DEVICE)

    @field_validator("alike")
    @classmethod
    def _is_an_expression(cls, alike: str | None) -> str | None:
        try:
            re.compile(alike or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{alike[:100]!r} is no regular expression: {error}") from None  # type: ignore[index]
        return alike


class RerankConfig(Config):
    section: ClassVar = "rerank"
    chosen: Path = Field(description="samples.json whose scores pick the best candidate of each caption")
    judged: Path = Field(description="samples.json of the same candidates, scored by an independent model")


class ScenesConfig(Config):
    section: ClassVar = "scenes"
    images: Place = Field(description=f"images of scenes with captions: {IMAGES}")
    export: OptionalPlace = Field(None, description="export that drew them: its MLflow run gets scores and charts")
    dvae: OptionalPlace = Field(
        None, description="dVAE through which real scenes are judged as well: a dvae.safetensors; unset: the export's"
    )
    textured: float = Field(
        0.25, ge=0, le=1, description="fraction of textured grounds of the drawn scenes: as in the dVAE's training data"
    )
    n_grounds: int = Field(
        len(GROUNDS), ge=1, le=len(GROUNDS), description="ground colours of the drawn scenes: as in the dVAE's training data"
    )
    limit: int | None = Field(None, ge=1, description="maximum number of images")
    name: str = Field(
        "scenes",
        pattern=r"^\w+$",
        description="first part of the names of metrics and charts, to tell several scores of a run apart",
    )
    seed: Seed = Field(0, description="seed of the drawn scenes, and of the captions that give the chance level")
    out: LocalOutFolder = Field(Path("scenes"), description="folder for scenes.json, chart and sheet")
    device: str = Field("auto", description=DEVICE)


class HumanBuildConfig(Config):
    section: ClassVar = "human_build"
    ours: Place = Field(description=f"our images with captions: {IMAGES}")
    theirs: Place = Field(description="images of the other model; each caption that both sets have becomes a task")
    out: LocalOutFolder = Field(description="folder for page-*.html and for key.json, which voters must not see")
    limit: int = Field(1000, ge=1, description="maximum number of tasks; the default is the paper's")
    per_page: int = Field(100, ge=1, description="tasks per page")
    seed: Seed = Field(0, description="seed of the order of tasks and of the left and right images")


class HumanTallyConfig(Config):
    section: ClassVar = "human_tally"
    votes: tuple[Path, ...] = Field(min_length=1, description="vote files that the voters sent back; may be repeated")
    key: Path = Field(description="key.json that was written with the pages")
    n_votes: int = Field(5, ge=1, description="expected votes per task; the default is the paper's")
    fast_seconds: float = Field(4.0, ge=0, description="an answer given in fewer seconds is fast; the default is the paper's")
    fast_share: float = Field(
        0.5, ge=0, le=1, description="fraction of fast answers; a voter above both this and --disagreement is left out"
    )
    disagreement: float = Field(
        0.4, ge=0, le=1, description="fraction of answers on realism that differ from the other voters' majority"
    )


class PlanConfig(PlanInputsConfig):
    section: ClassVar = "plan"
    preset: str | None = Field(
        None, description="tiny, 0.3b, 1.2b, 2.8b, 5.6b or 12b; unset: the recipe's preset, or 12b without a recipe"
    )
    recipe: Path | None = Field(None, exclude=True)
    recipe_overrides: tuple[str, ...] = Field((), exclude=True)

    @classmethod
    def from_command_line(cls, path: Path | None, overrides: list[str], values: dict[str, Any]) -> "PlanConfig":
        """Build the config. KEY=VALUE words whose key is not a field of this class override the recipe.

        Raises:
            ConfigError: such a key, but no recipe.
        """
        own = [override for override in overrides if override.partition("=")[0] in cls.model_fields]
        others = [override for override in overrides if override not in own]
        if path is None and others:
            raise ConfigError(f"{others[0]}: not an option of plan, and there is no recipe to override: expected RECIPE.yaml")
        return load_recipe(cls, path, own, {**values, "recipe": path, "recipe_overrides": tuple(others)})

    def given(self) -> dict[str, Any]:
        """The settings that were given, rather than left at their defaults."""
        return {name: getattr(self, name) for name in PlanInputsConfig.model_fields if name in self.model_fields_set}


class DoctorConfig(Config):
    section: ClassVar = "doctor"
    places: Places = Field((), description="folder or s3:// prefix that must be writable; may be repeated")
    min_free_gib: float = Field(2.0, description="GiB that must be free on the disk of the working directory")
    mlflow_uri: OptionalStore = Field(None, description="MLflow store; unset: MLFLOW_TRACKING_URI, or else local files")


class AcceptConfig(Config):
    section: ClassVar = "accept"
    out: LocalOutFolder = Field(Path("acceptance"), description="folder for acceptance.json and the output of the steps")
    rehearse: bool = Field(False, description="run a small version of every step on the CPU, without a GPU")
    steps: str | None = Field(None, description="comma-separated names of the steps to run; unset: all")
    again: str | None = Field(None, description="comma-separated names of finished steps to repeat, or all")
    minutes: float = Field(10.0, ge=0.01, description="time limit in minutes for all steps of this call together")


class MlflowSyncConfig(Config):
    section: ClassVar = "mlflow_sync"
    folder: Path = Field(description="run folder, which holds mlflow_run.json")
    mlflow_uri: OptionalStore = Field(None, description="MLflow store; unset: the run's store")


class DiagnoseConfig(Config):
    section: ClassVar = "diagnose"
    diagnosis: Place = Field(description="folder of the diagnosis: a path or s3:// url")
    recipe: Path | None = Field(None, exclude=True)
    recipe_overrides: tuple[str, ...] = Field((), exclude=True)

    @classmethod
    def from_command_line(cls, path: Path | None, overrides: list[str], values: dict[str, Any]) -> "DiagnoseConfig":
        """Build the config. All KEY=VALUE words except `diagnosis` override the recipe.

        If no recipe is named, the recipe is the one stored in the diagnosis.
        """
        own = [override for override in overrides if override.startswith("diagnosis=")]
        others = tuple(override for override in overrides if override not in own)
        return load_recipe(cls, path, own, {**values, "recipe": path, "recipe_overrides": others})

    def check(self) -> None:
        """Check the recipe before ranks join. Raises ConfigError as `recipe_of_run`."""
        self.recipe_of_run()

    def recipe_of_run(self) -> Any:
        """Returns the `PriorRunConfig` to repeat the update with.

        If no recipe is named, it is read from the diagnosis.

        Raises:
            ConfigError: no recipe is named and the diagnosis is not a local folder, or not a diagnosis; or as `load_recipe`.
        """
        from dalle_ds.training.prior.config import PriorRunConfig
        from dalle_ds.training.prior.diagnosis import DEEPSPEED_FILE, RECIPE_FILE

        recipe, overrides = self.recipe, list(self.recipe_overrides)
        if recipe is None:
            if "://" in self.diagnosis:
                raise ConfigError(
                    f"{self.diagnosis} is not a local folder: expected a recipe as well, such as recipe.yaml of the run folder"
                )
            recipe = Path(self.diagnosis, RECIPE_FILE)
            if not recipe.exists():
                raise ConfigError(
                    f"{self.diagnosis} is not a diagnosis: it has no {RECIPE_FILE}; expected a folder such as "
                    "RUN/diagnosis/update_00000123"
                )
            overrides.insert(0, f"deepspeed_config={Path(self.diagnosis, DEEPSPEED_FILE)}")
        return load_recipe(PriorRunConfig, recipe, overrides)


class PathConfig(Config):
    section: ClassVar = None
    name: str | None = Field(None, description="name of a shipped file, such as train_prior.sh; unset: list all")


class ConfigConfig(Config):
    section: ClassVar = None
    name: tuple[str, ...] = Field((), description="verb or group, such as sample, train prior or train.prior; unset: list all")
