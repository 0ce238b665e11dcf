"""Cases of test_lint.py, run on the fake CUDA device in a new process. They return counts, host waits and peak memory."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch

from dalle_ds.bench.fake_cuda.compiled import compiled_stand_ins
from dalle_ds.bench.fake_cuda.counts import Counts
from dalle_ds.bench.fake_cuda.device import FakeGPU, fake_cuda
from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import Prior, PriorConfig, initialise
from dalle_ds.optim.adamw import ClippedAdamW
from dalle_ds.optim.groups import decay_groups
from dalle_ds.parallel.activation_checkpointing import recompute_layers
from dalle_ds.parallel.ranks import ALONE
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.precision.resblock_scaling import ResblockGradScaler, ResblockScalingConfig
from dalle_ds.sampling.generate import generate
from dalle_ds.training.clip.config import ClipRunConfig
from dalle_ds.training.clip.trainer import ClipTrainer
from dalle_ds.training.dvae.config import DVAERunConfig
from dalle_ds.training.dvae.metrics import BATCH, measure
from dalle_ds.training.dvae.trainer import DVAETrainer
from dalle_ds.training.image_run import raw_data
from dalle_ds.training.preemption import StopFlag
from dalle_ds.training.run import TrainingRun
from preprocessing.demo.drawn import draw
from tests.support.images import encoded

Found = dict[str, Any]
GIB = 2**30


def first_weights(n_heads: int) -> str:
    """Draw initial weights on the CPU, as in a run, for a model on the device. Returns the device of the weights."""
    with fake_cuda() as gpu:
        with gpu.device:
            prior = Prior(PriorConfig(n_layers=1, n_heads=n_heads))
        initialise(prior, torch.Generator().manual_seed(0))
        return str(prior.embed.row.device)


def prior_step(n_heads: int, n_samples: int, recomputed: bool, low_bit: bool) -> Found:
    """The training step of one device, without DeepSpeed: kernels and peak memory per layer, host waits of the whole step."""
    with fake_cuda() as gpu, compiled_stand_ins(gpu):
        fewer, more = (_step(gpu, n, n_heads, n_samples, recomputed, low_bit) for n in (1, 5))
    layer, update = ((more[i] - fewer[i]) / 4 for i in (0, 1))
    return {
        "kernels": layer.n_kernels,
        "kernels_optimizer": update.n_kernels,
        "syncs": more[0].sync_places(),
        "syncs_optimizer": update.sync_places(),
        "layer_mib": (more[2] - fewer[2]) / 4 / 2**20,
        "attention": more[3],
    }


def _step(
    gpu: FakeGPU, n_layers: int, n_heads: int, n_samples: int, recomputed: bool, low_bit: bool
) -> tuple[Counts, Counts, int, str]:
    config = PriorConfig(n_layers=n_layers, n_heads=n_heads)
    before = gpu.live_bytes
    with gpu.device:
        prior = Prior(config)
    scaler = ResblockGradScaler(prior, ResblockScalingConfig(), gpu.device)
    attention = use_attention(prior, "auto", gpu.device)
    if recomputed:
        recompute_layers(prior)
    groups = decay_groups(prior.named_parameters(), 0.045, "low_bit" if low_bit else "fp32")
    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    optimizer = ClippedAdamW(groups, lr=1e-4, moments="low_bit" if low_bit else "fp32")
    text_BT = torch.empty(n_samples, config.text_len - 1, dtype=torch.int64, device=gpu.device)
    image_BN = torch.empty(n_samples, config.n_image, dtype=torch.int64, device=gpu.device)
    with gpu.counting() as step, gpu.measuring_peak() as peak:
        scaler.begin()
        nll = prior(text_BT, image_BN, n_text=40 * n_samples)
        (nll.text_sum / 8 + nll.image_sum).backward()
        scaler.unscale()
        peak_bytes = peak() - before
    with gpu.counting() as update:
        optimizer.step()
    return step, update, peak_bytes, attention


def sampling(n_heads: int, in_fp16: bool) -> Found:
    """Sample the last few tokens of 16 images of one caption with `generate`. After two warm-up steps, a step is captured as a
    CUDA graph. Replays launch nothing on the fake device, so the remaining work per token is `generate`'s own."""

    def run(gpu: FakeGPU, n_layers: int, n_tokens: int) -> Counts:
        config = PriorConfig(n_layers=n_layers, n_heads=n_heads)
        with gpu.device:
            prior = Prior(config)
        if in_fp16:
            use_fp16_branches(prior)
        text_CT = torch.randint(config.vocab_size, (1, config.text_len - 1))
        prime_CP = torch.randint(config.n_codes, (1, config.n_image - n_tokens))
        with gpu.counting() as counts:
            generate(prior, text_CT, [range(16)], prime_codes_CP=prime_CP)
        return counts

    def prefilled(gpu: FakeGPU, n_layers: int) -> Counts:
        return run(gpu, n_layers, 1)  # the last token needs no step

    with fake_cuda() as gpu:
        run(gpu, 5, 2)  # allocates state that later runs share
        few, more = run(gpu, 1, 2), run(gpu, 1, 5)
        step = run(gpu, 5, 2) - prefilled(gpu, 5) - (few - prefilled(gpu, 1))
    return {
        "syncs": few.sync_places(),
        "syncs_token": (more - few).sync_places(),
        "kernels_token": (more - few).n_kernels / 3,
        "kernels_layer": step.n_kernels / 4 / 3,
    }


def dvae_update(folder: str) -> Found:
    """An update of the paper's dVAE at 256 pixels in fp16, a micro-batch of 8, and a validation."""
    run = DVAERunConfig(
        folder=str(Path(folder, "run")),
        data={"raw": _raw(Path(folder, "raw"), 300), "validation_fraction": 0.2},
        global_batch=8,
        optimizer={"clip": 1.0},
    )
    with fake_cuda() as gpu:
        trainer = DVAETrainer(TrainingRun(Path(run.folder), ALONE, StopFlag()), run, "lint", raw_data(run.data.raw))
        trainer._step(False)  # allocates the optimizer's state
        with gpu.counting() as update, gpu.measuring_peak() as peak:
            trainer._step(False)
        found = {"syncs": update.sync_places(), "gib": peak() / GIB, "device": str(trainer.device)}
        with gpu.counting() as validation, gpu.measuring_peak() as peak:
            measure(trainer.model, trainer.validation[:BATCH], 0.5, None, trainer.ranks)
        trainer.close()
        return {**found, "syncs_validation": validation.sync_places(), "gib_validation": peak() / GIB}


def clip_update(folder: str) -> Found:
    """An update of a CLIP in bf16."""
    run = ClipRunConfig(
        folder=str(Path(folder, "run")),
        data={"raw": _raw(Path(folder, "raw"), 40), "validation_fraction": 0.2},
        global_batch=16,
        precision="bf16",
    )
    with fake_cuda() as gpu:
        trainer = ClipTrainer(TrainingRun(Path(run.folder), ALONE, StopFlag()), run, "lint", raw_data(run.data.raw))
        with gpu.counting() as counts:
            trainer._step(False)
        trainer.close()
        return {"syncs": counts.sync_places(), "device": str(trainer.device)}


def _raw(root: Path, size: int) -> str:
    root.mkdir(parents=True)
    root.with_name("run").mkdir()
    with tarfile.open(root / "0.tar", "w") as tar:
        for i in range(48):
            drawing = draw(i, size)
            about = {"caption": f"{drawing.caption} {i}", "group": str(i)}
            for name, data in ((f"{i:03d}.png", encoded(drawing.image)), (f"{i:03d}.json", json.dumps(about).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(root)
