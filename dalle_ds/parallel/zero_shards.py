"""Which range of each flat parameter a rank of a ZeRO engine owns, and the optimizer state of this range."""

from collections.abc import Iterator, MutableMapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_ds.parallel.checkpoint_layout import OPTIMIZER, WEIGHTS, FlatGroup, Layout
from dalle_ds.parallel.checkpoint_tensors import StateParts
from dalle_ds.parallel.deepspeed_api import DeepSpeedEngine, dist
from dalle_ds.parallel.saved_state import Put, Ranges, SavedState, Take


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


def layout_of(engine: DeepSpeedEngine, n_shards: int, errors: tuple[str, ...] = ()) -> Layout:
    """Which rank holds which range of each parameter, for a checkpoint of replicas of `n_shards` ranks.

    Args:
        errors: kinds of PowerSGD's errors, by replica.
    """
    stage, zero, parameters = engine.zero_optimization_stage(), engine.optimizer, dict(engine.module.named_parameters())
    if stage in (1, 2):
        names = {id(parameter): name for name, parameter in parameters.items()}
        groups = [
            FlatGroup(partition=size, offsets={names[id(p)]: at for p, at in zip(group, offsets, strict=True)})
            for group, offsets, size in zip(
                zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, zero.partition_size, strict=True
            )
        ]
    else:
        groups = [FlatGroup(partition=getattr(p, "ds_tensor", p).numel(), offsets={name: 0}) for name, p in parameters.items()]
    return Layout(n_shards=n_shards, groups=tuple(groups), whole_averages=stage < 3, errors=errors)


def collect(
    engine: DeepSpeedEngine, shapes: dict[str, torch.Size], layout: Layout, others: Sequence[Fragment] = ()
) -> StateParts:
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
    for group in layout.groups:  # below stage 3, a rank may hold nothing of a parameter whose group it steps on
        steps = [parts.steps[name] for name in group.offsets if name in parts.steps]
        parts.steps |= dict.fromkeys(group.offsets, steps[0]) if steps else {}
    return parts


@torch.no_grad()
def restoring(engine: DeepSpeedEngine, saved: SavedState, others: Sequence[Fragment] = ()) -> tuple[Ranges, Take]:
    """Clear this rank's optimizer state, and return what `SavedState.pour` needs to fill its fragments: their ranges, and where
    weights and optimizer state go. Ranks don't communicate. Afterwards call `copy_to_working_weights`."""
    found = {fragment.name: fragment for fragment in fragments(engine, others)}
    for flat, states in {fragment.flat: fragment.states for fragment in found.values()}.items():
        for entry in states.setdefault(flat, {}).values():  # of a damaged checkpoint, or made by DeepSpeed
            entry.zero_()
    ranges = {}
    for name, fragment in found.items():
        end = min(fragment.start + fragment.values.numel(), saved.shapes[name].numel())
        ranges[name] = fragment.start, max(fragment.start, end)
        fragment.values[max(0, end - fragment.start) :].zero_()  # ZeRO's padding
        if name in saved.steps:
            step = torch.tensor(saved.steps[name], dtype=torch.float32, device=fragment.flat.device)
            fragment.states[fragment.flat]["step"] = step

    def take(kind: str, name: str, dtype: torch.dtype) -> Put:
        fragment = found[name]
        if kind == WEIGHTS:
            target = fragment.values
        else:
            entries, key = fragment.states[fragment.flat], kind.removeprefix(f"{OPTIMIZER}.")
            if key not in entries:  # this optimizer has not stepped yet, and creates its state in its first step
                entries[key] = torch.zeros_like(fragment.flat, dtype=dtype, requires_grad=False)
            target = fragment.of(entries[key])
        return put_into(target, fragment.start)

    return {WEIGHTS: ranges, OPTIMIZER: ranges}, take


def put_into(target: Tensor, start: int) -> Put:
    """Copies values into the flat `target`, which begins at index `start` of its parameter."""

    def put(at: int, values: Tensor) -> None:
        with torch.no_grad():  # a setting of the thread
            target[at - start : at - start + len(values)].copy_(values)

    return put


@torch.no_grad()
def copy_to_working_weights(engine: DeepSpeedEngine, others: Sequence[Fragment] = ()) -> None:
    """Update the weights that forward passes use. Without ZeRO they are the fragments themselves. With ZeRO they are copies in
    the engine's dtype. All ranks must call it together."""
    stage, parameters = engine.zero_optimization_stage(), dict(engine.module.named_parameters())
    if stage == 3:
        for fragment in fragments(engine, others):
            parameters[fragment.name].ds_tensor.view(-1).copy_(fragment.values)
    elif stage > 0:
        engine.optimizer.update_lp_params()


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
