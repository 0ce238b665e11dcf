"""The training engine: updates equal to plain fp32, a resume, a skipped update, other batch sizes, no memory growth."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from dalle_ds.acceptance.engines import LEARNING_RATE, make_engine, overflowing
from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.acceptance.sizes import Batch, random_batch, small_prior
from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import IMAGE_WEIGHT, TEXT_WEIGHT, Prior, PriorConfig, initialise
from dalle_ds.optim.groups import decay_groups
from dalle_ds.parallel.engine import PriorEngine, UpdateReport
from dalle_ds.parallel.ranks import join, leave

LOSS_TOLERANCE = 2e-4
"""Relative difference. fp16 rounds a branch's output by 2^-11 at each of its matrices; losses of single tokens differ by 1e-3,
means over thousands of tokens by less than 1e-4. A wrong mask, scale or weight decay changes the second digit."""
NORM_TOLERANCE = 1e-2
"""Relative difference. The gradient norm summarises the whole backward pass, in which fp16 rounds twice as often."""
KEPT_BYTES = 1 << 20
"""ZeRO-3 may keep a different small parameter gathered than before. Leaked activations or gradients are far larger."""
NATS_BETWEEN_BATCH_SIZES = 2e-3
"""Between a sample's loss in a batch of one and in a larger batch: other sizes use kernels that sum in another order."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    ranks = join()
    config = small_prior(place)
    data = [random_batch(config, 2, seed) for seed in range(8)]
    engine = make_engine(place, ranks, config, micro_batch=2)

    expected = list(plain_updates(config, place.device, data[:4]))
    found = [told(engine.update([batch], LEARNING_RATE)) for batch in data[:4]]
    against_plain(record, found, expected)

    with tempfile.TemporaryDirectory() as folder:
        _resume(record, engine, Path(folder), data[4])
    _skip(record, engine, data[5])
    _sizes(record, engine, config)
    _growth(record, place, engine, data[6])
    leave()


def plain_updates(config: PriorConfig, device: torch.device, batches: list[Batch]) -> Iterator[tuple[float, float, float]]:
    """Take the engine's updates without DeepSpeed, fp16 and sparse kernels. Yields (text loss, image loss, gradient norm)."""
    prior = Prior(config)
    initialise(prior, torch.Generator().manual_seed(0))
    prior.to(device)
    use_attention(prior, "dense", device)
    groups = decay_groups(prior.named_parameters(), 0.045)
    for group in groups:
        del group["names"]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.96), eps=1e-8)
    for text_BT, image_BN in batches:
        nll = prior(text_BT.to(device), image_BN.to(device))
        text, image = nll.text_sum / nll.n_text, nll.image_sum / nll.n_image
        (TEXT_WEIGHT * text + IMAGE_WEIGHT * image).backward()
        norm = torch.nn.utils.clip_grad_norm_(prior.parameters(), 4.0)
        optimizer.step()
        optimizer.zero_grad()
        yield text.item(), image.item(), norm.item()


def told(report: UpdateReport) -> tuple[float, float, float]:
    """Returns the engine's (text loss, image loss, gradient norm), as `plain_updates` yields them."""
    return report.text_loss, report.image_loss, report.grad_norm


def against_plain(record: Record, found: list[tuple[float, ...]], expected: list[tuple[float, ...]], label: str = "") -> None:
    """Add rows for the largest differences between the engine's updates and the plain ones."""
    record.detail(f"{label}updates", found)
    record.detail(f"{label}plain_updates", expected)
    why = f"{len(found)} consecutive updates, against plain fp32 with dense attention"
    for i, (name, tolerance) in enumerate(
        (("text loss", LOSS_TOLERANCE), ("image loss", LOSS_TOLERANCE), ("gradient norm", NORM_TOLERANCE))
    ):
        difference = max(_relative(ours[i], plain[i]) for ours, plain in zip(found, expected, strict=True))
        record.at_most(f"{label}{name}: relative difference from fp32", difference, tolerance, why)


def _resume(record: Record, engine: PriorEngine, folder: Path, batch: Batch) -> None:
    engine.save(folder, {"note": 7})
    first = told(engine.update([batch], LEARNING_RATE))
    again = []
    for _ in range(2):
        note = engine.load(folder)["note"]
        again.append(told(engine.update([batch], LEARNING_RATE)))
    why = "the same update from the same state, twice: kernels with a nondeterministic order of sums differ"
    spread = max(map(_relative, *again))
    record.should("one update repeated: relative difference", spread, spread == 0, "0", why)
    why = "an update after load equals the one after save, up to the difference of a repeated update"
    record.at_most("resumed update: relative difference", max(map(_relative, again[0], first)), 10 * spread, why)
    record.equal("client state of the checkpoint", note, 7, "the training loop resumes from it")


def _skip(record: Record, engine: PriorEngine, batch: Batch) -> None:
    before = {name: shard.clone() for name, shard in engine.shards().items()}
    assert engine.scaler is not None
    block = engine.scaler.names[1]
    with overflowing(engine.module.get_submodule(block).branch):
        hit = engine.update([batch], LEARNING_RATE)
    why = "an Inf in one block: the paper skips the update and lowers only that block's scale"
    record.equal("update with an overflow took its step", hit.took_step, False, why)
    record.equal("blocks that overflowed", ", ".join(hit.nonfinite_blocks), block, why)
    changed = [name for name, shard in engine.shards().items() if not torch.equal(shard, before[name])]
    record.equal("parameters that the skipped update changed", len(changed), 0, why)
    after = [engine.update([batch], LEARNING_RATE) for _ in range(2)]
    why = "a skipped update must leave no state behind: no NaN in ZeRO's padding, no changed counter"
    record.equal("the next two updates took their steps", [r.took_step for r in after] == [True, True], True, why)
    finite = all(math.isfinite(r.grad_norm) and math.isfinite(r.loss) for r in after)
    record.equal("the next two updates have finite loss and norm", finite, True, why)


def _sizes(record: Record, engine: PriorEngine, config: PriorConfig) -> None:
    """Check other batch sizes, such as validation's last batch and a checkpoint's parity batch: each compiles other kernels."""
    text_BT, image_BN = random_batch(config, 3, 99)
    alone = torch.cat([engine.image_nll(text_BT[i : i + 1], image_BN[i : i + 1]) for i in range(3)])
    difference = float((engine.image_nll(text_BT, image_BN).mean(1) - alone.mean(1)).abs().max())
    why = "a sample's mean loss must not depend on the other samples of its batch"
    record.at_most("batch of 3: difference from single samples, nats", difference, NATS_BETWEEN_BATCH_SIZES, why)


def _growth(record: Record, place: Place, engine: PriorEngine, batch: Batch) -> None:
    def allocated() -> int:
        engine.update([batch], LEARNING_RATE)
        place.wait()
        return 0 if place.is_rehearsal else torch.cuda.memory_allocated()

    used = [allocated() for _ in range(4)]
    record.at_most("bytes of memory growth in three updates", used[-1] - used[0], KEPT_BYTES, "430,000 updates multiply a leak")


def _relative(ours: float, other: float) -> float:
    return abs(ours - other) / abs(other)
