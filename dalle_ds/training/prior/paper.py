"""The paper's values of the settings that decide a prior's result, and in which of them a run differs."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dalle_ds.data.tokens.batches import BPE_DROPOUT
from dalle_ds.models.presets import PRESETS
from dalle_ds.models.prior import PriorConfig
from dalle_ds.parallel.engine_config import EngineConfig
from dalle_ds.precision.resblock_scaling import ResblockScalingConfig
from dalle_ds.recipes import VALIDATION_FRACTION
from dalle_ds.training.prior.config import PriorRunConfig

PAPER: dict[str, Any] = {
    "updates": 430_000,
    "global_batch": 1024,
    "data.bpe_dropout": BPE_DROPOUT,
    "data.caption_dropout": 0.0,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.96,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 4.5e-2,
    "optimizer.embedding_rate": 1.0,
    "optimizer.clip": 4.0,
    "optimizer.variance_clip": 5.0,
    "optimizer.moments": "low_bit",
    "optimizer.master": "none",
    "learning_rate.peak": 4.5e-4,
    "learning_rate.warmup_updates": 5000,
    "learning_rate.shape": "constant",
    "ema.every": 25,
    "ema.decay": 0.99,
    "ema.start": "plain",
    "replicas.compression": "power_sgd",
    "replicas.number_format": "1-6-9",
    "replicas.warm_start": False,
}
"""Values by recipe key: section 2 and appendices B.2, D and E of the paper. What it does not state is missing here."""

HALVINGS = 5
SIZES = ("12b", "2.8b", "5.6b")
"""Presets of the paper's table 1. A run of another size is compared with the first."""

TOTAL_RANKS = {"2.8b": 512, "5.6b": 640, "12b": 896}
"""Ranks of PowerSGD over all ranks of a replica (table 1)."""


@dataclass(frozen=True)
class Difference:
    """A setting that is not the paper's."""

    key: str
    here: Any
    paper: Any

    def __str__(self) -> str:
        return f"`{self.key}` {_shown(self.here)} ({_shown(self.paper)})"


def differences(
    run: PriorRunConfig,
    model: PriorConfig,
    engine: EngineConfig,
    world_size: int,
    validation_fractions: Iterable[float],
    power_sgd_rank: int | None,
) -> list[Difference]:
    """In what a run differs from the paper's.

    Args:
        model: the model's geometry with its data set.
        validation_fractions: those of the data sets.
        power_sgd_rank: rank of the factors of a ZeRO shard; None without PowerSGD.
    """
    found = [Difference(key, _value(run, key), value) for key, value in PAPER.items() if _value(run, key) != value]
    found += _of_learning_rate(run)
    size = next((size for size in SIZES if PRESETS[size].d_model == model.d_model), SIZES[0])
    paper = PRESETS[size].model_dump()
    found += [Difference(f"model.{key}", value, paper[key]) for key, value in model.model_dump().items() if value != paper[key]]
    if power_sgd_rank is not None:
        n_shards = world_size // run.replicas.count
        if power_sgd_rank * n_shards != TOTAL_RANKS[size]:
            found.append(Difference("replicas.rank", f"{power_sgd_rank} on {n_shards}", f"{TOTAL_RANKS[size] / 8:g} on 8"))
    for fraction in sorted(set(validation_fractions)):
        if not math.isclose(fraction, VALIDATION_FRACTION, rel_tol=0.02):  # 0.0024 is the paper's, rounded
            found.append(Difference("validation_fraction", fraction, VALIDATION_FRACTION))
    return found + list(_of_formats(engine))


def _value(run: PriorRunConfig, key: str) -> Any:
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _of_learning_rate(run: PriorRunConfig) -> Iterator[Difference]:
    rate = run.learning_rate
    halvings = len(rate.halve_at) + (rate.plateau.max_halvings if rate.plateau else 0)
    if rate.shape == "constant" and halvings != HALVINGS:
        yield Difference("learning_rate", _counted(halvings), f"{HALVINGS} halvings when the loss flattens")


def _of_formats(engine: EngineConfig) -> Iterator[Difference]:
    """Differences of the DeepSpeed JSON."""
    scaling, paper = engine.block_scaling, ResblockScalingConfig()
    if scaling is None:
        numbers = next((name for name in ("fp16", "bf16") if engine.json.get(name, {}).get("enabled")), "fp32")
        here = "fp16 with one loss scale" if numbers == "fp16" else numbers
        yield Difference("deepspeed_config", here, "fp16 with a gradient scale for each residual block")
        return
    for key, value in paper.model_dump().items():
        here = getattr(scaling, key)
        if here != value:
            yield Difference(f"fp16.{key}", here, value)


def _counted(halvings: int) -> str:
    return "no halvings" if not halvings else f"at most {halvings} halvings"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
