"""The bound on ln p(image, caption) that the paper maximises, for the whole model on validation pairs.

ln p(x, y) >= ln p(x | z) + ln p(y, z), where z are the codes that the encoder finds most likely. The encoder then is
deterministic, so its entropy is 0 and the KL term of the paper's equation 1 is -ln p(y, z). S pairs.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from dalle_ds.evaluation.bootstrap import mean_interval

LEAVES_OUT: Final = (
    "all codes but the encoder's most likely ones, so the model's true likelihood is higher",
    "the length of a caption: its tokens count given their number",
    "upper case, and other divisions of a caption into tokens",
    "tokens beyond text_len, of captions that are cut",
    "what the crop and resizing took from the original image",
)
"""What the numbers do not count."""


@dataclass(frozen=True)
class JointBound:
    """Upper bounds of -ln p(image, caption), means over pairs. `nats` is the sum of its three parts.

    Pixels are 8-bit values. Unlike a density of real-valued pixels, their probabilities do not depend on how pixels are scaled.
    """

    nats: float
    nats_low: float
    nats_high: float
    caption_nats: float
    codes_nats: float
    pixels_nats: float
    bits_per_subpixel: float
    n_pairs: int

    def to_dict(self) -> dict[str, Any]:
        """Entry `bound` of `evaluate.json`."""
        return {**asdict(self), "leaves_out": LEAVES_OUT}

    def metrics(self) -> dict[str, float]:
        """Metrics, with the names used in the tracker."""
        return {f"bound/{name}": value for name, value in asdict(self).items() if name != "n_pairs"}


def joint_bound(
    caption_S: np.ndarray, codes_S: np.ndarray, pixels_S: np.ndarray, n_subpixels: int, classes_S: np.ndarray, *, seed: int = 0
) -> JointBound:
    """Add up the losses of the parts, each in nats a pair.

    Args:
        caption_S: -ln p(caption) of the prior.
        codes_S: -ln p(codes | caption) of the prior.
        pixels_S: -ln p(pixels | codes) of the decoder.
        n_subpixels: sub-pixels of an image.
        classes_S: classes of `caption_gap.caption_classes`, which are resampled for the 95 % interval.
    """
    total_S = caption_S + codes_S + pixels_S
    low, high = mean_interval(total_S, classes_S, seed=seed)
    nats = float(total_S.mean())
    return JointBound(
        nats=nats,
        nats_low=low,
        nats_high=high,
        caption_nats=float(caption_S.mean()),
        codes_nats=float(codes_S.mean()),
        pixels_nats=float(pixels_S.mean()),
        bits_per_subpixel=nats / math.log(2) / n_subpixels,
        n_pairs=len(total_S),
    )
