"""The prior that a benchmark measures, and its training step.

B batch, T text slots, N image tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from dalle_ds.bench.harness.machine import Machine
from dalle_ds.bench.harness.settings import PriorBenchConfig, TrainingBenchConfig
from dalle_ds.models.prior import IMAGE_WEIGHT, TEXT_WEIGHT, Prior, PriorConfig, initialise
from dalle_ds.optim.groups import decay_groups

GPU_LAYERS, CPU_LAYERS = 2, 12
GPU_HEADS, CPU_HEADS = 32, 8
WEIGHT_DECAY = 0.045  # the paper's


def prior_to_train(settings: TrainingBenchConfig, machine: Machine) -> Prior:
    """Returns a prior of the size in the settings. If unset, the size is such that a step on this device takes seconds."""
    on_gpu = machine.device.type == "cuda"
    layers = settings.n_layers or (GPU_LAYERS if on_gpu else CPU_LAYERS)
    return build_prior(settings, machine, layers, settings.n_heads or (GPU_HEADS if on_gpu else CPU_HEADS))


def build_prior(settings: PriorBenchConfig, machine: Machine, layers: int, heads: int) -> Prior:
    """Returns a prior with the same weights at every call."""
    config = PriorConfig(
        n_layers=layers,
        n_heads=heads,
        d_head=settings.d_head,
        text_len=settings.text_len,
        grid=settings.grid,
        conv_kernel=settings.conv_kernel,
        vocab_size=settings.vocab_size,
        n_codes=settings.n_codes,
    )
    prior = Prior(config).to(machine.device)
    initialise(prior, torch.Generator(machine.device).manual_seed(0))
    return prior


def prior_step(prior: Prior, batch: int, precision: AbstractContextManager[None]) -> Callable[[], None]:
    """Returns a function that trains `prior` on random tokens, one step per call."""
    return training_step(random_loss(prior, batch, precision), decay_groups(prior.named_parameters(), WEIGHT_DECAY))


def random_loss(prior: Prior, batch: int, precision: AbstractContextManager[None]) -> Callable[[], torch.Tensor]:
    """Returns a function that computes the training loss on random tokens, the same tokens at every call."""
    config, device = prior.config, prior.embed.row.device
    text_BT = torch.randint(config.vocab_size, (batch, config.text_len - 1), device=device)
    image_BN = torch.randint(config.n_codes, (batch, config.n_image), device=device)

    def loss() -> torch.Tensor:
        with precision:
            nll = prior(text_BT, image_BN)
        return TEXT_WEIGHT * nll.text_sum / nll.n_text + IMAGE_WEIGHT * nll.image_sum / nll.n_image

    return loss


def adamw(parameters: list[nn.Parameter] | list[dict]) -> torch.optim.AdamW:
    """Returns AdamW with learning rate 1e-4 and the paper's betas, in torch's fastest form, for any side of a comparison."""
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.96), fused=True)


def training_step(loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter] | list[dict]) -> Callable[[], None]:
    """Returns a function that runs one training step (forward, backward, AdamW) of any model per call."""
    optimizer = adamw(parameters)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
