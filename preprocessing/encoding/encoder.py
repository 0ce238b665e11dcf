"""The dVAE encoder in fp32, bf16 or fp16, and the fraction of its tokens that agree with fp32."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import torch

from dalle_ds.data.images import ImageProblem
from dalle_ds.data.raw.shards import RawSample, RawShard, read_raw_shard
from dalle_ds.errors import DataError
from dalle_ds.models.dvae import DVAE, Conv2d
from dalle_ds.ops import exactness
from dalle_ds.ops.kernel_compiler import kernel_problem
from preprocessing.configs import Precision

# B images per batch, H = W = image_size, C = 3, N tokens per image

log = logging.getLogger(__name__)

Encode = Callable[[np.ndarray], np.ndarray]  # uint8 images (B, H, W, C) -> tokens (B, N)

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHECKED_TOKENS: Final = 2**14  # enough to distinguish 99.5% from 99.3%
MAX_CHECKED_IMAGES: Final = 256


def encoder_of(dvae: DVAE, precision: Precision, device: str, tf32: bool = False) -> Encode:
    """Returns a function from images to tokens. Modifies `dvae`, which must not be used elsewhere afterwards.

    The dVAE moves to the device in channels-last order. In bf16 and fp16 only the residual branches run in 16 bits. The
    residual stream and the logits stay in fp32, which preserves most of the tokens that plain autocast would change. With
    `tf32`, a GPU rounds the operands of fp32 convolutions to a 10-bit mantissa.
    """
    exactness.exact_fp32()
    dvae = dvae.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    if precision != "fp32":
        for name, module in dvae.encoder.named_modules():
            if isinstance(module, Conv2d) and "res_path" not in name:
                module.force_fp32 = True
        if device == "cuda":
            problem = kernel_problem()
            if problem is None:
                dvae.encoder.compile(dynamic=True)  # the last batch of a shard is smaller
            else:
                log.warning("the encoder runs uncompiled and therefore slower: %s", problem)

    @torch.inference_mode()
    def encode(images_BHWC: np.ndarray) -> np.ndarray:
        # No .contiguous(): the images are already in channels-last order.
        images_BCHW = torch.from_numpy(images_BHWC).to(device).permute(0, 3, 1, 2)
        with exactness.tf32(tf32), torch.autocast(device, DTYPES.get(precision), enabled=precision != "fp32"):
            return dvae.tokens(images_BCHW).cpu().numpy()

    return encode


def agreement(
    shards: Iterable[RawShard], n_tokens: int, crop: Callable[[RawSample], np.ndarray], batch: int, sides: Sequence[Encode]
) -> float:
    """Fraction of equal tokens of both encoders in `sides`, on the first usable images.

    Raises:
        DataError: there is no usable image.
    """
    n_images = min(MAX_CHECKED_IMAGES, -(-CHECKED_TOKENS // n_tokens))
    crops = _first_crops(shards, crop, n_images)
    if not crops:
        raise DataError("no usable image in the input to check encode.precision on; expected at least one")
    batches = [np.stack(crops[start : start + batch]) for start in range(0, len(crops), batch)]
    ours, theirs = (np.concatenate([encode(images) for images in batches]) for encode in sides)
    return float((ours == theirs).mean())


def _first_crops(shards: Iterable[RawShard], crop: Callable[[RawSample], np.ndarray], n_images: int) -> list[np.ndarray]:
    crops: list[np.ndarray] = []
    for shard in shards:
        for sample in read_raw_shard(shard):
            if isinstance(sample, RawSample):
                try:
                    crops.append(crop(sample))
                except ImageProblem:
                    continue
            if len(crops) == n_images:
                return crops
    return crops
