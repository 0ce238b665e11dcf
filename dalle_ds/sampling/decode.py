"""Image tokens to pictures."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.models.dvae import DVAE

BLANK = (208, 210, 214)


def decode_pictures(dvae: DVAE, codes_BN: Tensor | Sequence[Tensor]) -> list[Image.Image]:
    """Codes (B, N) -> B pictures of the dVAE's size.

    One at a time: a convolution's rounding depends on the batch, and a picture must repeat bit for bit whatever was decoded
    beside it. The prior's many steps a picture are what takes the time.
    """
    device = next(dvae.parameters()).device
    with torch.inference_mode():
        images = [dvae.decode_tokens(codes_N[None].to(device))[0].cpu() for codes_N in codes_BN]
    return [to_picture(image) for image in images]


def partial_pictures(dvae: DVAE, codes_BN: Tensor, n_rows: int) -> list[Image.Image]:
    """Pictures of which the first `n_rows` rows of the grid are drawn; what is below them is blank."""
    pictures = decode_pictures(dvae, codes_BN)
    for picture in pictures:
        top = picture.height * n_rows // dvae.config.grid
        picture.paste(BLANK, (0, top, picture.width, picture.height))
    return pictures


def to_picture(image_CHW: Tensor) -> Image.Image:
    """uint8 (C, H, W), one or three channels -> a picture in RGB."""
    if image_CHW.shape[0] == 1:
        image_CHW = image_CHW.expand(3, -1, -1)
    return Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy(), "RGB")
