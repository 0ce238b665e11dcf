"""Which range of each flat parameter a rank of a ZeRO engine owns, and the optimizer state of this range."""

from collections.abc import Iterator, MutableMapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from torch import Tensor

from dalle_ds.parallel.checkpoint_tensors import OPTIMIZER, WEIGHTS, SavedState, StateParts


@dataclass(frozen=True)
class Fragment:
    """A range of one flat parameter, with the values that an optimizer steps on."""

    name: str
    start: int
    values: Tensor
    """Flat. ZeRO-3 pads it beyond the parameter's end. fp32, except for matrices without masters (`masterless`)."""
    flat: Tensor
    """The tensor that the optimizer steps on. It may hold many fragments."""
    offset: int
    """Index in `flat` at which the fragment begins."""
    states: MutableMapping[Tensor, dict[str, Tensor]]
    """`state` of the optimizer that steps on `flat`."""

    def state(self) -> dict[str, Tensor]:
        """Views of the optimizer's state entries for this fragment."""
        entries = self.states.get(self.flat, {})
        return {key: self.of(entry) for key, entry in entries.items() if entry.shape == self.flat.shape}

    def of(self, entry: Tensor) -> Tensor:
        """View of this fragment in a tensor that is shaped like `flat`."""
        return entry.view(-1).narrow(0, self.offset, self.values.numel())


def fragments(engine: DeepSpeedEngine, others: Sequence[Fragment] = ()) -> Iterator[Fragment]:
    """Yield this rank's fragments, at any ZeRO stage. Without ZeRO, each rank owns every parameter completely.

    `others` are fragments of parameters that DeepSpeed's optimizer does not own. They come last.

    This uses the attributes on which DeepSpeed's own fragment functions are built. Those functions return no step counts and
    create no state before the first step.
    """
    zero = engine.optimizer
    states, known = getattr(zero, "optimizer", zero).state, {fragment.name for fragment in others}  # ZeRO wraps an optimizer
    for name, parameter in engine.module.named_parameters():
        if name in known:
            continue
        if engine.zero_optimization_stage() == 0:
            yield Fragment(name, 0, parameter.detach().view(-1), parameter, 0, states)
        elif hasattr(parameter, "ds_id"):
            group, offset, n = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group]
            yield Fragment(name, shard_start(parameter), flat.detach().narrow(0, offset, n), flat, offset, states)
        elif parameter._hp_mapping is not None:  # None if other ranks own all of it
            mapping = parameter._hp_mapping
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            offset = mapping.get_hp_fragment_address().start
            yield Fragment(name, mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach(), flat, offset, states)
    yield from others


def shard_start(parameter: torch.nn.Parameter) -> int:
    """Index in the flat parameter at which this rank's ZeRO-3 shard begins. 0 if parameters are not sharded."""
    if not hasattr(parameter, "ds_id"):
        return 0
    return dist.get_rank(group=parameter.ds_process_group) * parameter.ds_tensor.numel()


def collect(engine: DeepSpeedEngine, shapes: dict[str, torch.Size], others: Sequence[Fragment] = ()) -> StateParts:
    """Collect this rank's weights and optimizer state for a checkpoint. The tensors are views."""
    parts = StateParts(shapes)
    if engine.zero_optimization_stage() == 0 and dist.get_rank() != 0:
        return parts  # without ZeRO, rank 0 holds the same values
    for fragment in fragments(engine, others):
        parts.add(WEIGHTS, fragment.name, fragment.start, fragment.values)
        for key, values in fragment.state().items():
            parts.add(f"{OPTIMIZER}.{key}", fragment.name, fragment.start, values)
        if "step" in fragment.states.get(fragment.flat, {}):
            parts.steps[fragment.name] = float(fragment.states[fragment.flat]["step"])
    return parts


@torch.no_grad()
def restore(engine: DeepSpeedEngine, saved: SavedState, others: Sequence[Fragment] = ()) -> None:
    """Load saved weights and optimizer state into this rank's fragments.
    Any number of ranks, at any ZeRO stage, may have written them."""
    for fragment in fragments(engine, others):
        entries, size = fragment.states.setdefault(fragment.flat, {}), fragment.values.numel()
        if fragment.name in saved.steps:
            entries["step"] = torch.tensor(saved.steps[fragment.name], dtype=torch.float32, device=fragment.flat.device)
        for kind in saved.kinds(fragment.name):
            if kind == WEIGHTS:
                target = fragment.values
            elif kind.startswith(f"{OPTIMIZER}."):
                key = kind.removeprefix(f"{OPTIMIZER}.")
                if key not in entries:  # this optimizer has not stepped yet, and creates its state in its first step
                    entries[key] = torch.zeros_like(fragment.flat, dtype=saved.dtype(kind, fragment.name), requires_grad=False)
                target = fragment.of(entries[key])
            else:
                continue  # other kinds, such as the EMA, are not loaded here
            values = saved.read(kind, fragment.name, fragment.start, fragment.start + size)
            target[: values.numel()].copy_(values)
            target[values.numel() :].zero_()
    _copy_to_working_weights(engine, saved, others)


@contextmanager
@torch.no_grad()
def unchanged(engine: DeepSpeedEngine, names: Set[str], others: Sequence[Fragment] = ()) -> Iterator[None]:
    """Context manager that restores these parameters' weights and optimizer entries when it ends. ZeRO-3 only.

    Step counts are not restored: a step count belongs to one of ZeRO's flat tensors, which many parameters share.
    """
    parameters, kept = dict(engine.module.named_parameters()), []
    for fragment in fragments(engine, others) if names else ():
        if fragment.name in names:
            kept += [fragment.values, parameters[fragment.name].ds_tensor, *fragment.state().values()]
    copies = [tensor.clone() for tensor in kept]
    yield
    for tensor, copy in zip(kept, copies, strict=True):
        tensor.copy_(copy)


def _copy_to_working_weights(engine: DeepSpeedEngine, saved: SavedState, others: Sequence[Fragment]) -> None:
    """Update the weights that forward passes use. Without ZeRO they are the fragments themselves.
    With ZeRO they are copies in the engine's dtype."""
    stage, parameters = engine.zero_optimization_stage(), dict(engine.module.named_parameters())
    if stage == 3:
        for fragment in fragments(engine, others):
            parameters[fragment.name].ds_tensor.view(-1).copy_(fragment.values)
    elif stage > 0:
        for name, parameter in parameters.items():  # parameters are whole on every rank, a rank's fragments are not
            parameter.copy_(saved.whole(WEIGHTS, name))
