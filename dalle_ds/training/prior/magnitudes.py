"""Observe every block of a model in one update: its largest magnitudes, and where Inf or NaN appears first."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dalle_ds.data.tokens.batches import TokenBatch
from dalle_ds.parallel.engine import PriorEngine, UpdateReport
from dalle_ds.parallel.zero_shards import shard_start
from dalle_ds.precision.fp16_branches import resblocks_of
from dalle_ds.tracking.charts import curves

WEIGHTS, FORWARD, GRADIENT = "weights", "forward", "gradient"
MAX_SAMPLES = 32
"""Maximum number of samples in a finding."""


@dataclass
class Magnitude:
    """The largest finite absolute value in some tensors, and whether all their values are finite."""

    largest: float = 0.0
    is_finite: bool = True

    def add(self, tensor: Tensor) -> None:
        if tensor.numel():
            finite = torch.nan_to_num(tensor.detach(), nan=0.0, posinf=0.0, neginf=0.0)
            self.join(Magnitude(float(finite.abs().max()), bool(torch.isfinite(tensor).all())))

    def join(self, other: "Magnitude") -> None:
        self.largest, self.is_finite = max(self.largest, other.largest), self.is_finite and other.is_finite


@dataclass
class Block:
    """Observations of one part of the model: a residual block, the embeddings (`embed`) or the output heads (`heads`)."""

    name: str
    gradient_scale_log2: float | None
    """log2 of its gradient scale. None without per-resblock scaling."""
    weights: Magnitude = field(default_factory=Magnitude)
    forward: Magnitude = field(default_factory=Magnitude)
    """Its outputs: of a residual block the identity path after it, of the heads the losses."""
    gradient: Magnitude = field(default_factory=Magnitude)
    """Gradients of its parameters, un-scaled, before the average over ranks."""
    ranks: list[int] = field(default_factory=list)
    """Ranks on which its outputs or gradients were not finite."""

    def join(self, other: "Block") -> None:
        """Merge the observations of another rank."""
        for what in (WEIGHTS, FORWARD, GRADIENT):
            getattr(self, what).join(getattr(other, what))
        self.ranks += other.ranks


@dataclass(frozen=True)
class Finding:
    """The observations of one update, on all ranks."""

    report: UpdateReport
    blocks: list[Block]
    """All blocks, in the order from the input to the heads."""
    samples: list[dict[str, Any]]
    """Key, shard, caption and rank of the samples whose outputs were not finite, at most MAX_SAMPLES. If only the gradients of
    a rank were not finite, all samples of the rank are included."""

    @property
    def event(self) -> str:
        """The block and the pass in which Inf or NaN appears first, or "none". The backward pass runs from the heads."""
        forward = [block.name for block in self.blocks if not block.forward.is_finite]
        backward = [block.name for block in self.blocks if not block.gradient.is_finite]
        if forward:
            return f"{forward[0]}, forward pass"
        return f"{backward[-1]}, backward pass" if backward else "none"

    @property
    def block(self) -> Block | None:
        """The block of `event`. None if there is no event."""
        return next((block for block in self.blocks if block.name == self.event.partition(",")[0]), None)

    def describe(self) -> str:
        """Describe the event in one sentence."""
        block = self.block
        if block is None:
            return "When the update was repeated, all blocks were finite."
        scale = "" if block.gradient_scale_log2 is None else f", gradient scale 2^{block.gradient_scale_log2:.1f}"
        weights = "" if block.weights.is_finite else ", and some weights are not finite"
        ranks = ", ".join(map(str, block.ranks[:8])) + (", ..." if len(block.ranks) > 8 else "")
        return (
            f"First non-finite value: {self.event}, on rank {ranks}; "
            f"the block's largest weight is {_power(block.weights.largest)}{weights}{scale}."
        )

    def table(self) -> str:
        """Table with a line per block: magnitudes as powers of two, marked "!" if the values include Inf or NaN."""
        columns = ("block", "scale", WEIGHTS, FORWARD, GRADIENT)
        lines = ["{:<24}{:>9}{:>14}{:>14}{:>14}".format(*columns)]
        for block in self.blocks:
            scale = "" if block.gradient_scale_log2 is None else f"2^{block.gradient_scale_log2:.1f}"
            magnitudes = (block.weights, block.forward, block.gradient)
            values = [f"{_power(m.largest)}{' ' if m.is_finite else '!'}" for m in magnitudes]
            lines.append("{:<24}{:>9}{:>14}{:>14}{:>14}".format(block.name, scale, *values))
        return "\n".join(lines)


def look_into(engine: PriorEngine, micro_batches: Sequence[TokenBatch], lr: float) -> Finding:
    """Do an update with this rank's part of a global batch, and observe every block. All ranks must call it together."""
    names = ["embed", *(name for name, _ in resblocks_of(engine.module)), "heads"]
    scales = engine.scaler.log2_scales() if engine.scaler else {}
    # the hooks get gradients that are still scaled
    in_use = {name: 2**power * engine.scaler.n_micro_batches for name, power in scales.items()} if engine.scaler else {}
    seen = {name: Block(name, scales.get(name)) for name in names}
    for name, values in _own_weights(engine).items():
        seen[_block_of(name, names)].weights.add(values)
    with _hooks(engine.module, seen) as bad_rows:
        report = engine.update([(batch.text_BT, batch.image_BN) for batch in micro_batches], lr)
    rank = engine.ranks.rank
    for block in seen.values():
        block.gradient.largest /= (report.loss_scale or 1.0) * in_use.get(block.name, 1.0)
        if not (block.forward.is_finite and block.gradient.is_finite):
            block.ranks.append(rank)
    if not bad_rows and any(block.ranks for block in seen.values()):
        bad_rows.update((number, row) for number, batch in enumerate(micro_batches) for row in range(len(batch)))
    samples = [_sample(micro_batches[number], row) | {"rank": rank} for number, row in sorted(bad_rows)]
    blocks, all_samples = [], []
    for found, of_rank in engine.ranks.gather_objects((list(seen.values()), samples[:MAX_SAMPLES])):
        if not blocks:
            blocks = found
        else:
            for block, other in zip(blocks, found, strict=True):
                block.join(other)
        all_samples += of_rank
    return Finding(report, blocks, all_samples[:MAX_SAMPLES])


