"""The state of an engine in checkpoints: each rank collects its part, reads it back, and goes on from it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_ds.errors import Damaged
from dalle_ds.parallel.checkpoint_layout import AVERAGE, ERROR, WEIGHTS, family_of
from dalle_ds.parallel.checkpoint_tensors import Snapshot, StateParts
from dalle_ds.parallel.deepspeed_api import DeepSpeedEngine
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.parallel.replicas.gradients import ReplicaGradients
from dalle_ds.parallel.replicas.groups import Replicas
from dalle_ds.parallel.saved_state import Put, Ranges, SavedState, Take
from dalle_ds.parallel.zero_shards import (
    Fragment,
    collect,
    copy_to_working_weights,
    layout_of,
    put_into,
    restoring,
    shard_start,
)
from dalle_ds.precision.resblock_scaling import ResblockGradScaler

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class EngineState:
    """Weights, moments, errors, gradient scales and counters of the parts of a `PriorEngine`, which documents the methods.

    Args:
        others: returns the fragments of the matrices without masters.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        ranks: Ranks,
        replicas: Replicas | None,
        replica_gradients: ReplicaGradients | None,
        scaler: ResblockGradScaler | None,
        others: Callable[[], Sequence[Fragment]],
    ) -> None:
        self._engine, self._ranks, self._replicas = engine, ranks, replicas
        self._replica_gradients, self._scaler, self._others = replica_gradients, scaler, others

    def snapshot(self, client_state: dict[str, Any], averages: Mapping[str, Tensor], copy: bool) -> Snapshot:
        """See `PriorEngine.snapshot`."""
        parameters = dict(self._engine.module.named_parameters())
        shapes = self._shapes()
        # all replicas have the same weights, so only the first one writes them
        is_writer = self._replicas is None or self._replicas.index == 0
        n_shards = self._replicas.n_shards if self._replicas else self._ranks.world_size
        layout = layout_of(self._engine, n_shards, self._replica_gradients.error_kinds if self._replica_gradients else ())
        parts = collect(self._engine, shapes, layout, self._others()) if is_writer else StateParts(shapes)
        own = {name: (start, start + len(parts.tensors[kind, name])) for (kind, name), start in parts.starts.items()}
        assert set(layout.writers({WEIGHTS: own})) <= {self._ranks.rank}, "the layout does not describe DeepSpeed's shards"
        for name, average in averages.items() if is_writer else ():
            if hasattr(parameters[name], "ds_id") or self._ranks.is_main:  # below stage 3 all ranks have all averages
                parts.add(AVERAGE, name, shard_start(parameters[name]), average)
        factors = self._replica_gradients.collect(parts) if self._replica_gradients else {}
        state = None
        if self._ranks.is_main:
            state = {
                "client": client_state,
                "block_scaler": self._scaler.state_dict() if self._scaler else None,
                "loss_scaler": _plain_values(getattr(self._engine.optimizer, "loss_scaler", None)),
                "counters": counters_of(self._engine),
                "world_size": self._ranks.world_size,
                "layout": layout.model_dump(),
                "shapes": {name: list(shape) for name, shape in shapes.items()},
                "steps": parts.steps,
            }
        return Snapshot(parts.copied() if copy else parts, factors, state, self._ranks.rank, self._ranks.world_size)

    @torch.no_grad()
    def read(self, saved: SavedState, averages: Mapping[str, Tensor]) -> list[str]:
        """See `PriorEngine.read_state`."""
        expected = self._shapes()
        if saved.shapes != expected:
            different = sorted(saved.shapes.items() ^ expected.items())
            raise Damaged(f"{saved.url} belongs to another model: only one of the two has {different[:4]}")
        ranges, takes = self._restoring(saved, averages)
        return saved.pour(ranges, lambda kind, name, dtype: takes[family_of(kind)](kind, name, dtype))

    def start_from(self, saved: SavedState) -> None:
        """Use what was read. Call on all ranks; parameters that stay gathered must be refreshed afterwards."""
        copy_to_working_weights(self._engine, self._others())
        if self._replica_gradients:
            self._replica_gradients.use_read_errors()
            self._replica_gradients.load_factors(saved)
        state = saved.state
        set_counters(self._engine, state["counters"])
        loss_scaler = getattr(self._engine.optimizer, "loss_scaler", None)  # without ZeRO, torch's optimizer has none
        for name, value in state["loss_scaler"].items() if loss_scaler is not None else ():
            setattr(loss_scaler, name, value)
        if self._scaler and state["block_scaler"]:
            self._scaler.load_state_dict(state["block_scaler"])

    def _restoring(self, saved: SavedState, averages: Mapping[str, Tensor]) -> tuple[Ranges, dict[str, Take]]:
        """The ranges that this rank needs, and what gets their values, by family of kinds."""
        parameters, of_averages = dict(self._engine.module.named_parameters()), {}
        for name, average in averages.items():
            start = shard_start(parameters[name])
            end = max(start, min(start + average.numel(), saved.shapes[name].numel()))
            of_averages[name] = start, end
            average.view(-1)[end - start :].zero_()  # ZeRO's padding

        def take_average(_kind: str, name: str, _dtype: torch.dtype) -> Put:
            return put_into(averages[name].view(-1), of_averages[name][0])

        of_fragments, take_fragment = restoring(self._engine, saved, self._others())
        ranges: dict[str, Mapping[str, tuple[int, int]]] = {**of_fragments, AVERAGE: of_averages}
        takes = {**dict.fromkeys(of_fragments, take_fragment), AVERAGE: take_average}
        if self._replica_gradients:
            of_errors, takes[ERROR] = self._replica_gradients.restoring(saved)
            ranges |= of_errors
        return ranges, takes

    def _shapes(self) -> dict[str, torch.Size]:
        """Shapes of the whole parameters, by name."""
        parameters = self._engine.module.named_parameters()
        return {name: torch.Size(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in parameters}


def counters_of(engine: DeepSpeedEngine) -> dict[str, int]:
    """The numbers of updates, samples and skipped updates that DeepSpeed counts."""
    return {name: getattr(engine, name) for name in _COUNTERS}


def set_counters(engine: DeepSpeedEngine, counters: Mapping[str, int]) -> None:
    """Set what `counters_of` returned, maybe on another number of ranks."""
    for name, value in counters.items():
        setattr(engine, name, value)
    # The number of micro-batches depends on the number of ranks. DeepSpeed steps when micro_steps is a multiple of it.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def _plain_values(thing: object) -> dict[str, Any]:
    """Attributes that are numbers or flags. They are the whole state of DeepSpeed's loss scalers."""
    return {name: value for name, value in vars(thing).items() if isinstance(value, int | float)} if thing is not None else {}
