"""The prior that a benchmark measures, and a training step of it.

B batch, T text slots, N image tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from dalle_ds.bench.machine import Machine
from dalle_ds.bench.settings import PriorSettings
from dalle_ds.models.prior import IMAGE_WEIGHT, TEXT_WEIGHT, Prior, PriorConfig, initialise
from dalle_ds.optim.groups import decay_groups


def build_prior(settings: PriorSettings, machine: Machine, layers: int, heads: int) -> Prior:
    """The same weights at every call."""
    config = PriorConfig(
        n_layers=layers,
        n_heads=heads,
        d_head=settings.d_head,
        text_len=settings.text_len,
        grid=settings.grid,
        conv_kernel=settings.conv_kernel,
        text_vocab=settings.text_vocab,
        image_vocab=settings.image_vocab,
    )
    prior = Prior(config).to(machine.device)
    initialise(prior, torch.Generator(machine.device).manual_seed(0))
    return prior


def prior_step(prior: Prior, batch: int, precision: AbstractContextManager[None]) -> Callable[[], None]:
    """Train `prior` on random tokens, a step at each call."""
    config, device = prior.config, prior.embed.row.device
    text_BT = torch.randint(config.text_vocab, (batch, config.text_len - 1), device=device)
    image_BN = torch.randint(config.image_vocab, (batch, config.n_image), device=device)

    def loss() -> torch.Tensor:
        with precision:
            nll = prior(text_BT, image_BN)
        return TEXT_WEIGHT * nll.text_sum / nll.n_text + IMAGE_WEIGHT * nll.image_sum / nll.n_image

    return training_step(loss, decay_groups(prior.named_parameters(), 0.045))


def training_step(loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter] | list[dict]) -> Callable[[], None]:
    """Forward, backward and AdamW with the paper's settings, whoever's model it is."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.96))

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
