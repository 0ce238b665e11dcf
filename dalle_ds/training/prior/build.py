"""Build the engine of a prior run from its recipe."""

from dalle_ds.models.attention import use_attention, verify_attention
from dalle_ds.models.prior import PriorConfig
from dalle_ds.optim.build import OptimizerSettings
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.parallel.engine import PriorEngine
from dalle_ds.parallel.engine_config import EngineConfig, load_engine_config
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.training.prior.config import PriorRunConfig


def read_engine_config(recipe: PriorRunConfig, ranks: Ranks) -> EngineConfig:
    """Read the recipe's DeepSpeed JSON and complete it from the recipe. Raises ConfigError if either is invalid."""
    accumulation = recipe.accumulation(ranks.world_size)
    return load_engine_config(
        recipe.deepspeed_path, micro_batch=recipe.micro_batch, accumulation=accumulation, clip=recipe.optimizer.clip
    )


def build_engine(
    recipe: PriorRunConfig, model_config: PriorConfig, engine_config: EngineConfig, ranks: Ranks, initialised: bool = True
) -> PriorEngine:
    """Build model and optimizer under DeepSpeed, choose the attention backend and verify its results on this machine.

    Args:
        initialised: False if a checkpoint is loaded next.

    Raises:
        ConfigError: the recipe does not fit the ranks or the machine.
        RuntimeError: the attention backend gives wrong results on this machine.
    """
    settings = recipe.optimizer
    engine = PriorEngine(
        model_config,
        engine_config,
        OptimizerSettings(
            lr=recipe.learning_rate.peak,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            variance_clip=settings.variance_clip,
            moments=settings.moments,
            master=settings.master,
            embedding_rate=settings.embedding_rate,
        ),
        ranks,
        recipe.seed,
        recipe.replicas,
        initialised,
    )
    use_attention(engine.module, recipe.attention, ranks.device)
    verify_attention(engine.module, engine_config.branch_dtype, ranks.device, recipe.micro_batch)
    if recipe.activation_checkpointing:
        recompute_layers(engine.module, every=int(recipe.activation_checkpointing))  # True is 1: every layer
    return engine
