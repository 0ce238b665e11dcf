"""The discrete VAE at 256 pixels: a training step, the memory of a validation, tokens equal to those from the CPU."""

from importlib.util import find_spec

import torch

from dalle_ds.acceptance.place import Place
from dalle_ds.acceptance.record import Record
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.ops.logit_laplace import log_density
from dalle_ds.ops.relaxation import kl_to_uniform
from dalle_ds.parallel.ranks import Ranks

SMALL = {"image_size": 32, "n_groups": 3, "n_blk_per_group": 1, "n_hid": 32, "n_init": 64, "n_codes": 512}
EQUAL_SHARE = 0.998
"""Fraction of equal fp32 tokens of random images: convolutions sum in another order. TF32, with a mantissa of 10 bits instead
of 23, changes more tokens."""
ROOM_GIB = 22.0
"""REPRODUCE.md: any GPU of 24 GiB, minus the driver's memory and fragmentation."""


def run(record: Record, is_rehearsal: bool) -> None:
    place = Place(is_rehearsal)
    torch.manual_seed(0)
    config = DVAEConfig(**place.pick({}, SMALL))
    model = DVAE(config)
    shape = (config.in_channels, config.image_size, config.image_size)
    images_BCHW = torch.randint(256, (place.pick(64, 12), *shape), dtype=torch.uint8)
    expected = model.tokens(images_BCHW[:2])
    model.to(place.device, memory_format=torch.channels_last)
    share = float((model.tokens(images_BCHW[:2].to(place.device)).cpu() == expected).float().mean())
    why = "workers on CPUs and GPUs encode one data set under one fingerprint"
    record.must("fraction of fp32 tokens equal to a CPU's", share, share >= EQUAL_SHARE, f"at least {EQUAL_SHARE}", why)
    _step(record, place, model, images_BCHW)
    _validation(record, place, model, images_BCHW)


def _step(record: Record, place: Place, model: DVAE, images_BCHW: torch.Tensor) -> None:
    micro_batch = place.pick(8, 2)
    batch_BCHW = images_BCHW[:micro_batch].to(place.device)

    def step() -> None:
        with torch.autocast(place.device.type, place.pick(torch.float16, torch.bfloat16)):
            pixels_BCHW, logits_BKhw, mu_BCHW, ln_b_BCHW = model(batch_BCHW, 0.5)
        density = log_density(pixels_BCHW, mu_BCHW, ln_b_BCHW).mean()
        (kl_to_uniform(logits_BKhw).mean() / images_BCHW[0].numel() - density).backward()

    place.forget_peak()
    record.tell(f"training step of {micro_batch}: images per second", micro_batch / place.seconds(step, 3))
    model.zero_grad(set_to_none=True)
    if not place.is_rehearsal:
        _fits(record, place, f"training step of {micro_batch}: peak GiB")


def _validation(record: Record, place: Place, model: DVAE, images_BCHW: torch.Tensor) -> None:
    if find_spec("skimage") is None:
        record.tell("validation", "not run", "scikit-image, which computes structural similarity, is not installed")
        return
    from dalle_ds.training.dvae.metrics import measure

    place.forget_peak()
    validation, _ = measure(model, images_BCHW, 0.5, None, Ranks(0, 1, place.device))
    record.equal("images of a validation", validation.n_images, len(images_BCHW), "a validation measures every image")
    if not place.is_rehearsal:
        _fits(record, place, "validation: peak GiB")


def _fits(record: Record, place: Place, what: str) -> None:
    why = "REPRODUCE.md promises that the dVAE trains on any GPU of 24 GiB, including its validations"
    record.should(what, place.peak_gib(), place.peak_gib() <= ROOM_GIB, f"at most {ROOM_GIB:g}", why)
