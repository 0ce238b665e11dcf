"""Metrics and charts of a dVAE run, and the description of its MLflow page."""

# B batch, C channels, K codes, h and w grid cells, N = h*w

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.data.reconstruction import codebook_usage, psnr, ssim
from dalle_ds.figures import drawn, new_figure
from dalle_ds.models.dvae import DVAE
from dalle_ds.ops.logit_laplace import location_pixels, log_density, split_output
from dalle_ds.ops.relaxation import gumbel_softmax, kl_to_uniform
from dalle_ds.parallel.ranks import Ranks
from dalle_ds.tracking.charts import thinned
from dalle_ds.training.dvae.config import DVAERunConfig

BATCH = 16
"""Images per forward pass in validation, independent of the training batch. The paper's model needs 6 GiB for it in fp32.
The results do not depend on it."""
COLLAPSED_BELOW = 0.1
"""Fraction of codes in use below which the codebook counts as collapsed."""
COLLAPSE_CAUSES = (
    "usual causes: the KL weight rises too fast or too high for the batch size, tau falls too fast, the learning rate is too "
    "high, ln b diverges (set loss.ln_b_min), or the run is too short for the codebook (set loss.usage_weight)"
)


def describe(run: DVAERunConfig, n_parameters: int, world_size: int) -> str:
    """Describe the run and its main metrics in Markdown, for the run's MLflow page."""
    model = run.model
    lines = [
        f"dVAE of {model.image_size} px, {model.grid} x {model.grid} codes of {model.n_codes}, with {n_parameters / 1e6:.1f} "
        f"million parameters: {run.updates} updates of {run.global_batch} images from `{run.data.raw}` on {world_size} ranks.",
        "",
        "Where to look first, under *Model metrics*:",
        "- the images `reconstructions` and `codebook_usage`, by update. In the first, each row of validation images is above "
        "its reconstructions.",
        "- `validation/psnr` and `validation/ssim`: of the EMA weights with hard codes, as the prior's data. Both should rise.",
        "- `validation/codes_used` and `validation/perplexity`: if they fall and stay low, the codebook has collapsed.",
        "- `loss/train/nll` and `loss/train/kl_per_cell`, beside the schedules `schedules/tau` and `schedules/kl_weight`.",
        "- `optimizer/skipped_updates`: updates with Inf or NaN among the gradients. In fp16 a few at the start and one in "
        "about 2000 are the search for the largest loss scale.",
        "- `speed/images_per_second` and `speed/data_wait_seconds`: if the second keeps growing, training waits for images.",
        "",
        "The settings are listed as parameters, and in `recipe.yaml` under *Artifacts*.",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class DVAEValidation:
    """Results on the validation images. PSNR and SSIM are of hard codes: argmax, no noise, as the prior's data are encoded.

    Both evidence lower bounds (`elb`) use KL weight 1 and are in nats per sub-pixel: `elb_hard` with codes sampled from q,
    `elb_relaxed` with codes relaxed at `tau`.
    """

    psnr: float  # dB, mean over images
    ssim: float  # mean over images
    codes_used: int
    n_codes: int
    perplexity: float
    kl_per_cell: float  # nats
    elb_hard: float
    elb_relaxed: float
    tau: float
    n_images: int

    @property
    def has_collapsed(self) -> bool:
        """Whether most codes are unused: a few codes then carry the image, and the prior would learn only those."""
        return self.codes_used < COLLAPSED_BELOW * self.n_codes

    def metrics(self) -> dict[str, float]:
        """The metrics, by their names in the tracker."""
        values = {key: float(value) for key, value in asdict(self).items() if key not in ("tau", "n_images", "n_codes")}
        return {f"validation/{key}": value for key, value in values.items()}


class _Measured(NamedTuple):
    """Results of one batch. The KL term and the log densities (hard, relaxed) are sums per image, in nats."""

    psnr_B: np.ndarray
    ssim_B: np.ndarray
    counts_K: np.ndarray
    kl_B: np.ndarray
    hard_B: np.ndarray
    relaxed_B: np.ndarray


@torch.no_grad()
def measure(
    model: DVAE, images_BCHW: Tensor, tau: float, ln_b_min: float | None, ranks: Ranks
) -> tuple[DVAEValidation, np.ndarray]:
    """Validate on uint8 images, in fp32. Each image has its own fixed noise.

    All ranks must call it together, with the same images. Each rank measures a part of them.

    Returns:
        The results, and how often each code is chosen (K,). Same on every rank.
    """
    starts = range(0, len(images_BCHW), BATCH)[ranks.rank :: ranks.world_size]
    measured = {start: _measure(model, images_BCHW[start : start + BATCH], tau, ln_b_min, start) for start in starts}
    measured = {start: batch for of_rank in ranks.gather_objects(measured) for start, batch in of_rank.items()}
    psnr_S, ssim_S, counts_SK, kl_S, hard_S, relaxed_S = zip(*(measured[start] for start in sorted(measured)), strict=True)
    n_images, n_subpixels = len(images_BCHW), images_BCHW.numel()
    kl, hard, relaxed = (float(np.concatenate(sums_S).sum()) for sums_S in (kl_S, hard_S, relaxed_S))
    counts_K = np.sum(counts_SK, axis=0)
    usage = codebook_usage(counts_K)
    numbers = DVAEValidation(
        psnr=float(np.concatenate(psnr_S).mean()),
        ssim=float(np.concatenate(ssim_S).mean()),
        codes_used=usage.n_used,
        n_codes=usage.n_codes,
        perplexity=usage.perplexity,
        kl_per_cell=kl / (n_images * model.config.n_tokens),
        elb_hard=(hard - kl) / n_subpixels,
        elb_relaxed=(relaxed - kl) / n_subpixels,
        tau=tau,
        n_images=n_images,
    )
    return numbers, counts_K


def _measure(model: DVAE, images_BCHW: Tensor, tau: float, ln_b_min: float | None, first_seed: int) -> _Measured:
    device = next(model.parameters()).device
    images_BCHW = images_BCHW.to(device)
    noises = [torch.Generator(device).manual_seed(first_seed + i) for i in range(len(images_BCHW))]
    codes_Bhw, made_BCHW, *sums = measured_tensors(model, images_BCHW, tau, ln_b_min, noises)
    pair = images_BCHW.cpu().numpy(), made_BCHW.cpu().numpy()
    counts_K = np.bincount(codes_Bhw.flatten().cpu().numpy(), minlength=model.config.n_codes)
    return _Measured(psnr(*pair), ssim(*pair), counts_K, *(of_images_B.cpu().numpy() for of_images_B in sums))


@torch.no_grad()
def measured_tensors(
    model: DVAE, images_BCHW: Tensor, tau: float, ln_b_min: float | None, noises: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute on the device all tensors that the validation metrics need.

    Returns:
        Hard codes (B, h, w) and their reconstructions (uint8). Then, per image in nats, (B,) float64: the KL term, the log
        density given codes sampled from q, and the log density given relaxed codes.
    """
    pixels_BCHW = model.map_images(images_BCHW)
    logits_BKhw = model.encode_logits(pixels_BCHW)
    codes_Bhw = logits_BKhw.argmax(dim=1)
    made_BCHW = location_pixels(split_output(model.decoder.from_codes(codes_Bhw))[0], model.config.pixel_eps)
    singles = list(zip(logits_BKhw.split(1), noises, strict=True))
    relaxed_BKhw = torch.cat([gumbel_softmax(logits_1Khw, tau, noise) for logits_1Khw, noise in singles])
    # the argmax of logits + Gumbel noise is a sample from q
    drawn_Bhw = torch.cat([gumbel_softmax(logits_1Khw, 1.0, noise).argmax(dim=1) for logits_1Khw, noise in singles])
    densities = []
    for decode, codes in ((model.decoder.from_codes, drawn_Bhw), (model.decoder, relaxed_BKhw)):
        mu, ln_b = split_output(decode(codes))
        densities.append(_sums(log_density(pixels_BCHW, mu, floored(ln_b, ln_b_min))))
    return codes_Bhw, made_BCHW, _sums(kl_to_uniform(logits_BKhw)), *densities


def _sums(values: Tensor) -> Tensor:
    """Sum over all elements of each image."""
    return values.flatten(1).sum(1, dtype=torch.float64)


def floored(ln_b: Tensor, minimum: float | None) -> Tensor:
    """ln b, clamped to at least `minimum` unless it is None."""
    return ln_b if minimum is None else ln_b.clamp(min=minimum)


@torch.no_grad()
def reconstructions(model: DVAE, images_BCHW: Tensor, n: int = 36) -> tuple[Tensor, Tensor]:
    """Reconstruct up to `n` validation images from hard codes. Returns the images and their reconstructions, on the CPU."""
    # Take images spread over the set: neighbours are often similar.
    spread = torch.linspace(0, len(images_BCHW) - 1, min(n, len(images_BCHW))).long()
    chosen_BCHW = images_BCHW[spread]
    batches = chosen_BCHW.to(next(model.parameters()).device).split(BATCH)
    return chosen_BCHW.cpu(), torch.cat([model.decode_tokens(model.tokens(batch_BCHW)) for batch_BCHW in batches]).cpu()


def reconstruction_grid(images_BCHW: Tensor, made_BCHW: Tensor, columns: int = 12, min_side: int = 64) -> Image.Image:
    """Grid of images, each row above its reconstructions. Images below `min_side` are enlarged without smoothing."""
    rows = []
    for start in range(0, len(images_BCHW), columns):
        for images in (images_BCHW, made_BCHW):
            row_BHWC = images[start : start + columns].permute(0, 2, 3, 1).numpy()
            missing = columns - len(row_BHWC)
            rows.append(np.concatenate([*row_BHWC, *[np.full_like(row_BHWC[0], 255)] * missing], axis=1))
    grid = Image.fromarray(np.concatenate(rows, axis=0).squeeze())
    enlarge = -(-min_side // images_BCHW.shape[-1])
    return grid.resize((grid.width * enlarge, grid.height * enlarge), Image.Resampling.NEAREST)


def usage_chart(counts_K: np.ndarray, title: str) -> Image.Image:
    """Chart of how often each code is chosen, from the most to the least used, on a logarithmic scale."""
    figure = new_figure(7.5, 3.6)
    axes = figure.add_subplot()
    kept = thinned(len(counts_K))  # a bar a code, as one outline: 8192 bars of their own take 8 s
    edges = np.append(kept, len(counts_K)) - 0.5
    axes.stairs(np.sort(counts_K)[::-1][kept], edges, fill=True, baseline=0.5)
    axes.set(title=title, xlabel="codes, by use", ylabel="cells", yscale="log", ylim=(0.5, None))
    return drawn(figure, dpi=100)
