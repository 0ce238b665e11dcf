"""The dVAE's random crops, for worker processes: imports no torch."""

from dataclasses import dataclass

import numpy as np

from dalle_ds.data.images import decode_image, dvae_augment


@dataclass(frozen=True)
class Augmentation:
    """Decodes images and crops them as in the paper's listing 1. A `Preparation`."""

    image_size: int
    min_zoom: float
    max_zoom: float

    def decode(self, data: bytes) -> np.ndarray:
        return np.asarray(decode_image(data))

    def crop(self, pixels_HWC: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return dvae_augment(pixels_HWC, self.image_size, rng, min_zoom=self.min_zoom, max_zoom=self.max_zoom)
