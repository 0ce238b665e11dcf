"""The engine that a recipe asks for."""

from dalle_ds.models.attention import use_attention, verify_attention
from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.parallel.engine import OptimizerSettings, PriorEngine
from dalle_ds.parallel.engine_config import EngineConfig, load_engine_config
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.training.prior.config import PriorRun


def read_engine_config(run: PriorRun, ranks: Ranks) -> EngineConfig:
    """The recipe's DeepSpeed JSON, completed. Raises ConfigError."""
    accumulation = run.accumulation(ranks.world_size)
    return load_engine_config(
        run.deepspeed_path, micro_batch=run.micro_batch, accumulation=accumulation, clip=run.optimizer.clip
    )


def build_engine(run: PriorRun, model_config: PriorConfig, engine_config: EngineConfig, ranks: Ranks) -> PriorEngine:
    """Model, optimizer and formats under DeepSpeed; attention in a backend that this machine computes right.

    Raises:
        ConfigError: the recipe does not fit the ranks or the machine.
        RuntimeError: the attention backend computes wrong numbers here.
    """
    settings = run.optimizer
    engine = PriorEngine(
        model_config,
        engine_config,
        OptimizerSettings(
            run.learning_rate.peak,
            (settings.beta1, settings.beta2),
            settings.eps,
            settings.weight_decay,
            settings.moments,
            settings.master,
        ),
        ranks,
        run.seed,
        run.replicas,
    )
    use_attention(engine.module, run.attention, ranks.device)
    verify_attention(engine.module, engine_config.branch_dtype, ranks.device, run.micro_batch)
    if run.activation_checkpointing:
        recompute_layers(engine.module, every=int(run.activation_checkpointing))  # true is 1: each of them
    return engine
