"""CLIP's images: decoded, shrunk and cropped. For worker processes: imports no torch."""

# H and W pixels, C channels

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dalle_ds.data.images import ImageProblem, decode_image, prior_crop

KEPT_SCALE = 2
"""Images are kept at this multiple of the model's image size: crops are resized to the model's image size, so the detail of
larger images would be lost anyway."""


@dataclass(frozen=True)
class ClipCrops:
    """Decodes images and crops them as for the prior's data, at a random place. A `Preparation`."""

    image_size: int

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (H, W, C), shrunk to `KEPT_SCALE` times the model's image size. Raises ImageProblem."""
        image = decode_image(data)
        if min(image.size) < self.image_size:
            raise ImageProblem("too small")
        factor = KEPT_SCALE * self.image_size / min(image.size)
        if factor < 1:
            size = (round(image.width * factor), round(image.height * factor))
            image = image.resize(size, Image.Resampling.BOX)
        return np.asarray(image)

    def crop(self, pixels_HWC: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        return prior_crop(pixels_HWC, self.image_size, int(np.random.default_rng(seed).integers(2**63)))
