"""Draw image tokens from the prior, one after another, each picture by a random generator of its own.

C captions, K candidates a caption, B = C * K pictures, T text slots, N image tokens, P given (prime) tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dalle_ds.models.prior import Prior


@torch.inference_mode()
def generate(
    prior: Prior,
    text_CT: Tensor,
    seeds_CK: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prime_codes_CP: Tensor | None = None,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample K pictures for each caption -> codes (C, K, N) int64, on the CPU.

    A caption's slots are computed once for its K candidates. A picture depends on its caption, its seed and the settings, not
    on what else is sampled beside it (but for rounding: other batch sizes may take other matrix kernels).

    Args:
        text_CT: captions (C, T-1) int64, padded as the prior expects.
        seeds_CK: a seed for every picture; every caption has the same number of them.
        temperature: divides the logits; 0 takes the likeliest token. The paper samples at 1.
        top_k: keep the k likeliest tokens; 0 keeps all (the paper's way).
        top_p: keep the likeliest tokens that together have this probability; 1 keeps all.
        prime_codes_CP: the first P tokens of every picture of a caption, given instead of sampled: the paper's image-to-image
            gives the top 15 rows of 32.
        on_token: called after each sampled token with its index and all codes so far (B, N).

    Raises:
        ValueError: settings out of range, shapes that do not fit.
    """
    config = prior.config
    device = next(prior.parameters()).device
    n_candidates = _check(text_CT, seeds_CK, temperature, top_k, top_p)
    codes_BN = torch.zeros(len(text_CT) * n_candidates, config.n_image, dtype=torch.int64)
    n_given = 0
    if prime_codes_CP is not None:
        n_given = prime_codes_CP.shape[1]
        if prime_codes_CP.shape[0] != len(text_CT) or not 0 < n_given <= config.n_image:
            raise ValueError(
                f"prime codes have shape {tuple(prime_codes_CP.shape)}, expected ({len(text_CT)}, 1..{config.n_image})"
            )
        codes_BN[:, :n_given] = prime_codes_CP.repeat_interleave(n_candidates, 0)

    # All random numbers in advance, one for each place: a given token takes its number along, so that keeping fewer rows of a
    # picture changes nothing but those rows; drawn on the CPU, so that a GPU samples the same picture.
    draws_BN = torch.stack([_draws(seed, config.n_image) for seeds in seeds_CK for seed in seeds]).to(device)
    logits_BV, caches = prior.prefill(text_CT.to(device))
    logits_BV = logits_BV.repeat_interleave(n_candidates, 0)
    caches = [cache.expand(n_candidates) for cache in caches]
    for j in range(config.n_image):
        if j >= n_given:
            codes_BN[:, j] = pick(logits_BV, draws_BN[:, j], temperature, top_k, top_p).cpu()
            if on_token is not None:
                on_token(j, codes_BN)
        if j + 1 < config.n_image:
            logits_BV = prior.decode(codes_BN[:, j].to(device), j, caches)
    return codes_BN.unflatten(0, (len(text_CT), n_candidates))


def pick(logits_BV: Tensor, draws_B: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One token a row -> (B,): the inverse of the cumulative distribution at `draws` (in [0, 1), float64)."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.double() / temperature  # fp64: the last bits of fp32 sums would decide near the steps
    if 0 < top_k < logits_BV.shape[-1]:
        smallest = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))  # the likeliest has nothing before it and always stays
        logits_BV = torch.empty_like(ordered).scatter_(-1, order, ordered)
    cumulative = logits_BV.softmax(-1).cumsum(-1)
    places = torch.searchsorted(cumulative, draws_B[:, None] * cumulative[:, -1:], right=True)
    return places[:, 0].clamp(max=logits_BV.shape[-1] - 1)


def _draws(seed: int, n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check(text_CT: Tensor, seeds_CK: Sequence[Sequence[int]], temperature: float, top_k: int, top_p: float) -> int:
    counts = {len(seeds) for seeds in seeds_CK}
    if len(seeds_CK) != len(text_CT) or len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{len(text_CT)} captions and seeds for {[len(seeds) for seeds in seeds_CK]}: expected as many for each"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature}: expected 0 or more")
    if top_k < 0:
        raise ValueError(f"top_k {top_k}: expected 0 (all) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: expected above 0, at most 1")
    return counts.pop()
