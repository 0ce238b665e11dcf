"""First values of a dVAE's codebook: random, as in the paper, or clusters of what a short autoencoder learned.

A random codebook takes tens of thousands of updates to spread over the data, and short runs at large learning rates collapse to
a few codes. Here the run's first updates train encoder and decoder without codes: a linear map makes vectors of the encoder's
features, and noise is added to them in place of the codes' error. Then k-means of such vectors gives the codes. The relaxed
training that follows starts with all codes in use.
"""

# B batch, C channels, H and W pixels, K codes, D features of a cell, I width of a code's vector, h and w grid cells, N cells of
# many images

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dalle_ds.models.dvae import DVAE
from dalle_ds.ops.logit_laplace import split_output
from dalle_ds.optim.schedules import half_cosine
from dalle_ds.recipes import Config

_ROUNDS = 8  # of k-means; more change little
_MEASURED = 4096  # vectors from which the logits' scale is found


class CodebookStartConfig(Config):
    """The updates before the relaxed training. Without any (the paper), the codebook starts from random values."""

    updates: int = Field(
        0,
        ge=0,
        description="the run's first updates, which train without codes, and after which k-means gives the codebook; 0: none, "
        "as in the paper. Schedules count from their end",
    )
    learning_rate: float = Field(3e-3, gt=0, description="of these updates, at their start; it falls to a tenth")
    noise: float = Field(0.15, ge=0, description="noise in place of the codes' error, in units of the vectors' deviation")
    cells: int = Field(20_000, ge=1, description="cells of training images that are clustered, at least")
    nats: float = Field(
        3.0,
        gt=0,
        description="KL(q || uniform) of a cell when the relaxed training starts: larger is nearer to hard codes. Sharp codes "
        "and large learning rates collapse",
    )

    def learning_rate_at(self, update: int) -> float:
        """Learning rate of update number `update` of these."""
        return half_cosine(update, self.learning_rate, self.learning_rate / 10, self.updates)

    def check(self, n_features: int, n_codes: int, updates: int) -> None:
        """Raises ValueError if a dVAE of this size cannot start from clusters, or a run of `updates` has no relaxed updates."""
        if not self.updates:
            return
        if self.updates >= updates:
            raise ValueError(f"codebook_start.updates is {self.updates}, expected fewer than the run's updates {updates}")
        if n_features > n_codes:
            raise ValueError(
                f"n_codes is {n_codes}, expected at least the features of a cell, n_hid * 2^(n_groups - 1) = {n_features}, for "
                "codebook_start"
            )
        if self.nats >= math.log(n_codes):
            raise ValueError(f"codebook_start.nats is {self.nats}, expected below ln n_codes = {math.log(n_codes):.2f}")


def prepare(model: DVAE) -> None:
    """Scale the linear map of `continuous_pass`, so that vectors are as large as features. Call it once, before training.

    The map is the first D columns of the decoder's first convolution, which has a column for each code.
    """
    columns = model.decoder.blocks.input.w
    with torch.no_grad():
        columns.mul_(math.sqrt(columns.shape[1] / model.config.n_features))


def vectors_of(model: DVAE, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 images (B, C, H, W) -> (mapped pixels, vectors (B, I, h, w) that the decoder reads instead of codes)."""
    pixels_BCHW = model.map_images(images_BCHW)
    return pixels_BCHW, F.conv2d(model.encoder.features(pixels_BCHW), _map_of(model)[:, :, None, None])


def continuous_pass(
    model: DVAE, images_BCHW: Tensor, noise: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Training pass without codes. Returns (mapped pixels, mu, ln b), all fp32. The encoder's last convolution is not used."""
    pixels_BCHW, vectors_BIhw = vectors_of(model, images_BCHW)
    deviation = noise * vectors_BIhw.detach().float().std()
    draws = torch.randn(vectors_BIhw.shape, generator=generator, device=vectors_BIhw.device)
    mu, ln_b = split_output(model.decoder.from_vectors(vectors_BIhw + deviation * draws))
    return pixels_BCHW, mu, ln_b


@torch.no_grad()
def start_codebook(model: DVAE, vectors_NI: Tensor, nats: float, seed: int) -> None:
    """Make the centres of k-means of `vectors_NI` the codebook: set the two 1x1 convolutions next to the relaxation.

    With the map A, a cell's features f and the centre c_k, the logit of code k becomes -|A f - c_k|^2 / s, up to a term that is
    equal for all codes. s gives q the KL of `nats`.

    Args:
        vectors_NI: of training images. With fewer distinct ones than codes, some codes start equal.
    """
    # on the CPU: k-means is, and every rank then has the same bits
    map_ID = _map_of(model).detach().float().cpu()
    vectors_NI = vectors_NI.float().cpu()
    centres_KI = _cluster(vectors_NI, model.config.n_codes, seed)
    scale = _scale(torch.cdist(vectors_NI[:_MEASURED], centres_KI) ** 2, nats)
    output, codebook = model.encoder.blocks.output.conv, model.decoder.blocks.input
    output.w.copy_((2 / scale * centres_KI @ map_ID)[:, :, None, None])
    output.b.copy_(-(centres_KI**2).sum(1) / scale)
    codebook.w.copy_(centres_KI.t()[:, :, None, None])
    codebook.b.zero_()


def _map_of(model: DVAE) -> Tensor:
    return model.decoder.blocks.input.w[:, : model.config.n_features, 0, 0]


def _cluster(vectors_NI: Tensor, n_codes: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans  # it imports pandas; most runs have no such start
    from sklearn.exceptions import ConvergenceWarning

    points_NI = vectors_NI.numpy()
    points_NI = np.resize(points_NI, (max(len(points_NI), n_codes), points_NI.shape[1]))  # a cluster needs a point
    clusters = KMeans(n_codes, max_iter=_ROUNDS, random_state=seed)  # one start, by k-means++
    with warnings.catch_warnings(category=ConvergenceWarning, action="ignore"):  # few distinct cells, or few rounds
        centres_KI = clusters.fit(points_NI).cluster_centers_
    return torch.from_numpy(centres_KI).to(vectors_NI)


def _scale(distances_NK: Tensor, nats: float) -> float:
    """The s for which softmax(-distance / s) has this mean KL from uniform, by bisection of ln s."""
    low, high = 1e-12, 1e12
    for _ in range(80):
        middle = math.sqrt(low * high)
        q_NK = torch.softmax(-distances_NK / middle, 1)
        kl = torch.special.xlogy(q_NK, q_NK).sum(1).mean().item() + math.log(distances_NK.shape[1])
        low, high = (middle, high) if kl > nats else (low, middle)
    return math.sqrt(low * high)
