"""What verbs are told that are no stage of training or preprocessing. Imports no torch: options are made of these classes."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from dalle_ds.errors import ConfigError
from dalle_ds.planning.settings import PlanInputsConfig
from dalle_ds.recipes import Config, load_recipe
from dalle_ds.sampling.settings import PageLimitsConfig, SamplingConfig

EXPORT = "export folder: a path or s3:// url"
CLIP = "CLIP that scores: a folder, or a hub name of `transformers`"
DATA = "root of a token data set; unset: the one that the export names"
DEVICE = "auto, cpu, cuda, cuda:1"
IMAGES = "samples.json or its folder, raw shards, or a folder of images"


class ExportConfig(Config):
    section: ClassVar = "export"
    run: str = Field(description="folder of a prior's training run, or the s3:// url of its checkpoints")
    out: str = Field(description="folder for the export: a path or s3:// url")
    checkpoint: str | None = Field(None, description="checkpoint to take, e.g. update_00000500; unset: the newest")
    ema: bool = Field(True, description="take the EMA of the weights, or with --no-ema the weights themselves")
    max_file_gb: float = Field(5.0, gt=0, description="a larger model becomes several files with an index")


class ImportDVAEConfig(Config):
    section: ClassVar = "import_dvae"
    encoder: str = Field(description="OpenAI's encoder.pkl: a path or s3:// url")
    decoder: str = Field(description="OpenAI's decoder.pkl")
    out: str = Field("dvae.safetensors", description="weights file to write")
    image_size: int = Field(256, description="pixels a side of the images that it will encode")


class RegisterConfig(Config):
    section: ClassVar = "register"
    export: str = Field(description=EXPORT)
    name: str = Field(description="name of the registered model; one that exists gets a new version")
    clip: str | None = Field(None, description="folder of a CLIP that goes with it and chooses samples")
    mlflow_uri: str | None = Field(None, description="MLflow store; unset: the one that the export names")


class SampleConfig(SamplingConfig):
    section: ClassVar = "sample"
    export: str = Field(description=EXPORT)
    caption: tuple[str, ...] = Field((), description="a caption; may be repeated")
    captions: Path | None = Field(None, description="file with one caption a line; - reads standard input")
    validation: int = Field(0, ge=0, description="take N captions of the validation split, each of another group")
    data: str | None = Field(None, description=DATA)
    image_prompt: Path | None = Field(None, description="image whose top rows every sample begins with")
    prompt_rows: int | None = Field(None, description="rows of its grid that are kept; unset: 15 of 32, as the paper")
    repeat: Path | None = Field(None, description="samples.json whose samples are drawn again, bit for bit")
    clip: str | None = Field(None, description=CLIP)
    out: Path = Field(Path("samples"), description="folder for images, grid.png and samples.json")
    device: str = Field("auto", description=DEVICE)

    def settings(self) -> SamplingConfig:
        """What decides which samples come out."""
        return SamplingConfig(**{name: getattr(self, name) for name in SamplingConfig.model_fields})


class ServeConfig(PageLimitsConfig):
    section: ClassVar = "serve"
    export: str = Field(description=EXPORT)
    clip: str | None = Field(None, description=CLIP)
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0 is every one of this machine")
    port: int = Field(7860, ge=1, le=65535, description="port to listen at")
    mlflow_url: str | None = Field(None, description="MLflow server, for the link to the training run")
    device: str = Field("auto", description=DEVICE)

    def limits(self) -> PageLimitsConfig:
        """What one request may ask for."""
        return PageLimitsConfig(**{name: getattr(self, name) for name in PageLimitsConfig.model_fields})


class LossConfig(Config):
    section: ClassVar = "loss"
    export: str = Field(description=EXPORT)
    data: str | None = Field(None, description=DATA)
    limit: int | None = Field(None, ge=2, description="validation samples at most; unset: all")
    seed: int = Field(0, description="of the shuffled captions and of the confidence interval")
    batch: int = Field(16, ge=1, description="samples at a time")
    out: Path = Field(Path("evaluation"), description="folder for evaluate.json, losses and charts")
    device: str = Field("auto", description=DEVICE)


class ImagesConfig(Config):
    section: ClassVar = "images"
    images: str = Field(description=IMAGES)
    reference: tuple[str, ...] = Field((), description=f"real images: {IMAGES}; or .npz statistics, one for each radius")
    extractor: str | None = Field(None, description="inception or clip:PATH: features for FID and Inception Score")
    inception_weights: Path | None = Field(None, description="torch-fidelity's weights file; never downloaded")
    clip: str | None = Field(None, description="CLIP folder: also score images against their captions")
    blur: tuple[float, ...] = Field((0.0, 1.0, 2.0, 4.0, 8.0), description="radii of the blur on both sides; the paper's")
    size: int | None = Field(None, ge=1, description="pixels a side of both; unset: of the first image")
    limit: int | None = Field(None, ge=2, description="images of each side at most; the paper takes 30,000")
    validation_fraction: float | None = Field(None, ge=0, le=1, description="take only this validation split of raw shards")
    cache: Path | None = Field(None, description="folder that keeps the reference's statistics")
    resamples: int = Field(20, ge=2, description="for FID's interval; one takes seconds at 30,000 images")
    batch: int = Field(32, ge=1, description="images at a time")
    seed: int = Field(0, description="of splits and intervals")
    export: str | None = Field(None, description="export that drew them: its MLflow run gets scores and chart")
    out: Path = Field(Path("image_metrics"), description="folder for image_metrics.json and its chart")
    device: str = Field("auto", description=DEVICE)


class RerankConfig(Config):
    section: ClassVar = "rerank"
    chosen: Path = Field(description="samples.json whose scores choose")
    judged: Path = Field(description="samples.json of the same candidates, scored by another model")


class ScenesConfig(Config):
    section: ClassVar = "scenes"
    images: str = Field(description=f"images of scenes with captions: {IMAGES}")
    export: str | None = Field(None, description="export that drew them: its MLflow run gets scores and charts")
    dvae: str | None = Field(None, description="dVAE that gives the ceiling: a dvae.safetensors; unset: the export's")
    limit: int | None = Field(None, ge=1, description="images at most")
    seed: int = Field(0, ge=0, description="of the drawn scenes, and of the captions that give the chance level")
    out: Path = Field(Path("scenes"), description="folder for scenes.json, chart and sheet")
    device: str = Field("auto", description=DEVICE)


class HumanBuildConfig(Config):
    section: ClassVar = "human_build"
    ours: str = Field(description=f"images with captions: {IMAGES}")
    theirs: str = Field(description="the other side's; tasks are the captions that both have")
    out: Path = Field(description="folder for page-*.html, and for key.json, which voters must not see")
    limit: int = Field(1000, ge=1, description="tasks at most, as the paper")
    per_page: int = Field(100, ge=1, description="tasks on one page")
    seed: int = Field(0, description="of the order and of the sides")


class HumanTallyConfig(Config):
    section: ClassVar = "human_tally"
    votes: tuple[Path, ...] = Field(min_length=1, description="files that voters saved")
    key: Path = Field(description="key.json of the pages")
    n_votes: int = Field(5, ge=1, description="votes wanted on each task, as the paper")
    fast_seconds: float = Field(4.0, ge=0, description="an answer within so many seconds is fast, as the paper")
    fast_share: float = Field(0.5, ge=0, le=1, description="share of fast answers above which a worker may be left out,")
    disagreement: float = Field(0.4, ge=0, le=1, description="if also this share of answers is against the others' majority")


class PlanConfig(PlanInputsConfig):
    section: ClassVar = "plan"
    preset: str | None = Field(None, description="tiny, 0.3b, 1.2b, 2.8b, 5.6b, 12b; unset: the recipe's, or 12b")
    recipe: Path | None = Field(None, exclude=True)
    recipe_overrides: tuple[str, ...] = Field((), exclude=True)

    @classmethod
    def from_command_line(cls, path: Path | None, overrides: list[str], values: dict[str, Any]) -> "PlanConfig":
        """Keys that are no option of a plan change the recipe. Raises ConfigError where there is no recipe to change."""
        own = [override for override in overrides if override.partition("=")[0] in cls.model_fields]
        others = [override for override in overrides if override not in own]
        if path is None and others:
            raise ConfigError(f"{others[0]}: no option of a plan; it would change a recipe, and none is named")
        return load_recipe(cls, path, own, {**values, "recipe": path, "recipe_overrides": tuple(others)})

    def given(self) -> dict[str, Any]:
        """The settings that were given, rather than left at their defaults."""
        return {name: getattr(self, name) for name in PlanInputsConfig.model_fields if name in self.model_fields_set}


class DoctorConfig(Config):
    section: ClassVar = "doctor"
    places: tuple[str, ...] = Field((), description="a folder or s3:// prefix that must take a write; may be repeated")
    min_free_gib: float = Field(2.0, description="GiB that must be free on this disk")
    mlflow_uri: str | None = Field(None, description="MLflow store; unset: MLFLOW_TRACKING_URI, else local files")


class AcceptConfig(Config):
    section: ClassVar = "accept"
    out: Path = Field(Path("acceptance"), description="folder for acceptance.json and the steps' output")
    rehearse: bool = Field(False, description="every step small, on the CPU: no GPU is touched")
    steps: str = Field("", description="names of steps, with commas; unset: all")
    again: str = Field("", description="steps to repeat although they have ended, with commas, or all")
    minutes: float = Field(10.0, ge=0.01, description="for the steps of this call together")


class MlflowSyncConfig(Config):
    section: ClassVar = "mlflow_sync"
    folder: Path = Field(description="a run's folder, which holds mlflow_run.json")
    uri: str | None = Field(None, description="another MLflow store than the run's")


class DiagnoseConfig(Config):
    section: ClassVar = "diagnose"
    diagnosis: str = Field(description="folder of a diagnosis, a path or s3:// url")
    recipe: Path | None = Field(None, exclude=True)
    recipe_overrides: tuple[str, ...] = Field((), exclude=True)

    @classmethod
    def from_command_line(cls, path: Path | None, overrides: list[str], values: dict[str, Any]) -> "DiagnoseConfig":
        """Keys but `diagnosis` change the recipe, which is the diagnosis' own where none is named."""
        own = [override for override in overrides if override.startswith("diagnosis=")]
        others = tuple(override for override in overrides if override not in own)
        return load_recipe(cls, path, own, {**values, "recipe": path, "recipe_overrides": others})

    def check(self) -> None:
        """Raises ConfigError as `recipe_of_run`."""
        self.recipe_of_run()

    def recipe_of_run(self) -> Any:
        """The `PriorRunConfig` to repeat the update by: the diagnosis' own, where no recipe is named. Raises ConfigError."""
        from dalle_ds.training.prior.config import PriorRunConfig
        from dalle_ds.training.prior.diagnosis import DEEPSPEED_FILE, RECIPE_FILE

        recipe, overrides = self.recipe, list(self.recipe_overrides)
        if recipe is None:
            if "://" in self.diagnosis:
                raise ConfigError(f"{self.diagnosis}: name the recipe as well, such as recipe.yaml in the run's folder")
            recipe = Path(self.diagnosis, RECIPE_FILE)
            overrides.insert(0, f"deepspeed_config={Path(self.diagnosis, DEEPSPEED_FILE)}")
        return load_recipe(PriorRunConfig, recipe, overrides)


class ConfigConfig(Config):
    section: ClassVar = None
    name: str | None = Field(None, description="a verb, such as sample or train.prior; unset: list them")
