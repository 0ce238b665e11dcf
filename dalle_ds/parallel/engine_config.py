"""Read DeepSpeed's JSON configuration, reject keys that belong to the recipe, and add the recipe's values.

The JSON sets how the engine works: ZeRO stage, offload, number formats, bucket sizes. The recipe sets what the run computes:
batch size, clipping, optimizer, schedule. If the JSON sets a key that belongs to the recipe, loading fails, so that neither
file silently overrides the other.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dalle_ds.errors import ConfigError
from dalle_ds.precision.resblock_scaling import ResblockScalingConfig
from dalle_ds.storage.bounded import read_bounded
from dalle_ds.storage.text import parse_json

RECIPE_OWNS = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "global_batch and micro_batch",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "learning_rate",
}
"""The recipe key that sets each of these DeepSpeed keys."""

_OURS = set(ResblockScalingConfig.model_fields)


@dataclass(frozen=True)
class EngineConfig:
    """A DeepSpeed configuration ready for `deepspeed.initialize`, and the per-resblock scaling of its fp16 section."""

    json: dict[str, Any]
    block_scaling: ResblockScalingConfig | None
    """The scaling policy if the JSON has `"fp16": {"enabled": true, "loss_scale": "per_resblock"}`, otherwise None."""

    @property
    def zero_stage(self) -> int:
        return int(self.json.get("zero_optimization", {}).get("stage", 0))

    def require_replicable(self) -> None:
        """Raises ConfigError if gradients can't be averaged between replicas under this configuration."""
        if self.zero_stage != 3:
            raise ConfigError(f"replicas need zero_optimization.stage 3, but the DeepSpeed JSON has {self.zero_stage}")
        if self.json.get("fp16", {}).get("enabled"):
            raise ConfigError(
                "replicas need un-scaled gradients, but DeepSpeed's built-in fp16 scales them: "
                'use "loss_scale": "per_resblock", or bf16, or fp32'
            )
        if self.block_scaling is not None and self.block_scaling.skip == "block":
            raise ConfigError(
                'replicas carry compression errors to the next update, so they only skip whole updates: set "skip": "update"'
            )

    def require_masterless(self, moments: str, number_format: str) -> None:
        """Raises ConfigError if matrices can't be trained without fp32 masters under this configuration.

        Args:
            moments: the recipe's `optimizer.moments`.
            number_format: the recipe's `replicas.number_format`.
        """
        if self.block_scaling is None:
            raise ConfigError('optimizer.master none needs fp16 with "loss_scale": "per_resblock" in the DeepSpeed JSON')
        for key in self.json.get("zero_optimization", {}):
            if key.startswith("offload_"):
                raise ConfigError(f"optimizer.master none keeps its state on the device, but the DeepSpeed JSON has {key}")
        if moments != "low_bit":
            raise ConfigError(f"optimizer.master none needs optimizer.moments low_bit, but the recipe has {moments}")
        if number_format != "1-6-9":
            raise ConfigError(f"optimizer.master none needs replicas.number_format 1-6-9, but the recipe has {number_format}")

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of weights outside the residual branches in forward passes.
        It is 16-bit only in DeepSpeed's built-in fp16 and bf16 modes, which convert all weights."""
        return torch.float32 if self.block_scaling is not None else self.branch_dtype

    @property
    def branch_dtype(self) -> torch.dtype:
        """The dtype in which residual branches compute."""
        if self.block_scaling is not None or self.json.get("fp16", {}).get("enabled"):
            return torch.float16
        return torch.bfloat16 if self.json.get("bf16", {}).get("enabled") else torch.float32


def load_engine_config(path: Path, *, micro_batch: int, accumulation: int, clip: float) -> EngineConfig:
    """Read the JSON at `path` and add the recipe's micro-batch size, accumulation steps and clipping.

    Raises:
        ConfigError: the file can't be read, has a key that belongs to the recipe, or has an invalid fp16 section; per-resblock
            scaling without ZeRO stage 3; DeepSpeed's built-in fp16 or bf16 without ZeRO.
    """
    try:
        tree = parse_json(read_bounded(path))
    except OSError as error:
        raise ConfigError(f"DeepSpeed configuration {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ConfigError(f"DeepSpeed configuration {path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"DeepSpeed configuration {path} is {json.dumps(tree)[:60]}, expected an object: {{...}}")
    for key in ("fp16", "bf16", "zero_optimization", "timers"):
        if not isinstance(tree.get(key, {}), dict):
            raise ConfigError(f"{path} sets {key} = {json.dumps(tree[key])[:60]}, expected an object: {{...}}")
    for key, recipe_key in RECIPE_OWNS.items():
        if key in tree:
            raise ConfigError(
                f"{path} sets {key} = {json.dumps(tree[key])}, but this value comes from the recipe ({recipe_key}): "
                "remove the key from the JSON"
            )
    block_scaling = _take_block_scaling(tree, path)
    config = EngineConfig(
        {
            **tree,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip,
            "steps_per_print": 10**9,  # we print progress and metrics ourselves
            "timers": {"throughput": {"enabled": False}}
            | tree.get("timers", {}),  # it syncs with the device twice a micro-step
            # we pass an optimizer of our own, not one of DeepSpeed's
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
        block_scaling,
    )
    own_16_bit = [section for section in ("fp16", "bf16") if config.json.get(section, {}).get("enabled")]
    if own_16_bit and config.zero_stage == 0:
        raise ConfigError(f"{path}: {own_16_bit[0]} needs zero_optimization.stage 1, 2 or 3, found 0")
    if block_scaling is not None and config.zero_stage != 3:
        raise ConfigError(f'{path}: "loss_scale": "per_resblock" needs zero_optimization.stage 3, found {config.zero_stage}')
    return config


def _take_block_scaling(tree: dict[str, Any], path: Path) -> ResblockScalingConfig | None:
    """Parse the fp16 section if it asks for per-resblock scaling, otherwise return None.

    Per-resblock scaling keeps parameters fp32, so DeepSpeed's built-in fp16 is switched off in `tree`.
    """
    section = tree.get("fp16", {})
    if not section.get("enabled") or section.get("loss_scale") != "per_resblock":
        return None
    settings = {key: value for key, value in section.items() if key not in ("enabled", "loss_scale")}
    unknown = sorted(set(settings) - _OURS)
    if unknown:
        raise ConfigError(
            f"{path}: unknown keys in the fp16 section with per_resblock scaling: {', '.join(unknown)}; "
            f"expected any of {', '.join(sorted(_OURS))}"
        )
    tree["fp16"] = {"enabled": False}
    try:
        return ResblockScalingConfig(**settings)
    except ValidationError as error:
        raise ConfigError(f"{path}: fp16 section: {error.errors()[0]['loc']} {error.errors()[0]['msg']}") from None
