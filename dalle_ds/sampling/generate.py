"""Sample image tokens from the prior autoregressively. Each image has its own random generator.

C captions, K candidates per caption, B = C * K images, T text positions, N image tokens, P given (prime) tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dalle_ds.models.prior import DecodingCache, Prior
from dalle_ds.models.resblock import Linear
from dalle_ds.ops.packed import packed_linear
from dalle_ds.padding import PAD


@torch.inference_mode()
def generate(
    prior: Prior,
    text_CT: Tensor,
    seeds_CK: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    prime_codes_CP: Tensor | None = None,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample K images for each caption. Returns the codes (C, K, N) int64, on the CPU.

    A caption and its given tokens are prefilled once for its K candidates. An image depends only on its caption, its seed and
    the settings, not on the rest of the batch, except for rounding: other batch sizes may use other matrix kernels.

    Args:
        text_CT: captions (C, T-1) int64, padded with PAD.
        seeds_CK: one seed per image. Every caption has the same number of seeds.
        temperature: divides the logits; 0 takes the most likely token. The paper samples at 1.
        top_k: sample only from the k most likely tokens; 0 keeps all, as in the paper.
        top_p: sample only from the smallest set of most likely tokens that together have this probability; 1 keeps all.
        guidance: scale of classifier-free guidance (Ho and Salimans 2022), which extrapolates from the logits without a caption
            to the logits with it; 1: no guidance. Requires a prior trained with caption dropout, and doubles the work.
        prime_codes_CP: the first P tokens of every image of a caption, given instead of sampled. The paper's image-to-image
            gives the top 15 rows of 32.
        on_token: called after each sampled token with the token's index and all codes so far (B, N), on the prior's device.

    Raises:
        ValueError: settings out of range, or shapes that do not match.
    """
    n_image, n_captions = prior.config.n_image, len(text_CT)
    device = next(prior.parameters()).device
    n_candidates = _check(text_CT, seeds_CK, temperature, top_k, top_p, guidance)
    prime_CP = torch.zeros(n_captions, 0, dtype=torch.int64) if prime_codes_CP is None else prime_codes_CP
    n_given = prime_CP.shape[1]
    if len(prime_CP) != n_captions or n_given > n_image:
        raise ValueError(f"prime codes have shape {tuple(prime_CP.shape)}, expected ({n_captions}, 0..{n_image})")
    codes_BN = torch.zeros(n_captions * n_candidates, n_image, dtype=torch.int64, device=device)
    codes_BN[:, :n_given] = prime_CP.repeat_interleave(n_candidates, 0)
    if n_given < n_image:
        # Draw all random numbers in advance, one per position. Given tokens also use up a number, so that the random numbers of
        # later rows do not depend on the number of given rows. Draw on the CPU, so that a GPU samples the same image.
        draws_BN = torch.stack([_draws(seed, n_image) for seeds in seeds_CK for seed in seeds]).to(device)
        text_CT, prime_CP = text_CT.to(device), prime_CP.to(device)
        guided = guidance != 1
        if guided:  # stack along the batch: all captions, then the same number of rows without a caption
            text_CT, prime_CP = torch.cat([text_CT, torch.full_like(text_CT, PAD)]), prime_CP.repeat(2, 1)
        logits_CV, cache = prior.prefill(text_CT, prime_CP)
        logits_BV, cache = logits_CV.repeat_interleave(n_candidates, 0), cache.expand(n_candidates)
        with decoder(prior, cache, len(logits_BV)) as decode:
            for j in range(n_given, n_image):
                logits_BV = _guide(logits_BV, guidance) if guided else logits_BV
                codes_BN[:, j] = pick(logits_BV, draws_BN[:, j], temperature, top_k, top_p)
                if on_token is not None:
                    on_token(j, codes_BN)
                if j + 1 < n_image:
                    logits_BV = decode(codes_BN[:, j].repeat(2 if guided else 1))
    return codes_BN.cpu().unflatten(0, (n_captions, n_candidates))


def _guide(logits_BV: Tensor, guidance: float) -> Tensor:
    """Returns guided logits (B, V). The input (2B, V) holds the logits with captions, then those without."""
    with_caption, without = logits_BV.chunk(2)
    return torch.lerp(without, with_caption, guidance)


@contextmanager
def decoder(prior: Prior, cache: DecodingCache, batch: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields a fast version of `prior.decode` on `cache`, for many tokens of `batch` images.

    On CUDA it replays a CUDA graph. On CPUs it uses packed weights, which are a second copy of the weights inside this context.
    The next call may overwrite the returned logits.
    """
    if cache.slot_1.device.type == "cuda":
        yield _recorded(prior, cache, batch)
        return
    packed = []
    for module in prior.modules():
        # keep a matmul that was already replaced, for example by a 16-bit one
        if isinstance(module, Linear) and not module.has_own_matmul:
            matmul = packed_linear(module.weight_OI, batch)
            if matmul is not None:
                module.use_matmul(matmul)
                packed.append(module)
    try:
        yield lambda token_B: prior.decode(token_B, cache)
    finally:
        for module in packed:
            module.reset_matmul()


def _recorded(prior: Prior, cache: DecodingCache, batch: int) -> Callable[[Tensor], Tensor]:
    """Capture a decoding step as a CUDA graph and replay it per token: otherwise its many small kernels wait for Python."""
    token_B = torch.zeros(batch, dtype=torch.int64, device=cache.slot_1.device)
    slot = int(cache.slot_1)
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):  # libraries initialize in the first runs, which graph capture does not allow
        for _ in range(2):
            prior.decode(token_B, cache)
            # Reset the position: the first real token overwrites these keys. Their cache slot held a key already out of reach.
            cache.slot_1.fill_(slot)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    # thread_local: another thread may be decoding and scoring the previous batch, and allocates memory
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits_BV = prior.decode(token_B, cache)

    def replay(next_B: Tensor) -> Tensor:
        token_B.copy_(next_B)
        graph.replay()
        return logits_BV

    return replay


def pick(logits_BV: Tensor, draws_B: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution at `draws_B`, float64 in [0, 1). Returns (B,)."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.double() / temperature  # fp64: fp32 rounding of the sums could change the token near a step
    if 0 < top_k < logits_BV.shape[-1]:
        smallest = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= top_p, float("-inf"))  # the most likely token always stays
        logits_BV = torch.empty_like(ordered).scatter_(-1, order, ordered)
    cumulative = logits_BV.softmax(-1).cumsum(-1)
    places = torch.searchsorted(cumulative, draws_B[:, None] * cumulative[:, -1:], right=True)
    return places[:, 0].clamp(max=logits_BV.shape[-1] - 1)


def _draws(seed: int, n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check(
    text_CT: Tensor, seeds_CK: Sequence[Sequence[int]], temperature: float, top_k: int, top_p: float, guidance: float
) -> int:
    counts = {len(seeds) for seeds in seeds_CK}
    if len(seeds_CK) != len(text_CT) or len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"{len(text_CT)} captions, seeds for {[len(seeds) for seeds in seeds_CK]}: expected equally many for each caption"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature}: expected 0 or more")
    if top_k < 0:
        raise ValueError(f"top_k {top_k}: expected 0 (all) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: expected more than 0 and at most 1")
    if not (0 <= guidance < float("inf")):
        raise ValueError(f"guidance {guidance}: expected 0 or more, 1 for none")
    return counts.pop()
