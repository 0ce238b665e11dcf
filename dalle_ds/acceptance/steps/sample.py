"""Sampling: a step captured as a CUDA graph samples the CPU's tokens, and its rate against reading every weight once."""

import time

import torch

from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.acceptance.sizes import wide_prior
from dalle_ds.models.prior import Prior, PriorConfig, initialise
from dalle_ds.sampling.generate import generate

PARTED = 1
"""Images of six that may differ. Random numbers come from the CPU. If one falls within rounding of the boundary between two
tokens (one token in a million), it selects the other token, and the rest of that image differs."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    _equality(record, place)
    _rates(record, place)


def _equality(record: Record, place: Place) -> None:
    config = PriorConfig(n_layers=4, n_heads=2, d_head=16, text_len=6, grid=8, vocab_size=40, n_codes=32, conv_kernel=3)
    prior = _prior(config, torch.device("cpu"))
    text_CT = torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(1))
    seeds_CK = [[1, 2, 3], [4, 5, 6]]
    expected = generate(prior, text_CT, seeds_CK)
    found = generate(prior.to(place.device), text_CT, seeds_CK)
    why = "a seed gives the same image on every machine: `dalle-ds sample --repeat` relies on it"
    parted = int((expected != found).flatten(0, 1).any(1).sum())
    record.at_most("images of 6 that differ from the CPU's", parted, PARTED, why)


def _rates(record: Record, place: Place) -> None:
    config = wide_prior(place, 24)
    prior = _prior(config, place.device)
    weights = sum(p.numel() for name, p in prior.named_parameters() if name.startswith(("layers.", "heads.image.")))
    bound = None if place.is_rehearsal else 1e9 * place.copied_gbps() / (4 * weights)
    text_CT = torch.randint(config.vocab_size, (1, config.text_len - 1), generator=torch.Generator().manual_seed(1))
    place.forget_peak()
    for n in place.pick((1, 32), (2,)):
        began = time.perf_counter()
        generate(prior, text_CT, [list(range(n))])
        rate = config.n_image / (time.perf_counter() - began)
        record.tell(f"batch of {n} images: tokens per second", n * rate)
        why = "a step reads the fp32 weights once, at the rate of a memory copy; the rest is reading keys, and small kernels"
        record.rate(f"batch of {n} images: steps per second", rate, bound, 0.4, why)
    if not place.is_rehearsal:
        record.tell("peak GiB", place.peak_gib())


def _prior(config: PriorConfig, device: torch.device) -> Prior:
    with device:
        prior = Prior(config)
    initialise(prior, torch.Generator(device).manual_seed(0))
    return prior.eval().requires_grad_(False)
