"""Reconstruction quality of a dVAE (PSNR, SSIM), and codebook usage."""

from dataclasses import dataclass

import numpy as np


def psnr(real_BCHW: np.ndarray, reconstructed_BCHW: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB: (B,), infinite if both images are equal.

    Raises:
        ValueError: the images are not uint8 of equal shapes.
    """
    _require_pairs(real_BCHW, reconstructed_BCHW)
    difference = real_BCHW.astype(np.float64) - reconstructed_BCHW
    error = np.square(difference).reshape(len(difference), -1).mean(1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error)


def ssim(real_BCHW: np.ndarray, reconstructed_BCHW: np.ndarray) -> np.ndarray:
    """Structural similarity of each image: (B,), 1 if both images are equal.

    Uses the settings of Wang et al. 2004 (Gaussian window of sigma 1.5), and the mean over channels.

    Raises:
        ValueError: the images are not uint8 of equal shapes, or a side has fewer than 11 pixels.
    """
    from skimage.metrics import structural_similarity  # imports SciPy

    _require_pairs(real_BCHW, reconstructed_BCHW)
    settings = {"channel_axis": 0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    pairs = zip(real_BCHW, reconstructed_BCHW, strict=True)
    return np.array([structural_similarity(real, other, **settings) for real, other in pairs])


@dataclass(frozen=True)
class CodebookUsage:
    """Codebook usage of one code histogram.

    The perplexity is the number of codes that, if used equally often, would carry the same information.
    """

    n_codes: int
    n_used: int
    perplexity: float


def codebook_usage(histogram_K: np.ndarray) -> CodebookUsage:
    """Codebook usage from the counts of K codes.

    Raises:
        ValueError: all counts are 0.
    """
    counts = np.asarray(histogram_K, dtype=np.float64)
    if counts.sum() <= 0:
        raise ValueError("the code histogram is empty")
    shares = counts[counts > 0] / counts.sum()
    return CodebookUsage(len(counts), len(shares), float(np.exp(-(shares * np.log(shares)).sum())))


def _require_pairs(real_BCHW: np.ndarray, reconstructed_BCHW: np.ndarray) -> None:
    if real_BCHW.shape != reconstructed_BCHW.shape or real_BCHW.dtype != np.uint8 or reconstructed_BCHW.dtype != np.uint8:
        raise ValueError(
            f"images {real_BCHW.dtype} {real_BCHW.shape} and {reconstructed_BCHW.dtype} {reconstructed_BCHW.shape}: "
            "expected uint8 of equal shapes"
        )
