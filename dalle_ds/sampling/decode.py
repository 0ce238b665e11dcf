"""Decode image tokens to images with the dVAE."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.models.dvae import DVAE

BLANK = (208, 210, 214)


def decode_images(dvae: DVAE, codes_BN: Tensor | Sequence[Tensor]) -> list[Image.Image]:
    """Decode codes (B, N) to B images of the dVAE's size.

    Images are decoded one at a time: the rounding of a convolution depends on the batch, and an image must be reproducible bit
    for bit in any batch. This costs little, since most of the time goes to the prior's decoding steps.
    """
    device = next(dvae.parameters()).device
    with torch.inference_mode():
        images = [dvae.decode_tokens(codes_N[None].to(device))[0].cpu() for codes_N in codes_BN]
    return [to_image(image) for image in images]


def partial_images(dvae: DVAE, codes_BN: Tensor, n_rows: int) -> list[Image.Image]:
    """Decode codes (B, N) whose first `n_rows` rows of the grid are sampled. The part of the image below them is blank."""
    images = decode_images(dvae, codes_BN)
    for image in images:
        top = image.height * n_rows // dvae.config.grid
        image.paste(BLANK, (0, top, image.width, image.height))
    return images


def to_image(image_CHW: Tensor) -> Image.Image:
    """Convert uint8 (C, H, W) with one or three channels to an RGB image."""
    if image_CHW.shape[0] == 1:
        image_CHW = image_CHW.expand(3, -1, -1)
    return Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy(), "RGB")
