"""Checks of a prior run before its engine is built: the recipe against the data, the ranks and the newest checkpoint."""

import logging
from dataclasses import dataclass

import torch

from dalle_ds.data.tokens.mix import TokenMix
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.parallel.engine_config import EngineConfig
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.training.checkpoint import Checkpoint, CheckpointStore
from dalle_ds.training.prior.build import read_engine_config
from dalle_ds.training.prior.changes import settings_of
from dalle_ds.training.prior.config import PriorRunConfig
from dalle_ds.training.prior.state import PriorAbout, TrainedOn, saved_update

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PriorJob:
    """The result of `check_job`: all that a trainer needs to build the run."""

    recipe: PriorRunConfig
    engine_config: EngineConfig
    model_config: PriorConfig
    train_set: TokenMix
    validation_set: TokenMix
    about: PriorAbout
    """Description of the run for checkpoint.json. The MLflow run is added when a checkpoint is saved."""
    checkpoints: CheckpointStore[PriorAbout]
    newest: Checkpoint[PriorAbout] | None
    """Checkpoint to resume from, unless its tensors turn out to be damaged. None for a new run."""
    n_parameters: int

    @property
    def is_finished(self) -> bool:
        """Whether the newest checkpoint already has all updates of the recipe."""
        return self.newest is not None and self.newest.update >= self.recipe.updates


def check_job(recipe: PriorRunConfig, ranks: Ranks) -> PriorJob:
    """Open the data sets and find the newest checkpoint. All ranks must call it together.

    Raises:
        ConfigError: the recipe does not fit the data, the ranks, the DeepSpeed JSON or the checkpoint.
        DataError: a data set is missing or damaged, or all checkpoints are damaged.
        FingerprintMismatch: the data set was made with another dVAE or tokenizer than the recipe requires.
    """
    engine_config = read_engine_config(recipe, ranks)
    files = ranks.once(recipe.data.read)
    train_set, validation_set = recipe.data.open(files, "train"), recipe.data.open(files, "validation")
    info = train_set.info
    for what, expected, found in (("dVAE", recipe.data.dvae, info.dvae), ("tokenizer", recipe.data.tokenizer, info.tokenizer)):
        if expected is not None:
            require_same(f"{what} of data set {train_set.root_url}", expected, found, "The recipe requires the expected one.")
    model_config = recipe.model.resolve(info, train_set.tokenizer.vocab_size, train_set.root_url)
    about = PriorAbout(
        model=model_config,
        data=train_set.fingerprint,
        content=train_set.content_fingerprint,
        global_batch=recipe.global_batch,
        seed=recipe.seed,
        moments=recipe.optimizer.moments,
        master=recipe.optimizer.master,
        fp16_branches=engine_config.block_scaling is not None,
        weight_dtype=str(engine_config.weight_dtype).removeprefix("torch."),
        caption_dropout=recipe.data.caption_dropout,
        dvae=info.dvae,
        tokenizer=info.tokenizer,
        sets=tuple(_trained_on(train_set)),
        sampling=recipe.sampling,
        settings=settings_of(recipe, engine_config),
    )
    checkpoints = CheckpointStore(recipe.checkpoint_folder, PriorAbout, recipe.checkpoint.keep, saved_update)
    newest = checkpoints.candidate(ranks)
    if newest is not None:
        about.require_same_run(newest.about, newest.url)
        if ranks.is_main and (changes := about.changes_since(newest.about)):
            log.warning("%s was trained with other settings, which change the numbers: %s", newest.url, "; ".join(changes))
    n_parameters = _count_parameters(model_config)
    return PriorJob(recipe, engine_config, model_config, train_set, validation_set, about, checkpoints, newest, n_parameters)


def _trained_on(mix: TokenMix) -> list[TrainedOn]:
    return [
        TrainedOn(dataset=objects.absolute(one.root_url), weight=weight, data=one.fingerprint, content=one.content_fingerprint)
        for one, weight in zip(mix.sets, mix.weights, strict=True)
    ]


def _count_parameters(config: PriorConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Prior(config).parameters())