def magnitudes_chart(finding: Finding, title: str) -> Image.Image:
    """Line chart of the magnitudes over the blocks, with a gap for a block with non-finite values."""
    places = list(range(len(finding.blocks)))
    magnitudes = {what: [getattr(block, what) for block in finding.blocks] for what in (WEIGHTS, FORWARD, GRADIENT)}
    lines = {
        what: (places, [math.log2(m.largest) if m.largest and m.is_finite else math.nan for m in values])
        for what, values in magnitudes.items()
    }
    return curves(title, lines, x_label="block, from the embeddings to the heads", y_label="log2 of the largest magnitude")


@contextmanager
def _hooks(model: nn.Module, seen: dict[str, Block]) -> Iterator[set[tuple[int, int]]]:
    """Context in which the passes of `model` are recorded in `seen`. Yields the (micro-batch, row) of samples with non-finite
    outputs; the set fills as the passes run."""
    bad_rows: set[tuple[int, int]] = set()
    n_batches = 0

    def watch_forward(block: Block) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal n_batches
            n_batches += block.name == "embed"
            block.forward.add(output)
            if output.dim() > 1:
                finite_rows = torch.isfinite(output.detach()).flatten(1).all(1)
                bad_rows.update((n_batches - 1, row) for row in (~finite_rows).nonzero().flatten().tolist())

        return hook

    def watch_gradient(block: Block) -> Any:
        return lambda grad: block.gradient.add(grad)

    outputs = {"heads.text": "heads", "heads.image": "heads"} | {name: name for name in seen if name != "heads"}
    handles = [model.get_submodule(name).register_forward_hook(watch_forward(seen[of])) for name, of in outputs.items()]
    handles += [p.register_hook(watch_gradient(seen[_block_of(name, seen)])) for name, p in model.named_parameters()]
    try:
        yield bad_rows
    finally:
        for handle in handles:
            handle.remove()


def _own_weights(engine: PriorEngine) -> dict[str, Tensor]:
    """This rank's shard of every parameter, without the padding."""
    shards, parameters = engine.shards(), dict(engine.module.named_parameters())
    ends = {name: getattr(p, "ds_numel", p.numel()) - shard_start(p) for name, p in parameters.items()}
    return {name: shard.flatten()[: max(0, ends[name])] for name, shard in shards.items()}


def _block_of(parameter: str, blocks: Iterable[str]) -> str:
    return next(name for name in blocks if parameter.startswith(f"{name}."))


def _sample(batch: TokenBatch, row: int) -> dict[str, Any]:
    return {"key": batch.keys[row], "shard": batch.shards[row], "caption": batch.captions[row]}


def _power(value: float) -> str:
    return f"2^{math.log2(value):.1f}" if value else "0"
