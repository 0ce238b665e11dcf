"""Sample image tokens from a prior, one timed step per call: with our cache, with a dense cache, without a cache.

C captions, K candidates of each, B = C * K images, P image tokens read before, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor

from dalle_ds.bench.harness.reference_decoding import DenseDecoder, embed
from dalle_ds.models.prior import Prior
from dalle_ds.sampling.generate import decoder, pick


class Sampler(Protocol):
    """One side of a comparison."""

    def go_to(self, position: int) -> None:
        """Read the caption and `position` image tokens, so that `step` samples the next one."""
        ...

    def step(self) -> None:
        """Sample a token from the last logits and feed it to the model."""
        ...


class PriorSampler:
    """Shared by all ways of sampling a prior: random captions and tokens, and the draw."""

    def __init__(self, prior: Prior, captions: int, candidates: int) -> None:
        config, device = prior.config, prior.embed.row.device
        generator = torch.Generator().manual_seed(0)
        self.prior, self.candidates = prior, candidates
        self.text_CT = torch.randint(config.vocab_size, (captions, config.text_len - 1), generator=generator).to(device)
        self.image_CN = torch.randint(config.n_codes, (captions, config.n_image), generator=generator).to(device)
        self.draws_B = torch.rand(captions * candidates, generator=generator, dtype=torch.float64).to(device)
        self.logits_BV = torch.empty(0)

    def draw(self) -> Tensor:
        """Returns tokens (B,), one per image, sampled from the last logits."""
        return pick(self.logits_BV, self.draws_B, 1.0)


class OurSampler(PriorSampler):
    """Samples as `generate` does: on a GPU with a CUDA graph, on a CPU with packed weights.

    Copies the prior, because the other sides must not get the packed weights.
    """

    def __init__(self, prior: Prior, captions: int, candidates: int) -> None:
        super().__init__(deepcopy(prior), captions, candidates)
        self._decoder = ExitStack()

    def go_to(self, position: int) -> None:
        logits_CV, cache = self.prior.prefill(self.text_CT, self.image_CN[:, :position])
        self.logits_BV = logits_CV.repeat_interleave(self.candidates, 0)
        self._decoder.close()
        self.decode = self._decoder.enter_context(decoder(self.prior, cache.expand(self.candidates), len(self.logits_BV)))

    def step(self) -> None:
        self.logits_BV = self.decode(self.draw())


class DenseSampler(PriorSampler):
    """Caches keys and values of every slot for every candidate, and attends to all of them under the mask."""

    def go_to(self, position: int) -> None:
        self.decoder, self.position = DenseDecoder(self.prior, len(self.text_CT)), position
        logits_CV = self.decoder.read(embed(self.prior, self.text_CT, self.image_CN[:, :position]))
        self.decoder.kv = self.decoder.kv.repeat_interleave(self.candidates, 2)
        self.logits_BV = logits_CV.repeat_interleave(self.candidates, 0)

    def step(self) -> None:
        self.position += 1
        slot_1 = torch.tensor([self.position], device=self.draws_B.device)
        self.logits_BV = self.decoder.read(self.prior.embed.image_slot(self.draw(), slot_1))


class UncachedSampler(PriorSampler):
    """Runs the model on all slots again for every token."""

    def go_to(self, position: int) -> None:
        self.text_BT = self.text_CT.repeat_interleave(self.candidates, 0)
        self.image_BN = self.image_CN[:, :position].repeat_interleave(self.candidates, 0)
        self.logits_BV = torch.zeros(len(self.text_BT), self.prior.config.n_codes, device=self.draws_B.device)

    def step(self) -> None:
        self.image_BN = torch.cat([self.image_BN, self.draw()[:, None]], 1)
        x_BLC = embed(self.prior, self.text_BT, self.image_BN)
        for layer in self.prior.layers:
            x_BLC = layer(x_BLC)
        self.logits_BV = self.prior.heads(x_BLC[:, -1], "image")


def position_weights(positions: Sequence[int], n_image: int) -> dict[int, float]:
    """Returns, for each measured position, the number of the `n_image` tokens nearest to it (trapezoid rule with flat ends)."""
    ends = [0.0, *((a + b) / 2 for a, b in zip(positions, positions[1:], strict=False)), float(n_image)]
    return {position: end - start for position, start, end in zip(positions, ends, ends[1:], strict=False)}
